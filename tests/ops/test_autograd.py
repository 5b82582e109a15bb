"""Gradients of the functions: right in value, of any order, and no dearer in memory than eager's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_conv_bn as fcb
from common import DTYPES, FEW, MANY, error, random_bn, saved_bytes
from fused_conv_bn import reference
from fused_conv_bn.reference import ACTIVATIONS

EPS = 1e-3
FACTOR = 1.7
RESIDUALS = ("none", "first", "last")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("no_leftover_graphs")


# ---- samples ---------------------------------------------------------------------------------------------------------

K = 6


def convolution_of(channels: int, generator: torch.Generator, size: int = 8) -> dict[str, Tensor]:
    return {
        "input": torch.randn(2, channels, size, size - 1, generator=generator),
        "conv_weight": torch.randn(K, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5,
    }


def bn_tensors(generator: torch.Generator, *names: str) -> dict[str, Tensor]:
    mean, var, weight, bias = random_bn(K, torch.float32, "cpu", generator)
    made = {"running_mean": mean, "running_var": 0.1 + var, "weight": weight, "bias": bias}
    return {name: made[name] for name in names or made}


def bn_scale(f: Any, t: dict[str, Tensor], **epilogue: Any) -> Tensor:
    return f.bn_scale(
        t["input"], t["running_mean"], t["running_var"], t.get("weight"), t.get("bias"), FACTOR, EPS, **epilogue
    )


def scale_shift(f: Any, t: dict[str, Tensor], **epilogue: Any) -> Tensor:
    return f.scale_shift(t["input"], t.get("scale"), t.get("shift"), **epilogue)


def conv_scale_shift(f: Any, t: dict[str, Tensor], **epilogue: Any) -> Tensor:
    return f.conv_scale_shift(t["input"], t["conv_weight"], t.get("scale"), t.get("shift"), (1, 2), 1, 1, 1, **epilogue)


def conv_bn_scale(f: Any, t: dict[str, Tensor], **epilogue: Any) -> Tensor:
    bn = t["running_mean"], t["running_var"], t.get("weight"), t.get("bias"), FACTOR, EPS
    return f.conv_bn_scale(t["input"], t["conv_weight"], t.get("conv_bias"), *bn, (1, 2), 1, **epilogue)


def bn_scale_train(f: Any, t: dict[str, Tensor], **epilogue: Any) -> Tensor:
    running = t["running_mean"].clone(), t["running_var"].clone()
    return f.bn_scale_train(t["input"], *running, t.get("weight"), t.get("bias"), FACTOR, 0.1, EPS, **epilogue)


def conv_bn_scale_train(f: Any, t: dict[str, Tensor], **epilogue: Any) -> Tensor:
    bn = t["running_mean"].clone(), t["running_var"].clone(), t.get("weight"), t.get("bias"), FACTOR, 0.1, EPS
    return f.conv_bn_scale_train(t["input"], t["conv_weight"], t.get("conv_bias"), *bn, (1, 2), 1, **epilogue)


def affine(generator: torch.Generator) -> dict[str, Tensor]:
    return {"scale": torch.randn(K, generator=generator), "shift": torch.randn(K, generator=generator)}


def conv_bias(generator: torch.Generator) -> dict[str, Tensor]:
    return {"conv_bias": torch.randn(K, generator=generator)}


# name -> (call, its tensors)
OPS: dict[str, tuple[Callable[..., Tensor], Callable[[torch.Generator], dict[str, Tensor]]]] = {
    "bn_scale": (bn_scale, lambda g: {"input": torch.randn(2, K, 5, 4, generator=g), **bn_tensors(g)}),
    "bn_scale without affine": (
        bn_scale,
        lambda g: {"input": torch.randn(7, K, generator=g), **bn_tensors(g, "running_mean", "running_var")},
    ),
    "scale_shift": (scale_shift, lambda g: {"input": torch.randn(3, K, 9, generator=g), **affine(g)}),
    "scale_shift alone": (scale_shift, lambda g: {"input": torch.randn(3, K, 9, generator=g)}),
    **{
        f"{name}, {kind} terms": (call, lambda g, c=channels, extra=extra: {**convolution_of(c, g), **extra(g)})
        for kind, channels in (("few", FEW), ("many", MANY))
        for name, call, extra in (
            ("conv_scale_shift", conv_scale_shift, affine),
            ("conv_bn_scale", conv_bn_scale, lambda g: {**conv_bias(g), **bn_tensors(g)}),
            ("conv_bn_scale_train", conv_bn_scale_train, lambda g: {**conv_bias(g), **bn_tensors(g)}),
        )
    },
    "conv_bn_scale without biases": (
        conv_bn_scale,
        lambda g: {**convolution_of(FEW, g), **bn_tensors(g, "running_mean", "running_var", "weight")},
    ),
    "bn_scale_train": (bn_scale_train, lambda g: {"input": torch.randn(4, K, 5, 4, generator=g), **bn_tensors(g)}),
    "bn_scale_train without affine": (
        bn_scale_train,
        lambda g: {"input": torch.randn(9, K, 3, 2, 2, generator=g), **bn_tensors(g, "running_mean", "running_var")},
    ),
}
ops = pytest.mark.parametrize("op", OPS)
STATISTICS = ("running_mean", "running_var")


def differentiable(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name not in STATISTICS]


def cast(tensors: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """scale and shift are float32 with 16-bit inputs."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    return {k: t.to(device, wide if k in ("scale", "shift") else dtype) for k, t in tensors.items()}


def gradients(
    f: Any, call: Callable[..., Tensor], tensors: dict[str, Tensor], names: list[str], **epilogue: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and the gradients of ``names``, for a gradient of the result that is not constant."""
    leaves = {k: t.detach().clone().requires_grad_(k in names) for k, t in tensors.items()}
    residual = leaves.pop("residual", None)
    y = call(f, leaves, residual=residual, **epilogue)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y)
    y.backward(dy)
    if residual is not None:
        leaves["residual"] = residual
    return y.detach(), {name: leaves[name].grad for name in names}


def with_residual(
    call: Callable[..., Tensor], tensors: dict[str, Tensor], kind: str, generator: torch.Generator
) -> dict[str, Tensor]:
    if kind == "none":
        return tensors
    y = call(reference, tensors)
    return {**tensors, "residual": torch.randn(y.shape, generator=generator)}


def assert_close_to_eager(*results: Tensor, dtype: torch.dtype, what: str) -> None:
    """results: ours, eager's, the truth. At most twice eager's error in norm, or the rounding of a handful of steps that both
    take: a derivative is a few numbers, each the sum of products of four factors, and which of two such sums is the luckier
    is chance. For float64, eager's error is the larger one of float32's and float64's, which is off from the truth as
    well."""
    ours, *eager, truth = results
    u = DTYPES[dtype]
    # In float64 the truth is eager's own, in whose order of additions nobody else adds.
    steps = 12 if dtype == torch.float64 else 6 if u < 2.0**-20 else 2
    eagers = max(error(y, truth) / DTYPES[y.dtype if dtype == torch.float64 else dtype] for y in eager)
    allowed = (3 if dtype == torch.float64 else 2) * eagers + steps
    got = error(ours, truth) / u
    assert got <= allowed, f"{what}: error {got:.3g} unit roundoffs, allowed {allowed:.3g}, eager's {eagers:.3g}"


# ---- values ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("residual", RESIDUALS)
@ops
def test_gradients(op: str, residual: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """Of every tensor, with every activation, against the plain formula in float64, at most twice eager's error."""
    call, make = OPS[op]
    exact = {k: t.to(dtype).float() for k, t in with_residual(call, make(generator), residual, generator).items()}
    if "scale" in exact:
        exact |= {k: t for k, t in make(torch.Generator().manual_seed(3)).items() if k in ("scale", "shift")}
    names = differentiable(exact)
    for activation in ACTIVATIONS:
        epilogue = {"activation": activation, "negative_slope": 0.2, "residual_last": residual == "last"}
        y, got = gradients(fcb, call, cast(exact, device, dtype), names, **epilogue)
        yardstick = torch.float32 if dtype == torch.float64 else dtype
        yardsticks = {yardstick, dtype}
        eager = [gradients(reference, call, cast(exact, device, d), names, **epilogue)[1] for d in yardsticks]
        _, truth = gradients(reference, call, {k: t.double() for k, t in exact.items()}, names, **epilogue)
        assert y.dtype == dtype
        if activation == "hardsigmoid" and dtype == torch.float64:  # PyTorch's sixth is a float's
            truth |= {
                k: g / (6 * float(torch.tensor(1 / 6)))
                for k, g in truth.items()
                if k != "residual" or residual != "last"
            }
        for name in names:
            assert got[name].dtype == cast(exact, device, dtype)[name].dtype, name
            if name == "conv_bias" and "train" in op:  # zero, of which eager has only the rounding errors
                largest = max(float(e[name].abs().max()) for e in eager)
                assert got[name].abs().max() <= 2 * largest + 200 * DTYPES[dtype]
                continue
            results = got[name].cpu(), *(e[name].cpu() for e in eager), truth[name]
            assert_close_to_eager(*results, dtype=dtype, what=f"{activation}, {name}")


@dtypes
def test_gradient_of_fold_bn(dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    tensors = {**bn_tensors(generator), **conv_bias(generator)}
    exact = {k: t.to(dtype).float() for k, t in tensors.items()}

    def call(f: Any, t: dict[str, Tensor], residual: Any = None) -> Tensor:
        return torch.cat(f.fold_bn(*(t[k] for k in (*STATISTICS, "weight", "bias")), 1.7, EPS, t["conv_bias"]))

    names = list(tensors)
    y, got = gradients(fcb, call, {k: t.to(device, dtype) for k, t in exact.items()}, names)
    _, truth = gradients(reference, call, {k: t.double() for k, t in exact.items()}, names)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name in names:
        torch.testing.assert_close(got[name].cpu().double(), truth[name], rtol=16 * DTYPES[got[name].dtype], atol=1e-6)


@pytest.mark.parametrize("residual", RESIDUALS)
@ops
def test_each_gradient_alone(op: str, residual: str, device: str, generator: torch.Generator) -> None:
    """What is not asked for changes nothing about what is."""
    call, make = OPS[op]
    tensors = cast(with_residual(call, make(generator), residual, generator), device, torch.float32)
    for activation in ("none", "relu", "silu", "sigmoid"):
        epilogue = {"activation": activation, "residual_last": residual == "last"}
        _, together = gradients(fcb, call, tensors, differentiable(tensors), **epilogue)
        for name in differentiable(tensors):
            _, alone = gradients(fcb, call, tensors, [name], **epilogue)
            if name == "conv_bias" and "train" in op:
                assert alone[name].abs().max() < 1e-4
            else:
                torch.testing.assert_close(
                    alone[name], together[name], msg=lambda m, n=name, a=activation: f"{n}, {a}: {m}"
                )


@pytest.mark.parametrize(
    "name", ["bn_scale", "conv_bn_scale, few terms", "bn_scale_train", "conv_bn_scale_train, many terms"]
)
def test_statistics_that_require_grad(name: str, generator: torch.Generator) -> None:
    """PyTorch's ops run, and refuse."""
    call, make = OPS[name]
    tensors = make(generator)
    tensors["running_var"].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_var'"):
        call(fcb, tensors)


@pytest.mark.parametrize("kind", ["few", "many"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("of_bias", [torch.bfloat16, torch.float32], ids=str)
def test_16_bit_convolution_with_float32_bn(
    kind: str, train: bool, of_bias: torch.dtype, device: str, generator: torch.Generator
) -> None:
    """Over 16 problems: of one, a gradient's error is chance. A convolution's bias may be float32 as well, which PyTorch's
    convolution does not take."""
    call, make = OPS[f"conv_bn_scale{'_train' if train else ''}, {kind} terms"]
    squares: dict[str, list[float]] = {}
    for _ in range(16):
        tensors = make(generator)
        half = {
            k: t.to(device, torch.bfloat16 if k in ("input", "conv_weight", "conv_bias") else t.dtype)
            for k, t in tensors.items()
        }
        names = [name for name in differentiable(tensors) if name != "conv_bias" or not train]
        _, got = gradients(fcb, call, {**half, "conv_bias": half["conv_bias"].to(of_bias)}, names, activation="gelu")
        _, eager = gradients(reference, call, half, names, activation="gelu")
        exact = {k: t.double().cpu() for k, t in half.items()}
        _, truth = gradients(reference, call, exact, names, activation="gelu")
        for name in names:
            assert got[name].dtype == (of_bias if name == "conv_bias" else half[name].dtype)
            sums = squares.setdefault(name, [0.0, 0.0])
            for i, g in enumerate((got, eager)):
                sums[i] += error(g[name].cpu(), truth[name]) ** 2 / 16
    for name, (ours, eagers) in squares.items():
        assert ours**0.5 <= 2 * eagers**0.5 + 2**-9, (name, ours**0.5, eagers**0.5)


@ops
def test_memory_formats(op: str, device: str, generator: torch.Generator) -> None:
    call, make = OPS[op]
    tensors = cast(make(generator), device, torch.float32)
    if tensors["input"].dim() != 4:
        return
    names = differentiable(tensors)
    _, expected = gradients(fcb, call, tensors, names, activation="silu")
    last = {k: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for k, t in tensors.items()}
    _, got = gradients(fcb, call, last, names, activation="silu")
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_empty_batches(device: str, generator: torch.Generator) -> None:
    for op in ("bn_scale", "scale_shift", "conv_bn_scale, few terms", "conv_bn_scale, many terms"):
        call, make = OPS[op]
        tensors = cast(make(generator), device, torch.float32)
        tensors["input"] = tensors["input"][:0]
        y, got = gradients(fcb, call, tensors, differentiable(tensors), activation="silu")
        _, expected = gradients(reference, call, tensors, differentiable(tensors), activation="silu")
        assert y.numel() == 0
        for name in got:
            assert torch.equal(got[name], expected[name])


def test_input_as_its_own_residual(device: str, generator: torch.Generator) -> None:
    """One tensor in two places: its gradients add up, also where the formula is differentiated."""
    x = torch.randn(2, K, 4, 4, generator=generator).to(device, torch.float64).requires_grad_()
    bn = [t.to(device, torch.float64) for t in random_bn(K, torch.float32, "cpu", generator)]
    for create_graph in (False, True):
        for activation in ("relu", "silu"):
            (got,) = torch.autograd.grad(
                fcb.bn_scale(x, *bn, residual=x, activation=activation).square().sum(), x, create_graph=create_graph
            )
            (expected,) = torch.autograd.grad(
                reference.bn_scale(x, *bn, residual=x, activation=activation).square().sum(), x
            )
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["bn_scale", "bn_scale_train", "conv_bn_scale", "conv_bn_scale_train"])
def test_bias_without_weight(device: str, name: str, generator: torch.Generator) -> None:
    """By the twins, and as a backward that is differentiated has it. F.batch_norm's second derivatives raise there on every
    device; its first are wrong on CUDA alone, so that those here can fail on CUDA alone."""
    tensors = {k: t for k, t in SMALL[name](generator).items() if k != "weight"}
    names = differentiable(tensors)
    found = []
    for f, where in ((reference, "cpu"), (reference, device), (fcb, device)):
        t = {k: v.to(where, torch.float64, copy=True) for k, v in tensors.items()}
        leaves = [t[k].requires_grad_() for k in names]
        first = torch.autograd.grad(CALLS[name](f, t).sigmoid().square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([g.detach().cpu() for g in (*first, *second)])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0])


# ---- higher derivatives and transforms ---------------------------------------------------------------------------------

SMALL: dict[str, Callable[[torch.Generator], dict[str, Tensor]]] = {
    "bn_scale": lambda g: {"input": torch.randn(2, K, 2, generator=g), **bn_tensors(g)},
    "scale_shift": lambda g: {"input": torch.randn(2, K, 2, generator=g), **affine(g)},
    "bn_scale_train": lambda g: {"input": torch.randn(3, K, 2, generator=g), **bn_tensors(g)},
    "conv_scale_shift": lambda g: {**convolution_of(2, g, 4), **affine(g)},
    "conv_bn_scale": lambda g: {**convolution_of(2, g, 4), **conv_bias(g), **bn_tensors(g)},
    "conv_bn_scale_train": lambda g: {**convolution_of(2, g, 4), **conv_bias(g), **bn_tensors(g)},
}
CALLS = {
    "bn_scale": bn_scale,
    "scale_shift": scale_shift,
    "bn_scale_train": bn_scale_train,
    "conv_scale_shift": conv_scale_shift,
    "conv_bn_scale": conv_bn_scale,
    "conv_bn_scale_train": conv_bn_scale_train,
}


def function_of(
    name: str, residual: str, activation: str, generator: torch.Generator, f: Any = fcb
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of the tensors that may require a gradient, in float64, and these."""
    tensors = {k: t.double() for k, t in SMALL[name](generator).items()}
    tensors = {k: t.double() for k, t in with_residual(CALLS[name], tensors, residual, generator).items()}
    names = differentiable(tensors)
    fixed = {k: t for k, t in tensors.items() if k not in names}

    def function(*values: Tensor) -> Tensor:
        named = {**fixed, **dict(zip(names, values, strict=True))}
        last = residual == "last"
        return CALLS[name](f, named, residual=named.pop("residual", None), activation=activation, residual_last=last)

    return function, [tensors[k].requires_grad_() for k in names]


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu", "sigmoid", "tanh", "gelu"])
@pytest.mark.parametrize("name", SMALL)
def test_gradgradcheck(name: str, activation: str, generator: torch.Generator) -> None:
    for residual in RESIDUALS if activation in ("relu", "silu", "sigmoid") else ("first",):
        function, values = function_of(name, residual, activation, generator)
        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("which", ["input alone", "all but the input"])
@pytest.mark.parametrize("name", SMALL)
def test_gradgradcheck_of_some(name: str, which: str, generator: torch.Generator) -> None:
    function, values = function_of(name, "first", "silu", generator)
    for i, value in enumerate(values):
        value.requires_grad_((i == 0) == (which == "input alone"))
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: torch.func.grad(lambda *v: f(*v).square().sum()),
    "grad of grad": lambda f: torch.func.grad(
        lambda *v: torch.func.grad(lambda *u: f(*u).square().sum())(*v).square().sum()
    ),
    "vjp": lambda f: lambda *v: torch.func.vjp(f, *v)[1](torch.ones_like(f(*v))),
    "jvp": lambda f: lambda *v: torch.func.jvp(f, v, tuple(torch.ones_like(u) for u in v)),
    "jacrev": lambda f: torch.func.jacrev(f),
    "vmap of grad": lambda f: (
        lambda *v: torch.vmap(torch.func.grad(lambda u: f(u, *v[1:]).sum()))(torch.stack([v[0], v[0] * 2]))
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", SMALL)
def test_transforms(name: str, transform: str, generator: torch.Generator) -> None:
    function, values = function_of(name, "first", "silu", generator)
    plain, _ = function_of(name, "first", "silu", generator.manual_seed(20), reference)
    function_, _ = function_of(name, "first", "silu", generator.manual_seed(20), fcb)
    values = [v.detach() for v in values]
    if transform == "vmap of grad" and "train" in name:
        pytest.skip("running statistics cannot be batched, PyTorch says")
    got, expected = TRANSFORMS[transform](function_)(*values), TRANSFORMS[transform](plain)(*values)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["bn_scale", "scale_shift", "conv_scale_shift", "conv_bn_scale"])
def test_compiled_transforms(name: str, generator: torch.Generator) -> None:
    """A gradient that is zero without an error would pass every test but this one."""
    function, values = function_of(name, "first", "silu", generator)
    values = [v.detach() for v in values]

    def grad(*v: Tensor) -> Any:
        return torch.func.grad(lambda *u: function(*u).square().sum())(*v)

    expected = grad(*values)
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.compile(grad, backend="aot_eager")(*values), expected)
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(torch.func.grad(lambda *u: compiled(*u).square().sum())(*values), expected)


@pytest.mark.parametrize("name", SMALL)
def test_batched_backward(name: str, generator: torch.Generator) -> None:
    function, values = function_of(name, "first", "silu", generator)
    y = function(*values)
    dy = torch.randn(3, *y.shape, generator=generator, dtype=y.dtype)
    got = torch.autograd.grad(y, values, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(y, values, dy[i], retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[i], b)


# ---- the graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@ops
def test_writes_to_the_result(op: str, activation: str, generator: torch.Generator) -> None:
    """After relu, sigmoid and tanh autograd refuses, as in eager; after the others the gradient is right."""
    call, make = OPS[op]
    tensors = make(generator)

    def run(f: Any, write: bool) -> list[Tensor]:
        leaves = {k: t.clone().requires_grad_(k not in STATISTICS) for k, t in tensors.items()}
        y = call(f, leaves, activation=activation)
        if write:
            y.mul_(2)
        return list(torch.autograd.grad(y.sum(), [leaves[k] for k in differentiable(tensors)]))

    if activation in ("relu", "sigmoid", "tanh"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(fcb, True)
        return
    for name, a, b in zip(differentiable(tensors), run(fcb, True), run(fcb, False), strict=True):
        if not (name == "conv_bias" and "train" in op):
            torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("which", ["input", "weight", "conv_weight", "bias"])
def test_writes_to_what_was_saved(which: str, generator: torch.Generator) -> None:
    call, make = OPS["conv_bn_scale, few terms"]
    tensors = {k: t.clone().requires_grad_(k not in STATISTICS) for k, t in make(generator).items()}
    y = call(fcb, tensors, activation="silu")
    with torch.no_grad():
        tensors[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@ops
def test_backward_twice(op: str, device: str, generator: torch.Generator) -> None:
    call, make = OPS[op]
    tensors = cast(make(generator), device, torch.float32)
    leaves = {k: t.requires_grad_(k not in STATISTICS) for k, t in tensors.items()}
    wanted = [leaves[k] for k in differentiable(tensors)]
    y = call(fcb, leaves, activation="silu").square().sum()
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    second = torch.autograd.grad(y, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@ops
def test_checkpoint(op: str, reentrant: bool, device: str, generator: torch.Generator) -> None:
    call, make = OPS[op]
    tensors = cast(make(generator), device, torch.float32)
    leaves = {k: t.requires_grad_(k not in STATISTICS) for k, t in tensors.items()}
    wanted = [leaves[k] for k in differentiable(tensors)]

    def run(x: Tensor) -> Tensor:
        return call(fcb, {**leaves, "input": x}, activation="silu").square().sum()

    expected = torch.autograd.grad(run(leaves["input"]), wanted)
    checkpoint(run, leaves["input"], use_reentrant=reentrant).backward()
    for a, b in zip(wanted, expected, strict=True):
        assert torch.equal(a.grad, b)


@pytest.mark.parametrize("residual", RESIDUALS)
@ops
def test_memory(op: str, residual: str, device: str, generator: torch.Generator) -> None:
    """At most eager's, whatever requires a gradient."""
    call, make = OPS[op]
    tensors = cast(with_residual(call, make(generator), residual, generator), device, torch.float32)
    everything = differentiable(tensors)
    for names in (everything, ["input"], [everything[-1]]):
        for activation in ACTIVATIONS:
            leaves = {k: t.detach().requires_grad_(k in names) for k, t in tensors.items()}
            r = leaves.pop("residual", None)
            epilogue = {"residual": r, "activation": activation, "residual_last": residual == "last"}
            ours, eagers = (saved_bytes(lambda f=f, e=epilogue, t=leaves: call(f, t, **e)) for f in (fcb, reference))
            assert ours <= eagers, (names, activation)


# ---- warnings and errors ---------------------------------------------------------------------------------------------


def test_no_warning_about_a_missing_derivative(device: str, generator: torch.Generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op, (call, make) in OPS.items():
            tensors = cast(make(generator), device, torch.float32)
            _, got = gradients(fcb, call, tensors, differentiable(tensors), activation="mish")
            assert all(g is not None for g in got.values()), op


_UNKNOWN_ACTIVATION: dict[str, Callable[..., Tensor]] = {
    "bn_scale": lambda x, w, c: fcb.bn_scale(x, c, c, activation="elu"),
    "scale_shift": lambda x, w, c: fcb.scale_shift(x, c, c, activation="elu"),
    "conv_scale_shift": lambda x, w, c: fcb.conv_scale_shift(x, w, c, c, activation="elu"),
    "conv_bn_scale": lambda x, w, c: fcb.conv_bn_scale(x, w, None, c, c, activation="elu"),
    "bn_scale_train": lambda x, w, c: fcb.bn_scale_train(x, c, c, activation="elu"),
    "conv_bn_scale_train": lambda x, w, c: fcb.conv_bn_scale_train(x, w, None, c, c, activation="elu"),
}


@pytest.mark.parametrize("transformed", [False, True], ids=["op", "transform"])
@pytest.mark.parametrize("name", _UNKNOWN_ACTIVATION)
def test_an_unknown_activation_is_one_error_whatever_runs(name: str, transformed: bool) -> None:
    def call(x: Tensor) -> Tensor:
        return _UNKNOWN_ACTIVATION[name](x, torch.ones(K, K, 1, 1), c).sum()

    c = torch.ones(K)
    with pytest.raises(RuntimeError, match=f"{name}: activation is 'elu', expected one of 'none', 'relu'"):
        (torch.func.grad(call) if transformed else call)(torch.ones(2, K, 2, 2))
    assert torch.equal(c, torch.ones(K)), "written before the argument was refused"
