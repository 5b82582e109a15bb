"""Calls whose memory runs out at one allocation after another: what the process of test_cuda_memory.py runs.

A limit on what PyTorch may take from the GPU goes up by an allocator's step at a time, until a call has enough. It is a process
of its own since the limit holds for all of it, and needs pytest for nothing.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

import fused_conv_bn as fcb  # noqa: E402
from common import random_bn  # noqa: E402
from fused_conv_bn import conditions  # noqa: E402
from fused_conv_bn._memory import ran_out  # noqa: E402
from small_network import Network, random_statistics  # noqa: E402

STEP = 4 << 20
"""Bytes. From 10 MiB on a tensor has memory of its own, so that what is large here is larger than that."""
STEP_OF_MODELS = 12 << 20
"""The same where a call has many of them."""
MOST_STEPS = 200
OTHER_WORDS = "PyTorch could not", "when stream is capturing"
"""Of an op that PyTorch's convolution failed in, and of an allocator that asks the driver in a capture."""
KEPT = 64 << 10
"""Bytes that a model may keep of a call that failed: what blocks have for each channel."""


class Gpu:
    """The device, and its limit."""

    device = "cuda"

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        self.settle()
        return torch.cuda.memory_allocated()

    def run(self, call: Callable[[], Any], more: int) -> Any:
        """The call's result, with so many bytes more than what there is."""
        self.settle()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more) / total))
        try:
            return call()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


class Scenario(NamedTuple):
    """What is called again and again."""

    call: Callable[[], Any]
    """Returns tensors, in any structure."""
    model: nn.Module | None = None
    """Whose buffers a call may update. They are set back behind each one."""
    free: Callable[[], None] | None = None
    """What is to be done behind a call, so that nothing of it is left."""


def leaves(value: Any) -> list[Tensor]:
    return [t.detach() for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def on_cpu(m: nn.Module | None) -> dict[str, Tensor]:
    return {} if m is None else {name: t.detach().cpu().clone() for name, t in m.state_dict().items()}


def put_back(m: nn.Module | None, state: dict[str, Tensor]) -> None:
    if m is not None:
        for name, t in m.state_dict().items():
            t.copy_(state[name])


def assert_near(got: Any, expected: list[Tensor], where: str) -> None:
    mine = leaves(got)
    assert len(mine) == len(expected), where
    for a, b in zip(mine, expected, strict=True):
        tolerance = 2e-2 if b.dtype == torch.float16 else 1e-3
        torch.testing.assert_close(
            a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.abs().max()), msg=lambda m: f"{where}: {m}"
        )


def assert_consistent(m: nn.Module | None, before: dict[str, Tensor], where: str) -> None:
    """A call that failed has changed statistics together, and has counted the batch that is in them. (PyTorch's BatchNorm
    counts a batch first, and may fail then.)"""
    now = on_cpu(m)
    changed = {name for name, t in now.items() if not torch.equal(t, before[name])}
    for name in changed:
        of, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        assert kind in ("running_mean", "running_var"), f"{where}: {name} has changed"
        mean, var, count = (
            ".".join(filter(None, (of, n))) for n in ("running_mean", "running_var", "num_batches_tracked")
        )
        assert {mean, var} <= changed, f"{where}: {mean} or {var} has changed alone"
        assert count not in now or count in changed, f"{where}: {count} has not"


def sweep(make: Callable[[], Scenario], is_first: bool, bytes_of_step: int, gpu: Any) -> dict[str, int]:
    """Calls with more memory each time, until one does not fail. is_first: each is the first of a new scenario."""
    scenario = make()
    before = on_cpu(scenario.model)
    expected = [t.clone() for t in leaves(scenario.call())]
    if scenario.free is not None:
        scenario.free()
    put_back(scenario.model, before)
    counts = {"failed": 0, "out of memory": 0}
    for step in range(MOST_STEPS):
        where = f"{step} x {bytes_of_step >> 20} MiB"
        if is_first:
            scenario = None  # type: ignore[assignment]  # its memory
            scenario = make()
        allocated = gpu.allocated()
        result, failed = None, True
        try:
            result = gpu.run(scenario.call, step * bytes_of_step)
            failed = False
        except RuntimeError as error:
            words = str(error).splitlines()[0]
            assert ran_out(error) or any(w in words for w in OTHER_WORDS), f"{where}: {type(error).__name__}: {words}"
            counts["failed"] += 1
            counts["out of memory"] += isinstance(error, torch.OutOfMemoryError)
        if failed:
            assert_consistent(scenario.model, before, where)
        else:
            assert_near(result, expected, f"{where}, it had enough")
            result = None
        if scenario.free is not None:
            scenario.free()
        kept = gpu.allocated() - allocated
        assert kept <= KEPT, f"{where}: {kept} bytes are still allocated"
        put_back(scenario.model, before)
        assert_near(scenario.call(), expected, f"{where}, without a limit")
        if scenario.free is not None:
            scenario.free()
        put_back(scenario.model, before)
        if not failed:
            return counts
    raise AssertionError(f"it fails with {MOST_STEPS * bytes_of_step >> 20} MiB more")


# ---- scenarios -------------------------------------------------------------------------------------------------------


class Made:
    """Tensors of a device, the same each time."""

    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(5)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def bn(self, channels: int) -> tuple[Tensor, ...]:
        mean, _, weight, bias = random_bn(channels, torch.float32, self.device, self.generator)
        return mean, torch.ones_like(mean) + mean.square(), weight, bias


class Statistics(nn.Module):
    """Of functions that update them."""

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)


def gradients_of(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return y, *torch.autograd.grad(y.float().square().mean(), inputs)


def bn_scale(made: Made) -> Scenario:
    x, bn = made.normal(8, 64, 97, 95)[:, :, 1:, 1:], made.bn(64)  # a view, which is copied
    return Scenario(lambda: fcb.bn_scale(x, *bn, 1.5, residual=x, activation="silu"))


def bn_scale_gradients(made: Made) -> Scenario:
    x, bn = made.normal(8, 64, 96, 96).requires_grad_(), made.bn(64)
    for t in bn[2:]:
        t.requires_grad_()
    return Scenario(lambda: gradients_of(fcb.bn_scale(x, *bn, 1.5, activation="silu"), x, *bn[2:]))


def bn_scale_train(made: Made) -> Scenario:
    x, (mean, var, *affine) = made.normal(8, 64, 96, 96), made.bn(64)
    of = Statistics(mean, var)
    return Scenario(lambda: fcb.bn_scale_train(x, mean, var, *affine, 1.5, 0.3, 1e-5, activation="relu"), of)


def bn_scale_train_gradients(made: Made) -> Scenario:
    x, (mean, var, *affine) = made.normal(8, 64, 96, 96).requires_grad_(), made.bn(64)
    for t in affine:
        t.requires_grad_()

    def call() -> Any:
        y = fcb.bn_scale_train(x, mean, var, *affine, 1.5, 0.3, 1e-5, residual=x, activation="gelu")
        return gradients_of(y, x, *affine)

    return Scenario(call, Statistics(mean, var))


def gate(made: Made) -> Scenario:
    x, g = made.normal(8, 64, 97, 96)[:, :, 1:], made.normal(8, 64, 1, 1)
    return Scenario(lambda: fcb.gate(x, g, residual=x, activation="relu"))


def pooling(made: Made) -> Scenario:
    x = made.normal(8, 64, 97, 96)[:, :, 1:]
    return Scenario(lambda: (fcb.max_pool2d(x, 3, 2, 1), fcb.spatial_mean(x)))


def cat(made: Made) -> Scenario:
    parts, bn = [made.normal(8, c, 97, 96)[:, :, 1:] for c in (40, 24)], made.bn(64)
    return Scenario(lambda: fcb.bn_scale_cat(parts, *bn, 1.5, activation="relu"))


# Of the input and the weight, the window, the dtype, and whether in channels_last.
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype, bool]] = {
    "stem": ((8, 3, 256, 256), (32, 3, 3, 3), (2, 1), torch.float32, False),
    "depthwise": ((16, 64, 96, 96), (64, 1, 3, 3), (1, 1, 1, 64), torch.float16, True),
    "gemm": ((16, 64, 96, 96), (64, 64, 3, 3), (1, 1), torch.float16, True),
    "PyTorch's": ((8, 64, 96, 96), (64, 64, 3, 3), (1, 1), torch.float32, False),
}


def operands_of(made: Made, name: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    size, of_weight, window, dtype, channels_last = CONVOLUTIONS[name]
    x, w = made.normal(*size, dtype=dtype), made.normal(*of_weight, dtype=dtype) / 8
    if channels_last:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    return x, w, window


def conv_bn_scale(name: str) -> Callable[[Made], Scenario]:
    def make(made: Made) -> Scenario:
        x, w, window = operands_of(made, name)
        bn = made.bn(w.size(0))
        return Scenario(lambda: fcb.conv_bn_scale(x, w, None, *bn, 1.5, 1e-5, *window, activation="silu"))

    return make


def conv_bn_scale_train(name: str) -> Callable[[Made], Scenario]:
    def make(made: Made) -> Scenario:
        x, w, window = operands_of(made, name)
        mean, var, *affine = made.bn(w.size(0))
        for t in (x, w, *affine):
            t.requires_grad_()

        def call() -> Any:
            y = fcb.conv_bn_scale_train(x, w, None, mean, var, *affine, 1.5, 0.3, 1e-5, *window, activation="relu")
            return gradients_of(y, x, w, *affine)

        return Scenario(call, Statistics(mean, var))

    return make


def module(training: bool) -> Callable[[Made], Scenario]:
    def make(made: Made) -> Scenario:
        m = fcb.ConvBnScale2d(3, 64, 3, 1.5, padding=1, activation="relu")
        random_module(m, made)
        m.train(training)
        x = made.normal(8, 3, 128, 128)

        def call() -> Any:
            with torch.set_grad_enabled(training):
                return gradients_of(m(x), *m.parameters()) if training else m(x)

        return Scenario(call, m)

    return make


def random_module(m: nn.Module, made: Made) -> nn.Module:
    """With parameters of its own numbers, the same each time."""
    for p in m.parameters():
        p.data.copy_(torch.randn(p.shape, generator=made.generator) / max(p[0].numel(), 1) ** 0.5)
    return random_statistics(m, made.generator).to(made.device)


class Trained(nn.Module):
    """Groups of each kind in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv, self.second = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.alone = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.stem(x)))
        y = torch.nn.functional.silu(self.second(self.conv(x)) + x)
        return torch.nn.functional.gelu(self.alone(y) + x)


def fused(training: bool, made: Made) -> tuple[nn.Module, Callable[[], Any]]:
    """A model that was never called, and its call."""
    m = fcb.fuse(random_module(Trained() if training else Network(), made).train(training))
    x = made.normal(64, 3, 128, 128)

    def call() -> Any:
        with torch.set_grad_enabled(training):
            return gradients_of(m(x), *m.parameters()) if training else m(x)

    return m, call


def fused_first(training: bool) -> Callable[[Made], Scenario]:
    def make(made: Made) -> Scenario:
        m, call = fused(training, made)
        return Scenario(call, m)

    return make


def fused_later(training: bool) -> Callable[[Made], Scenario]:
    def make(made: Made) -> Scenario:
        m, call = fused(training, made)
        before = on_cpu(m)
        call()
        put_back(m, before)
        return Scenario(call, m)

    return make


def graphed_first(made: Made) -> Scenario:
    """Its warm-ups, its capture and a replay."""
    m, _ = fused(False, made)
    x = made.normal(64, 3, 128, 128)
    fast = fcb.graphed(m)

    def call() -> Any:
        with torch.no_grad():
            return fast(x)

    return Scenario(call, m, fast.clear)


def graphed_step(is_first: bool) -> Callable[[Made], Scenario]:
    """Forward and backward: of the capture of both, or of replays."""

    def make(made: Made) -> Scenario:
        m = fcb.fuse(random_module(Trained(), made).train())
        x = made.normal(64, 3, 128, 128)
        fast = fcb.graphed(m)

        def call() -> Any:
            m.zero_grad(set_to_none=True)
            y = fast(x)
            y.square().mean().backward()
            return y, [p.grad for p in m.parameters()]

        def free() -> None:
            m.zero_grad(set_to_none=True)
            if is_first:
                fast.clear()

        if not is_first:
            before = on_cpu(m)
            call()
            put_back(m, before)
            free()
        return Scenario(call, m, free)

    return make


def graphed_replay(made: Made) -> Scenario:
    """Whose results are copied."""
    m = random_module(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()), made)
    fast = fcb.graphed(fcb.fuse(m))
    x = made.normal(8, 3, 128, 128)

    def call() -> Any:
        with torch.no_grad():
            return fast(x)

    call()
    return Scenario(call, m)


SCENARIOS: dict[str, tuple[Callable[[Made], Scenario], bool]] = {
    "bn_scale": (bn_scale, False),
    "bn_scale, gradients": (bn_scale_gradients, False),
    "bn_scale_train": (bn_scale_train, False),
    "bn_scale_train, gradients": (bn_scale_train_gradients, False),
    "gate": (gate, False),
    "pooling": (pooling, False),
    "bn_scale_cat": (cat, False),
    **{f"conv_bn_scale, {name}": (conv_bn_scale(name), False) for name in CONVOLUTIONS},
    **{f"conv_bn_scale_train, {name}": (conv_bn_scale_train(name), False) for name in CONVOLUTIONS},
    "ConvBnScale2d": (module(False), False),
    "ConvBnScale2d, a step": (module(True), False),
    "fuse, a first call": (fused_first(False), True),
    "fuse, a later call": (fused_later(False), False),
    "fuse, a first step": (fused_first(True), True),
    "fuse, a later step": (fused_later(True), False),
    "graphed, a first call": (graphed_first, True),
    "graphed, a replay": (graphed_replay, False),
    "graphed, a first step": (graphed_step(True), True),
    "graphed, a later step": (graphed_step(False), False),
}
"""How each is made, and whether it is anew for each limit."""


def run(name: str, gpu: Any) -> dict[str, Any]:
    make, is_first = SCENARIOS[name]
    try:
        bytes_of_step = STEP_OF_MODELS if name.startswith(("fuse", "graphed")) else STEP
        return dict(sweep(lambda: make(Made(gpu.device)), is_first, bytes_of_step, gpu))
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def main() -> None:
    conditions.LEAST_OF_STEPS = {True: 0, False: 0}  # whatever the size, as conftest.py has it for the other tests
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    gpu = Gpu()
    gc.collect()
    gc.freeze()  # what there is now is not looked at again and again
    for name in SCENARIOS:
        print(json.dumps({name: run(name, gpu)}), flush=True)
        gpu.settle()


if __name__ == "__main__":
    main()
