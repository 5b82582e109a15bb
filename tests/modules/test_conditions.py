"""why_not(): what makes PyTorch's own ops run, each with the result that PyTorch's ops give."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_conv_bn as fcb
from common import random_bn
from fused_conv_bn.conditions import why_not
from module_pairs import CONV2D, ROWS, Row, rows, sample

C, K = 4, 6


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += "fused_conv_bn" in func.name()
        return func(*args, **(kwargs or {}))


def module(generator: torch.Generator, device: str = "cpu", row: Row = CONV2D, **kwargs: Any) -> Any:
    m = row.of(**row.arguments, scaling_factor=1.7, **kwargs)
    targets = m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias
    for target, value in zip(targets, random_bn(K, torch.float32, "cpu", generator), strict=True):
        if target is not None:
            target.data.copy_(value)
    return m.to(device).eval()


def layer_of(m: Any) -> Any:
    return m.linear if isinstance(m, fcb.LinearBnScale) else m.conv


def plain(m: Any, x: Tensor) -> Tensor:
    return m.bn(layer_of(m)(x)) * m.scaling_factor


@rows
def test_nothing_in_the_way(row: Row, device: str, generator: torch.Generator) -> None:
    m, x = module(generator, device, row), sample(generator, device, row=row)
    assert why_not(layer_of(m), m.bn) is None and why_not(layer_of(m), m.bn, x, None) is None
    for mode in (False, True):
        m.train(mode)
        for grad in (torch.no_grad, torch.enable_grad):
            with grad(), Log() as log:
                m(x)
            assert log.fused == 1


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    old = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def layer_plus_1(module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
    return y + 1 if type(module) in LAYERS else None


def plus_1(owner: Any, name: str) -> contextlib.AbstractContextManager[None]:
    """What it returns is one more, if it is a tensor."""
    old = getattr(owner, name, None)

    def new(*args: Any, **kwargs: Any) -> Any:
        y = old(*args, **kwargs)
        return y + 1 if isinstance(y, Tensor) else y

    return replaced(owner, name, new)


def another_class(m: Any) -> contextlib.AbstractContextManager[None]:
    layer = layer_of(m)
    mine = type("Mine", (type(layer),), {"forward": lambda self, x: type(layer).forward(self, x) + 1})
    row = next(row for row in ROWS.values() if row.of is type(m))
    return replaced(m, row.name, mine(**row.arguments))


_module, _call = nn.modules.module, nn.Module.__call__
LAYERS = {row.layer for row in ROWS.values()}
FUNCTIONS = {row.layer: row.layer.__name__.lower().replace("convtranspose", "conv_transpose") for row in ROWS.values()}
Circumstance = Callable[[Any], contextlib.AbstractContextManager[None]]
# What surrounds a call, and why_not()'s words.
CIRCUMSTANCES: dict[str, tuple[Circumstance, str]] = {
    "hook of the layer": (
        lambda m: hooked(layer_of(m).register_forward_hook, lambda k, a, y: y + 1),
        "has a hook",
    ),
    "pre-hook of bn": (lambda m: hooked(m.bn.register_forward_pre_hook, lambda k, a: a[0] + 1), "has a hook"),
    "backward hook": (lambda m: hooked(m.bn.register_full_backward_hook, lambda k, i, o: None), "has a hook"),
    "backward pre-hook": (
        lambda m: hooked(layer_of(m).register_full_backward_pre_hook, lambda k, o: None),
        "has a hook",
    ),
    "global hook": (lambda m: hooked(_module.register_module_forward_hook, layer_plus_1), "hook for all"),
    "global pre-hook": (
        lambda m: hooked(_module.register_module_forward_pre_hook, lambda k, a: None),
        "hook for all",
    ),
    "global backward hook": (
        lambda m: hooked(_module.register_module_full_backward_hook, lambda k, i, o: None),
        "hook for all",
    ),
    "global backward pre-hook": (
        lambda m: hooked(_module.register_module_full_backward_pre_hook, lambda k, o: None),
        "hook for all",
    ),
    "its forward": (lambda m: plus_1(layer_of(m), "forward"), "forward of its own"),
    "bn.forward": (lambda m: plus_1(m.bn, "forward"), "forward of its own"),
    "conv._conv_forward": (lambda m: plus_1(layer_of(m), "_conv_forward"), "forward of its own"),
    "bn._check_input_dim": (lambda m: replaced(m.bn, "_check_input_dim", lambda x: None), "forward of its own"),
    "its class' forward": (lambda m: plus_1(type(layer_of(m)), "forward"), "was replaced"),
    "what its class' forward calls": (lambda m: plus_1(type(layer_of(m)), m._pair.inner_name), "was replaced"),
    "BatchNorm's forward": (lambda m: plus_1(type(m.bn), "forward"), "was replaced"),
    "Module.__call__": (
        lambda m: replaced(nn.Module, "__call__", lambda s, *a, **k: _call(s, *a, **k)),
        "was replaced",
    ),
    "its function": (lambda m: plus_1(F, FUNCTIONS[type(layer_of(m))]), "was replaced"),
    "F.batch_norm": (lambda m: plus_1(F, "batch_norm"), "was replaced"),
    "its class": (another_class, "class Mine"),
    "forward-mode AD": (lambda m: torch.autograd.forward_ad.dual_level(), "forward-mode AD"),  # type: ignore[dict-item]
}


@rows
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_circumstances(row: Row, circumstance: str, grad: bool, device: str, generator: torch.Generator) -> None:
    """Each is seen as long as it lasts, in evaluation and in training, and what it does is done."""
    enter, words = CIRCUMSTANCES[circumstance]
    m, x = module(generator, device, row), sample(generator, device, row=row)
    layer = layer_of(m)
    for mode in (False, True):
        m.train(mode)
        twin = copy.deepcopy(m)
        with torch.set_grad_enabled(grad):
            before = m(x)
            with enter(m), Log() as log:
                layer_of(m).to(device)
                assert words in str(why_not(layer_of(m), m.bn, x, None))
                y = m(x)
            if circumstance == "its class":
                m._modules[row.name] = layer
            else:
                with enter(twin):
                    twin(x) if mode else None
                    expected = plain(twin, x)
                torch.testing.assert_close(y, expected)
        assert log.fused == 0 and why_not(layer_of(m), m.bn, x, None) is None
        del before


class Subclass(Tensor):
    pass


INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "subclass": lambda x: x.as_subclass(Subclass),
    "mkldnn": lambda x: x.to_mkldnn(),
    "one dimension more": lambda x: x[None],
    "one dimension less": lambda x: x[0],
    "one dimension": lambda x: x.flatten()[:4],
    "one value": lambda x: x[(slice(1), slice(None), *[slice(3)] * (x.dim() - 2))],
    "other channels": lambda x: x[:, :3],
    "other features": lambda x: torch.cat([x, x], -1),
    "no tensor": lambda x: (x, x),
    "None": lambda x: None,
    "smaller than the kernel": lambda x: x[..., :2],
    "no pixels": lambda x: x[..., :0],
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "integers": lambda x: x.int(),
    "complex": lambda x: x + 0j,
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "empty batch": lambda x: x[:0],
}


@rows
@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(row: Row, kind: str, grad: bool, mode: bool, device: str, generator: torch.Generator) -> None:
    """What PyTorch's ops take, they take; what they refuse, they refuse in their own words."""
    if kind in ("mkldnn", "sparse") and device == "cuda":
        pytest.skip("of the CPU")
    m = module(generator, device, row).train(mode)
    twin = copy.deepcopy(m)
    x = INPUTS[kind](sample(generator, device, row=row))

    def outcome(f: Callable[[], Any]) -> tuple[Any, Any]:
        try:
            return f(), None
        except Exception as error:
            return None, (type(error), str(error))

    with torch.set_grad_enabled(grad):
        (got, error), (expected, expected_error) = outcome(lambda: m(x)), outcome(lambda: plain(twin, x))
    assert error == expected_error
    if got is not None:
        assert type(got) is type(expected) and got.shape == expected.shape
        if got.layout is torch.strided and not got.is_meta:
            torch.testing.assert_close(got, expected)
    for a, b in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("kind", ["stride 0", "no channels", "no output channels", "negative padding", "one value"])
@pytest.mark.parametrize("mode", [False, True])
def test_configurations(kind: str, mode: bool, device: str, generator: torch.Generator) -> None:
    x = sample(generator, device)
    m = module(generator, device)
    if kind == "stride 0":
        m.conv.stride = (0, 1)
    elif kind == "negative padding":
        m.conv.padding = (-1, 0)
    elif kind == "one value":
        x = x[:1, :, :3, :3]
    else:
        channels = (0, K) if kind == "no channels" else (C, 0)
        m = fcb.ConvBnScale2d(*channels, 3, device=device)
        x = x[:, : channels[0]]
    m.train(mode)
    twin = copy.deepcopy(m)
    results: list[Any] = []
    with torch.no_grad():
        for f in (m, lambda x: plain(twin, x)):
            try:
                results.append(f(x))
            except Exception as error:
                results.append((type(error), str(error)))
    if isinstance(results[1], Tensor):
        torch.testing.assert_close(*results)
    else:
        assert results[0] == results[1]


@rows
def test_aliases_of_running_statistics(row: Row, device: str, generator: torch.Generator) -> None:
    """A fused op would read what it writes; PyTorch's ops read first."""
    x = sample(generator, device, row=row)

    def aliased(alias: str) -> Any:
        torch.manual_seed(0)
        m = module(torch.Generator().manual_seed(3), device, row)
        if alias == "part":
            memory = torch.linspace(0.1, 1, 2 * K, device=device)
            m.bn.running_mean, m.bn.bias = memory[:K], nn.Parameter(memory[K - 1 : -1])
        else:
            setattr(m.bn, alias, nn.Parameter(m.bn.running_mean, requires_grad=False))
        return m

    for alias in ("bias", "weight", "part"):
        m, twin = aliased(alias), aliased(alias)
        for mode in (True, False):
            m.train(mode)
            twin.train(mode)
            with torch.no_grad():
                torch.testing.assert_close(m(x), plain(twin, x))
            torch.testing.assert_close(m.bn.running_mean, twin.bn.running_mean)


@rows
def test_one_running_statistic_alone(row: Row, generator: torch.Generator) -> None:
    m, x = module(generator, row=row), sample(generator, row=row)
    m.bn.running_var = None
    assert "one of running_mean and running_var" in str(why_not(layer_of(m), m.bn, x, None))
    with pytest.raises(RuntimeError, match="running_var must be defined in evaluation mode"):
        m(x)


def test_residuals(device: str, generator: torch.Generator) -> None:
    m, x = module(generator, device), sample(generator, device)
    with torch.no_grad():
        y = m(x)
        for residual in (torch.ones(K, 1, 1), torch.ones(3, K, 1, 1), torch.ones(3, K, 7, 6).double()):
            residual = residual.to(device)
            torch.testing.assert_close(m(x, residual), y + residual, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="size of tensor"):
            m(x, torch.ones(4, K, 7, 6, device=device))


@rows
def test_replicas_of_data_parallel(row: Row, device: str, generator: torch.Generator) -> None:
    """Their parameters are plain attributes."""
    m, x = module(generator, device, row), sample(generator, device, row=row)
    replica = m._replicate_for_data_parallel()
    for name in (row.name, "bn"):
        part, original = getattr(m, name)._replicate_for_data_parallel(), getattr(m, name)
        for key, value in (*original.named_parameters(), *original.named_buffers()):
            part._parameters.pop(key, None)
            part._buffers.pop(key, None)
            vars(part)[key] = value
        replica._modules[name] = part
    with torch.no_grad(), Log() as log:
        torch.testing.assert_close(replica(x), m(x))
    assert log.fused == 2


def test_deepspeed_like_profiler_sees_the_calls(generator: torch.Generator) -> None:
    seen = []
    m, x, conv2d = module(generator), sample(generator), F.conv2d
    with torch.no_grad(), replaced(F, "conv2d", lambda *a, **k: seen.append("conv2d") or conv2d(*a, **k)):
        m(x)
    assert seen == ["conv2d"]


def test_cost(generator: torch.Generator) -> None:
    """A few microseconds; the limit allows for a busy machine."""
    import timeit

    m, x = module(generator), sample(generator)
    best = min(timeit.repeat(lambda: why_not(m.conv, m.bn, x, None), number=200, repeat=20)) / 200
    assert best < 30e-6
