"""What each process of test_dtensor.py runs: every op on DTensors, distributed in every way, against the whole tensors.

The processes are started anew and import this file, so that it needs pytest for nothing.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor

import fused_conv_bn as fcb
from common import random_bn
from fused_conv_bn import reference

CHANNELS, FILTERS = 8, 6
R, B, C = Replicate(), Shard(0), Shard(1)
Given = dict[str, Tensor | list[Tensor] | None]


def draws(channels: int, batch: int = 4) -> tuple[torch.Generator, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, CHANNELS, 6, 5, generator=generator, dtype=torch.float64)
    return generator, x, torch.randn(batch, channels, 6, 5, generator=generator, dtype=torch.float64)


def given(op: str, batch: int = 4) -> Given:
    """The tensors of a call, whole."""
    convolves = op.startswith("conv")
    channels = FILTERS if convolves else CHANNELS
    generator, x, residual = draws(channels, batch)
    mean, var, weight, bias = random_bn(channels, torch.float64, "cpu", generator)
    filters = torch.randn(FILTERS, CHANNELS, 3, 3, generator=generator, dtype=torch.float64)
    batch_norm: Given = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    if op == "fold_bn":
        return {**batch_norm, "conv_bias": bias + 1}
    if op == "bn_scale_cat":
        return {"inputs": [x[:, :5], x[:, 5:]], **batch_norm}
    if op in ("max_pool2d", "spatial_mean"):
        return {"input": x}
    if op == "squeeze_excite":
        w1, w2 = filters[:3, :, :1, :1], filters[:, :3, :1, :1]
        return {"input": x, "weight1": w1, "bias1": bias[:3], "weight2": w2, "bias2": filters[:, 0, 0, 0]}
    if op == "gate":
        return {"input": x, "gate": residual[:, :, 0, 0].contiguous(), "residual": residual}
    if op == "scale_shift":
        return {"input": x, "scale": weight, "shift": bias, "residual": residual}
    if op == "conv_scale_shift":
        return {"input": x, "weight": filters, "scale": weight, "shift": bias, "residual": residual}
    if convolves:
        return {"input": x, "conv_weight": filters, "conv_bias": bias - 1, **batch_norm, "residual": residual}
    return {"input": x, **batch_norm, "residual": residual}


def numbers(op: str) -> dict[str, Any]:
    if op == "max_pool2d":
        return {"kernel_size": 2, "stride": 2}
    if op in ("spatial_mean", "fold_bn"):
        return {"keepdim": True} if op == "spatial_mean" else {"scaling_factor": 2.0, "eps": 1e-3}
    found: dict[str, Any] = {"activation": "silu"}
    if "bn_scale" in op:
        found |= {"scaling_factor": 2.0, "eps": 1e-3}
    return found | ({"padding": 1} if op.startswith("conv") else {})


# Of a name and an op: how what is (N, C, ...), a convolution's weight, and what is per channel is distributed; and the
# result. Where a letter is missing, as the input.
IMAGES = ("input", "inputs", "residual", "gate")
Case = tuple[str, Placement, Placement, Placement]
CASES: dict[str, Case] = {}
for _op in ("bn_scale", "scale_shift", "gate", "max_pool2d", "spatial_mean", "bn_scale_cat"):
    CASES[f"{_op}, images"] = _op, B, R, B
    CASES[f"{_op}, channels"] = _op, C, B, R if _op == "bn_scale_cat" else C
    CASES[f"{_op}, whole"] = _op, R, R, R
    CASES[f"{_op}, rows"] = _op, Shard(2), R, R if "_" in _op and _op[-2:] in ("2d", "an") else Shard(2)
    CASES[f"{_op}, parts to be added up"] = _op, Partial(), R, R
CASES["bn_scale, channels of the input alone"] = "bn_scale", C, R, C
CASES["bn_scale, last dimension counted from behind"] = "bn_scale", Shard(-4), R, B
for _op in ("conv_scale_shift", "conv_bn_scale"):
    CASES[f"{_op}, images"] = _op, B, R, B
    CASES[f"{_op}, output channels"] = _op, R, B, C
    CASES[f"{_op}, output channels of what was distributed before"] = _op, C, B, C
    CASES[f"{_op}, images and output channels"] = _op, B, B, B
    CASES[f"{_op}, whole"] = _op, R, R, R
    CASES[f"{_op}, columns"] = _op, Shard(3), R, R
for _of, _images, _others in (
    ("images", B, R),
    ("all", B, B),
    ("channels", C, R),
    ("whole", R, R),
    ("rows", Shard(2), B),
):
    CASES[f"squeeze_excite, {_of}"] = "squeeze_excite", _images, _others, B if _images is B else R
CASES["squeeze_excite, parts to be added up"] = "squeeze_excite", Partial(), R, R
CASES["fold_bn, channels"] = "fold_bn", R, B, B
CASES["fold_bn, whole"] = "fold_bn", R, R, R
for _op in ("bn_scale_train", "conv_bn_scale_train"):
    CASES[f"{_op}, images"] = _op, B, R, R
    CASES[f"{_op}, channels"] = _op, R if _op.startswith("conv") else C, B, C
    CASES[f"{_op}, channels of statistics alone"] = _op, B, B, C
    CASES[f"{_op}, whole"] = _op, R, R, R

GRADIENTS = [name for name in CASES if not ("added up" in name or "fold" in name)]


def spread(mesh: DeviceMesh, tensors: Given, of_images: Placement, per_channel: Placement) -> Given:
    def one(name: str, t: Tensor) -> DTensor:
        placement = of_images if name in IMAGES else per_channel
        if isinstance(placement, Shard) and name == "gate" and placement.dim > 1:
            placement = Replicate()
        if isinstance(placement, Partial):  # the processes' parts add up to it
            part = t.clone() if dist.get_rank() == 0 else torch.zeros_like(t)
            return DTensor.from_local(part, mesh, [placement])
        return distribute_tensor(t.clone(), mesh, [placement])

    found: Given = {}
    for name, t in tensors.items():
        found[name] = [one(name, part) for part in t] if isinstance(t, list) else None if t is None else one(name, t)
    return found


def left(tensors: Given) -> dict[str, Tensor]:
    """The running statistics that a call leaves, and gradients."""
    found = {}
    for name, t in tensors.items():
        for i, of_name in enumerate(t if isinstance(t, list) else [t]):
            if of_name is not None:
                gradient = of_name.grad
                if name.startswith("running"):
                    found[name] = whole(of_name)
                if gradient is not None:
                    found[f"gradient of {name} {i}"] = whole(gradient)
    return found


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def tuple_of(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def evaluated(mesh: DeviceMesh, case: Case, raw: bool) -> dict[str, Any]:
    """(what came, where it lies, what was expected) of a call without gradients."""
    op, of_images, per_channel, placement = case
    tensors = given(op)
    want = tuple_of(getattr(reference, op)(**copy.deepcopy(tensors), **numbers(op)))
    parts = spread(mesh, tensors, of_images, per_channel)
    run = getattr(torch.ops.fused_conv_bn, op).default if raw else getattr(fcb, op)
    expected = copy.deepcopy(tensors)
    getattr(reference, op)(**expected, **numbers(op))
    with torch.no_grad():
        got = tuple_of(run(**parts, **numbers(op)))
    return {
        "got": [*map(whole, got), *left(parts).values()],
        "want": [*want, *left(expected).values()],
        "placements": [y.placements for y in got],
        "expected placements": [(placement,)] * len(got),
        "strides": [y.stride() for y in got],
        "expected strides": [y.stride() for y in want],
    }


def with_gradients(mesh: DeviceMesh, case: Case) -> dict[str, Any]:
    op, of_images, per_channel, placement = case
    tensors = given(op)
    parts = spread(mesh, tensors, of_images, per_channel)
    found: dict[str, Any] = {}
    for key, mine, run in (("want", tensors, getattr(reference, op)), ("got", parts, getattr(fcb, op))):
        for name, t in mine.items():
            for of_name in t if isinstance(t, list) else [t]:
                if of_name is not None and not name.startswith("running"):
                    of_name.requires_grad_()
        y = run(**mine, **numbers(op))
        if key == "got":
            found |= {"placements": [y.placements], "expected placements": [(placement,)]}
        (y * y * y).sum().backward()
        found[key] = [whole(y), *left(mine).values()]
        found[f"names of {key}"] = list(left(mine))
    assert len(found["got"]) > 1 and found["names of got"] == found["names of want"]
    return found


# ---- what is no call of one function ---------------------------------------------------------------------------------


def module_case(mesh: DeviceMesh, of_images: Placement, per_channel: Placement, train: bool, grad: bool) -> Any:
    generator, x, residual = draws(FILTERS)
    plain = nn.Conv2d(CHANNELS, FILTERS, 3, padding=1).double(), nn.BatchNorm2d(FILTERS).double()
    values = random_bn(FILTERS, torch.float64, "cpu", generator)
    with torch.no_grad():
        for t, value in zip((plain[1].running_mean, plain[1].running_var, *plain[1].parameters()), values, strict=True):
            t.copy_(value)
        for p in plain[0].parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    conv, bn = copy.deepcopy(plain)
    ours = fcb.ConvBnScale2d.from_modules(*plain, 2.0, activation="relu")

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, p in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(p.data, mesh, [per_channel])))
        for key, t in module.named_buffers(recurse=False):
            if t.dim():
                module.register_buffer(key, distribute_tensor(t, mesh, [per_channel]))

    distribute_module(ours, mesh, partition)
    for m in (conv, bn, ours):
        m.train(train)
    with torch.set_grad_enabled(grad):
        want = torch.relu(bn(conv(x)) * 2.0 + residual)
        got = ours(distribute_tensor(x, mesh, [of_images]), distribute_tensor(residual, mesh, [of_images]))
        if grad:
            (want * want).sum().backward()
            (got * got).sum().backward()
    pairs = [(got, want), (ours.bn.running_mean, bn.running_mean), (ours.bn.running_var, bn.running_var)]
    if grad:
        theirs = dict(conv.named_parameters(prefix="conv")) | dict(bn.named_parameters(prefix="bn"))
        pairs += [(p.grad, theirs[name].grad) for name, p in ours.named_parameters()]
    return {
        "got": [whole(t) for t, _ in pairs],
        "want": [t.detach() for _, t in pairs],
        "placements": [got.placements],
        "why": fcb.conditions.why_not(ours.conv, ours.bn, distribute_tensor(x, mesh, [of_images])),
    }


def model_case(mesh: DeviceMesh) -> dict[str, Any]:
    """A model of fuse(), distributed afterwards: its layers run by themselves."""
    generator, x, _ = draws(CHANNELS)
    torch.manual_seed(6)  # of the weights, in all processes
    plain = nn.Sequential(
        nn.Conv2d(CHANNELS, FILTERS, 3), nn.BatchNorm2d(FILTERS), nn.ReLU(), nn.Conv2d(FILTERS, 4, 1), nn.BatchNorm2d(4)
    )
    plain.double().eval()
    for bn in (plain[1], plain[4]):
        bn.running_var.uniform_(0.5, 2.0, generator=generator)
    ours = fcb.fuse(copy.deepcopy(plain))
    theirs = copy.deepcopy(plain)
    for model in (ours, theirs):
        distribute_module(model, mesh)
    x = distribute_tensor(x, mesh, [B])
    said = []
    for model in (ours, theirs):
        with torch.no_grad():
            said.append(message_of(lambda model=model: model(x)))
    assert said[0] == said[1]  # PyTorch 2.10 refuses most convolutions of DTensors
    if said[0] != "nothing":
        return {"got": [x], "want": [x]}
    with torch.no_grad():
        got, want = ours(x), plain(whole(x))
    return {"got": [whole(got)], "want": [want]}


def second_derivatives(mesh: DeviceMesh) -> dict[str, Any]:
    """Where PyTorch has those of a DTensor's part. Else they are refused."""
    found: dict[str, Any] = {"got": [], "want": []}
    for op, (of_images, per_channel) in itertools.product(("bn_scale", "conv_bn_scale"), ((B, R), (R, B))):
        tensors = given(op)
        for key, mine, run in (
            ("want", tensors, getattr(reference, op)),
            ("got", spread(mesh, tensors, of_images, per_channel), getattr(fcb, op)),
        ):
            inputs = [mine["input"].requires_grad_(), mine["weight"].requires_grad_()]
            y = run(**mine, **numbers(op))

            def second(y: Any = y, inputs: Any = inputs) -> list[Tensor]:
                first = torch.autograd.grad((y * y).sum(), inputs, create_graph=True)
                return [whole(t) for t in torch.autograd.grad(sum((t * t).sum() for t in first), inputs)]

            if key == "got" and torch_version() < (2, 13):
                assert "has no second derivatives of DTensors" in message_of(second)
                found[key] += found["want"][-2:]
            else:
                found[key] += second()
    return found


def torch_version() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


def two_dimensions() -> dict[str, Any]:
    """Images over one dimension of the mesh, output channels over the other; sizes that the mesh does not divide."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("images", "channels"))
    tensors = given("conv_bn_scale", batch=3)
    parts = {
        name: distribute_tensor(t, mesh, [B, R] if name == "input" else [B, C] if name == "residual" else [R, B])
        for name, t in tensors.items()
    }
    got = fcb.conv_bn_scale(**parts, **numbers("conv_bn_scale"))
    want = reference.conv_bn_scale(**tensors, **numbers("conv_bn_scale"))
    return {"got": [whole(got)], "want": [want], "placements": [got.placements], "expected placements": [(B, C)]}


def uneven(mesh: DeviceMesh, batch: int) -> dict[str, Any]:
    """Images that the processes do not divide, or of which some have none, and five channels."""
    found: dict[str, Any] = {"got": [], "want": [], "placements": [], "expected placements": []}
    for op in ("bn_scale", "conv_bn_scale", "max_pool2d"):
        tensors = given(op, batch)
        got = getattr(fcb, op)(**spread(mesh, tensors, B, R), **numbers(op))
        found["got"].append(whole(got))
        found["want"].append(getattr(reference, op)(**tensors, **numbers(op)))
        found["placements"].append(got.placements)
        found["expected placements"].append((B,))
    tensors = {name: t[:, :5] if t.dim() > 1 else t[:5] for name, t in given("bn_scale").items()}
    for one in (tensors, {name: t[:, :1] if t.dim() > 1 else t[:1] for name, t in tensors.items()}):
        got = fcb.bn_scale(**spread(mesh, one, C, B))
        found["got"].append(whole(got))
        found["want"].append(reference.bn_scale(**one))
        found["placements"].append(got.placements)
        found["expected placements"].append((C,) if got.shape[1] == 5 else (R,))
    return found


def other_calls_of_an_op(mesh: DeviceMesh) -> dict[str, Any]:
    """Numbers that change the result's shape, one after the other: nothing of an earlier call is left."""
    x = distribute_tensor(given("max_pool2d")["input"], mesh, [B])
    w = distribute_tensor(given("conv_scale_shift")["weight"], mesh, [R])
    calls: list[Callable[[Any, Any], Tensor]] = [
        *(lambda x, w, k=k: fcb.max_pool2d(x, k) for k in (2, 3)),
        *(lambda x, w, k=k: fcb.spatial_mean(x, keepdim=k) for k in (True, False)),
        *(lambda x, w, s=s: fcb.conv_scale_shift(x, w, None, None, s) for s in (1, 2)),
        lambda x, w: fcb.conv_scale_shift(x[:, :4].contiguous(), w[:, :4], None, None),
    ]
    with torch.no_grad():
        got = [call(x, w) for call in calls]
        want = [call(whole(x), whole(w)) for call in calls]
    return {
        "got": [whole(y) for y in got],
        "want": want,
        "placements": [y.placements for y in got],
        "expected placements": [(B,)] * len(got),
        "strides": [tuple(y.shape) for y in got],
        "expected strides": [tuple(y.shape) for y in want],
    }


def groups(mesh: DeviceMesh) -> dict[str, Any]:
    """Grouped convolutions are whole, and layouts stay: channels_last, which distribute_tensor() does not keep."""
    _, x, _ = draws(CHANNELS)
    x = x.to(memory_format=torch.channels_last)
    of_process = {R: x, B: x[dist.get_rank() * 2 : dist.get_rank() * 2 + 2]}
    w = torch.randn(CHANNELS, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scale = torch.rand(CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found: dict[str, Any] = {"got": [], "want": [], "placements": [], "expected placements": []}
    found |= {"strides": [], "expected strides": []}
    for of_images, per_channel, expected in ((R, B, R), (B, R, B)):
        parts = [distribute_tensor(t, mesh, [per_channel]) for t in (w, scale)]
        images = DTensor.from_local(of_process[of_images], mesh, [of_images])
        y = fcb.conv_scale_shift(images, *parts, None, 1, 1, 1, CHANNELS, activation="relu")
        want = reference.conv_scale_shift(x, w, scale, None, (1,), (1,), (1,), CHANNELS, activation="relu")
        found["got"].append(whole(y))
        found["want"].append(want)
        found["placements"].append(y.placements)
        found["expected placements"].append((expected,))
        found["strides"].append(y.stride())
        found["expected strides"].append(want.stride())
    return found


def in_place(mesh: DeviceMesh) -> dict[str, Any]:
    """What is written to stays where it is, with what is per channel redistributed."""
    tensors = given("bn_scale")
    want = reference.bn_scale(**tensors)
    found: dict[str, Any] = {"got": [], "want": [], "placements": [], "expected placements": []}
    for placement, form in itertools.product((R, B, C, Shard(2)), range(2)):
        parts = spread(mesh, tensors, placement, R)
        y = torch.empty_like(parts["input"]) if form else parts["input"]
        result = fcb.bn_scale(**parts, out=y) if form else fcb.bn_scale_(**parts)
        assert result is y
        found["got"].append(whole(y))
        found["want"].append(want)
        found["placements"].append(y.placements)
        found["expected placements"].append((placement,))
    return found


def functional(mesh: DeviceMesh) -> dict[str, Any]:
    """Raw ops with several results, with and without running statistics."""
    found: dict[str, Any] = {"got": [], "want": [], "placements": [], "expected placements": []}
    for op, keeps in itertools.product(("bn_scale_train", "conv_bn_scale_train"), (True, False)):
        tensors = given(op)
        if not keeps:
            tensors |= {"running_mean": None, "running_var": None}
        parts = spread(mesh, tensors, R if op.startswith("conv") else C, B)
        results = getattr(torch.ops.fused_conv_bn, f"{op}_functional").default(**parts, **numbers(op))
        found["got"] += map(whole, results)
        found["want"] += getattr(reference, f"{op}_functional")(**tensors, **numbers(op))
        found["placements"] += [y.placements for y in results]
        found["expected placements"] += [(C,), *[(B,)] * (4 if keeps else 2), *[(R,)] * (0 if keeps else 2)]
    return found


def compiled(mesh: DeviceMesh) -> dict[str, Any]:
    tensors = given("conv_bn_scale")
    parts = spread(mesh, tensors, B, R)

    def call(**tensors: Any) -> Tensor:
        return fcb.conv_bn_scale(**tensors, **numbers("conv_bn_scale"))

    with torch.no_grad():
        got = torch.compile(call, backend="aot_eager", fullgraph=True)(**parts)
    want = reference.conv_bn_scale(**tensors, **numbers("conv_bn_scale"))
    return {"got": [whole(got)], "want": [want], "placements": [got.placements], "expected placements": [(B,)]}


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "nothing"


def messages(mesh: DeviceMesh) -> dict[str, str]:
    tensors = given("bn_scale")
    parts = spread(mesh, tensors, B, R)
    other = init_device_mesh("cpu", (1, 2))
    added_up = spread(mesh, tensors, Partial(), R)
    train = spread(mesh, tensors, B, Partial())
    return {
        "plain": message_of(lambda: fcb.bn_scale(**{**parts, "weight": tensors["weight"]})),
        "mesh": message_of(
            lambda: fcb.bn_scale(**{**parts, "weight": distribute_tensor(tensors["weight"], other, [R, R])})
        ),
        "in place": message_of(lambda: fcb.bn_scale_(**added_up)),
        "statistics": message_of(lambda: fcb.bn_scale_train(**train)),
        "backward": message_of(lambda: torch.ops.fused_conv_bn.bn_moments(parts["input"])),
    }


def implicit(mesh: DeviceMesh) -> dict[str, Any]:
    from torch.distributed.tensor.experimental import implicit_replication

    tensors = given("bn_scale")
    parts = {**tensors, "input": distribute_tensor(tensors["input"], mesh, [B])}
    with implicit_replication():
        y = fcb.bn_scale(**parts)
    return {"got": [whole(y)], "want": [reference.bn_scale(**tensors)]}


def run(rank: int, world: int, folder: str) -> None:
    """Writes what every case found, or its error, to the folder."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": world, "timeout": timedelta(minutes=5)}
    dist.init_process_group("gloo", f"file://{folder}/store", **options)
    mesh = init_device_mesh("cpu", (world,))
    cases: dict[str, Callable[[], Any]] = {}
    for name, case in CASES.items():
        cases[f"function, {name}"] = lambda case=case: evaluated(mesh, case, False)
        cases[f"op, {name}"] = lambda case=case: evaluated(mesh, case, True)
        if name in GRADIENTS:
            cases[f"gradients, {name}"] = lambda case=case: with_gradients(mesh, case)
    for (of_images, per_channel), train, grad in itertools.product(((B, R), (R, B), (R, R)), (0, 1), (0, 1)):
        name = f"module, {of_images} {per_channel} {'train' if train else 'eval'} {'grad' if grad else 'no grad'}"
        cases[name] = lambda a=(of_images, per_channel, bool(train), bool(grad)): module_case(mesh, *a)
    cases |= {
        "model": lambda: model_case(mesh),
        "second derivatives": lambda: second_derivatives(mesh),
        "two dimensions": two_dimensions,
        "three images": lambda: uneven(mesh, 3),
        "one image": lambda: uneven(mesh, 1),
        "other calls of an op": lambda: other_calls_of_an_op(mesh),
        "groups": lambda: groups(mesh),
        "in place": lambda: in_place(mesh),
        "functional": lambda: functional(mesh),
        "compiled": lambda: compiled(mesh),
        "messages": lambda: messages(mesh),
        "implicit": lambda: implicit(mesh),
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception:
            found[name] = traceback.format_exc()
            break  # the others' collectives would not fit
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
