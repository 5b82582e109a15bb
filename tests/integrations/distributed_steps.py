"""What each process of test_distributed.py runs: training by DDP and FSDP2, plain and ours, and what is left of both.

The processes are started anew and import this file, so that it needs pytest for nothing.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_conv_bn as fcb
from fused_conv_bn import _sync, conditions, reference
from fused_conv_bn._fuse.root import is_root
from training_pairs import Network, networks

Data = list[tuple[Tensor, Tensor]]
Run = Callable[[Network, Data, torch.device], dict[str, Tensor]]
STEPS = 3


def data_of(rank: int, device: torch.device, dtype: torch.dtype) -> Data:
    """Of each process its own."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (
            torch.randn(4, 3, 8, 10, generator=generator, dtype=torch.float64).to(device, dtype),
            torch.randint(5, (4,), generator=generator).to(device),
        )
        for _ in range(STEPS)
    ]


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().clone()


def left(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: whole(t) for name, t in {**model.state_dict(), **gradients}.items()}


def train(
    wrapped: Any, data: Data, call: Callable[..., Tensor] | None = None, accumulate: Any = None
) -> dict[str, Tensor]:
    """accumulate: a context in which backward reduces nothing, of two passes in three."""
    call = wrapped if call is None else call
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for i, (x, target) in enumerate(data):
        with accumulate(wrapped) if accumulate and i % 3 != 2 else contextlib.nullcontext():
            y = call(x)
            nn.functional.cross_entropy(y if y.dtype == torch.float64 else y.float(), target).backward()
        if accumulate is None or i % 3 == 2:
            optimizer.step()
            if i + 1 < len(data):
                optimizer.zero_grad()
    return left(wrapped)


# ---- DDP -------------------------------------------------------------------------------------------------------------


def ddp(model: nn.Module, device: torch.device, **kwargs: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **kwargs)


def of_ddp(**kwargs: Any) -> Run:
    return lambda model, data, device: train(ddp(model, device, **kwargs), data)


def ddp_accumulating(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    return train(ddp(model, device), data, accumulate=lambda wrapped: wrapped.no_sync())


def ddp_frozen(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    """A block without gradients, and one in evaluation mode."""
    model.stem.requires_grad_(False)
    model.wide.bn.eval()
    return train(ddp(model, device, find_unused_parameters=True), data)


def ddp_autocast(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    wrapped = ddp(model, device)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return wrapped(x)

    return train(wrapped, data, call)


class Checkpointed(nn.Module):
    def __init__(self, model: Network, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


def of_ddp_checkpointed(reentrant: bool) -> Run:
    return lambda model, data, device: train(ddp(Checkpointed(model, reentrant), device, static_graph=True), data)


def ddp_compiled(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    wrapped = ddp(model, device)
    return train(wrapped, data, torch.compile(wrapped, backend="aot_eager"))


def ddp_sync_batch_norm(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    return train(ddp(nn.SyncBatchNorm.convert_sync_batchnorm(model), device), data)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def sharded(model: Network, device: torch.device, **kwargs: Any) -> Network:
    kwargs["mesh"] = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in (model.stem, model.depthwise, model.wide, model.deep):
        fully_shard(block, **kwargs)
    fully_shard(model, **kwargs)
    return model


def of_fsdp(**kwargs: Any) -> Run:
    return lambda model, data, device: train(sharded(model, device, **kwargs), data)


def fsdp_accumulating(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    @contextlib.contextmanager
    def no_sync(wrapped: Any) -> Any:
        wrapped.set_requires_gradient_sync(False)
        yield
        wrapped.set_requires_gradient_sync(True)

    return train(sharded(model, device), data, accumulate=no_sync)


def fsdp_checkpointed(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    wrapped = sharded(model, device)
    return train(wrapped, data, lambda x: checkpoint(wrapped, x.requires_grad_(), use_reentrant=False))


def fsdp_compiled(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    """Each block compiled, the way that torchtitan does it."""
    for block in (model.stem, model.depthwise, model.wide, model.deep):
        block.compile(backend="aot_eager")
    return train(sharded(model, device), data)


def fsdp_of_layers(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    """Sharding conv and bn by themselves gives them hooks and classes of their own: PyTorch's ops run."""
    for block in (model.stem, model.deep):
        fully_shard(block.conv)
        fully_shard(block.bn)
    return train(sharded(model, device), data)


def fsdp_mixed_precision(model: Network, data: Data, device: torch.device) -> dict[str, Tensor]:
    """16-bit parameters with float32 statistics, which PyTorch's BatchNorm does not take: the plain one is in float32."""
    fused = isinstance(model.stem, fcb.ConvBnScale2d) or is_root(model)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train(sharded(model, device, **({"mp_policy": half} if fused else {})), data)


RUNS: dict[str, Run] = {
    "ddp": of_ddp(),
    "ddp, static graph": of_ddp(static_graph=True, gradient_as_bucket_view=True),
    "ddp, accumulating": ddp_accumulating,
    "ddp, frozen parts": ddp_frozen,
    "ddp, checkpoint": of_ddp_checkpointed(False),
    "ddp, reentrant checkpoint": of_ddp_checkpointed(True),
    "ddp, compiled": ddp_compiled,
    "fsdp": of_fsdp(),
    "fsdp, not resharded": of_fsdp(reshard_after_forward=False),
    "fsdp, accumulating": fsdp_accumulating,
    "fsdp, checkpoint": fsdp_checkpointed,
    "fsdp, compiled": fsdp_compiled,
    "fsdp of layers": fsdp_of_layers,
    "ddp, autocast": ddp_autocast,
    "fsdp, mixed precision": fsdp_mixed_precision,
}
CUDA_RUNS: dict[str, Run] = {"ddp, SyncBatchNorm": ddp_sync_batch_norm}
IN_16_BITS = frozenset({"ddp, autocast", "fsdp, mixed precision"})


# ---- the statistics of all batches -----------------------------------------------------------------------------------

# Shape behind the batch, sizes of the processes' batches, activation, residual_last (None: no residual), channels_last.
SYNC_CASES: dict[str, tuple[tuple[int, ...], tuple[int, int], str, bool | None, bool]] = {
    "plain": ((5, 6, 7), (4, 4), "none", None, False),
    "relu, channels_last": ((8, 9, 4), (3, 2), "relu", None, True),
    "residual and relu": ((6, 5, 5), (2, 5), "relu", False, False),
    "silu and residual": ((3, 8), (7, 2), "silu", True, False),
    "residual and gelu, channels_last": ((4, 6, 6), (3, 3), "gelu", False, True),
    "an empty batch": ((5, 4, 4), (6, 0), "silu", False, False),
    "one value in a process": ((7,), (2, 1), "none", None, False),
}


def sync_case(name: str, rank: int, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Tensor], ...]:
    """What F.batch_norm makes of both batches in float64, and what ours makes of them: this process' part."""
    shape, sizes, activation, last, channels_last = SYNC_CASES[name]
    generator = torch.Generator().manual_seed(3)

    def batch() -> Tensor:
        t = torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) * 2 + 3
        return t.to(device).to(memory_format=torch.channels_last) if channels_last else t.to(device)

    z, dy, residual = batch().to(dtype), batch().to(dtype), batch().to(dtype)
    weight, bias, mean, var = torch.rand(4, shape[0], generator=generator, dtype=torch.float64).to(device, dtype) + 0.5
    part = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
    results = []
    for mine in (False, True):
        cut = (lambda t: t[part]) if mine else torch.Tensor.double
        leaves = [cut(t).detach().clone().requires_grad_() for t in (z, residual)]
        leaves += [(t if mine else t.double()).clone().requires_grad_() for t in (weight, bias)]
        running = [(t if mine else t.double()).clone() for t in (mean, var)]
        x, r, w, b = leaves
        r = None if last is None else r
        if mine:
            epilogue = r, activation, 0.01, bool(last)
            y = _sync.bn_scale_train(x, (*running, w, b, 1.5, 0.3, 1e-5), epilogue, dist.group.WORLD)
        else:
            v = nn.functional.batch_norm(x, *running, w, b, True, 0.3, 1e-5) * 1.5
            v = v if r is None or last else v + r
            y = reference.activate(v, activation, 0.01)
            y = y + r if last else y
        names = [n for n in ("z", "residual", "weight", "bias") if n != "residual" or last is not None]
        of = dict(zip(("z", "residual", "weight", "bias"), leaves, strict=True))
        found = dict(zip(names, torch.autograd.grad(y, [of[n] for n in names], cut(dy)), strict=True))
        if mine:
            for n in ("weight", "bias"):
                dist.all_reduce(found[n])
        else:
            y = y[part]
            found |= {n: found[n][part] for n in ("z", "residual") if n in found}
        found |= {"y": y, "running_mean": running[0], "running_var": running[1]}
        results.append({n: t.detach().double().cpu() for n, t in found.items()})
    # What the gradient of z is made of before most of it may cancel.
    dims = [d for d in range(z.dim()) if d != 1]
    terms = dy.double().abs().amax(dims) * weight.double() * 1.5 / z.double().std(dims, correction=0)
    return *results, {"z": terms.max().cpu()}


def of_the_whole_batch(rank: int, world: int, device: torch.device) -> list[dict[str, Tensor]]:
    """What is left of training in one process with all batches, and of ours with SyncBatchNorms in each of several.

    Batches are of one size, so that the mean of the processes' gradients is that of the whole batch.
    """
    dtype = torch.float64
    torch.manual_seed(10)  # of the weights, in all processes
    plain, ours = networks(torch.Generator().manual_seed(7), "cpu", dtype)
    models = ours, fcb.fuse(copy.deepcopy(plain))
    parts = zip(*(data_of(r, device, dtype) for r in range(world)), strict=True)
    whole_batches = [(torch.cat([x for x, _ in part]), torch.cat([t for _, t in part])) for part in parts]
    found = [train(plain.to(device), whole_batches)]
    for model in models:
        state = ddp_sync_batch_norm(model.to(device), data_of(rank, device, dtype), device)
        found.append({name.replace("module.", "", 1): t for name, t in state.items()})
    return found


class Fused(torch.utils._python_dispatch.TorchDispatchMode):
    """Whether an op of this package ran."""

    ran = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran |= func.namespace == "fused_conv_bn"
        return func(*args, **(kwargs or {}))


def run(rank: int, world: int, device_type: str, folder: str) -> None:
    """Writes (plain, of ConvBnScale2d, plain and fuse()) of every run, or the error, to the folder."""
    torch.set_num_threads(1)
    conditions.LEAST_OF_STEPS = {True: 0, False: 0}  # whatever the size, as conftest.py has it for the other tests
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    backend = "nccl" if device_type == "cuda" else "gloo"
    options = {"device_id": device} if device_type == "cuda" else {}
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=world, **options)
    found: dict[str, Any] = {}
    try:
        for name, of in {**RUNS, **(CUDA_RUNS if device_type == "cuda" else {})}.items():
            torch._dynamo.reset()
            torch.manual_seed(10)  # of the weights, in all processes
            dtype = torch.float32 if name in IN_16_BITS else torch.float64
            plain, ours = networks(torch.Generator().manual_seed(7), "cpu", dtype)
            models = plain, ours, fcb.fuse(copy.deepcopy(plain))
            found[name] = [of(model.to(device), data_of(rank, device, dtype), device) for model in models]
        for name in SYNC_CASES:
            for dtype in (torch.float64, torch.float32):
                found[f"sync, {name}, {dtype}"] = sync_case(name, rank, device, dtype)
        if device_type == "cuda":  # as DDP takes SyncBatchNorms there alone
            found["the whole batch"] = of_the_whole_batch(rank, world, device)
        # Under a sharded block the fused op runs: its parameters are plain while it does.
        plain, ours = networks(torch.Generator().manual_seed(7), "cpu", torch.float64)
        found["fused"] = []
        for model in (ours, fcb.fuse(plain)):
            model = sharded(model.to(device), device)
            with torch.no_grad(), Fused() as fused:
                model(data_of(rank, device, torch.float64)[0][0])
            found["fused"].append(fused.ran)
    except Exception as error:
        sys.stderr.write(f"process {rank}, after {list(found)}\n")
        raise error
    finally:
        torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
