"""The modules against the models that they replace, whatever happens to its parameters behind its back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import error
from fused_conv_bn import ConvBnScale2d
from module_pairs import FUSED, Ops, Plain, Row, check, models, ops_of, randomize, rows, sample


def assign(owner: str, name: str) -> Callable[[ConvBnScale2d], None]:
    def change(module: ConvBnScale2d) -> None:
        part = module.get_submodule(owner)
        old = getattr(part, name)
        new = old.detach() * 1.5 + 0.25
        setattr(part, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)

    return change


def write(owner: str, name: str, mode: Any = torch.no_grad) -> Callable[[ConvBnScale2d], None]:
    def change(module: ConvBnScale2d) -> None:
        with mode():
            getattr(module.get_submodule(owner), name).mul_(1.5).add_(0.25)

    return change


def write_data_then_eval(module: ConvBnScale2d) -> None:
    module.bn.running_mean.data.add_(1)
    module.bn.weight.data = module.bn.weight.data * 2
    module.eval()


def swap_data(module: ConvBnScale2d) -> None:
    module.bn.weight.data = module.bn.weight.data * 2


def write_data(owner: str, name: str) -> Callable[[ConvBnScale2d], None]:
    return lambda module: getattr(module.get_submodule(owner), name).data.mul_(1.5).add_(0.25)


def write_numpy(owner: str, name: str) -> Callable[[ConvBnScale2d], None]:
    def change(module: ConvBnScale2d) -> None:
        getattr(module.get_submodule(owner), name).detach().numpy()[...] *= 1.7

    return change


def write_alias(owner: str, name: str) -> Callable[[ConvBnScale2d], None]:
    """Through another tensor on the same memory, as collectives and shared memory do."""

    def change(module: ConvBnScale2d) -> None:
        tensor = getattr(module.get_submodule(owner), name)
        torch.from_dlpack(tensor.detach()).mul_(1.7)

    return change


def fused_step(kind: Any) -> Callable[[ConvBnScale2d], None]:
    """Fused optimisers write without raising a version."""

    def change(module: ConvBnScale2d) -> None:
        optimizer = kind(module.parameters(), lr=0.5, fused=True)
        with torch.enable_grad():
            module(torch.ones(2, 4, 9, 8)).sum().backward()
        optimizer.step()

    return change


def load(module: ConvBnScale2d, assign: bool = False) -> None:
    module.load_state_dict(
        {k: v * 2 if v.is_floating_point() else v for k, v in module.state_dict().items()}, assign=assign
    )


def step(module: ConvBnScale2d) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    with torch.enable_grad():
        module(torch.ones(2, 4, 9, 8)).sum().backward()
    optimizer.step()


def train_forward(module: ConvBnScale2d) -> None:
    with torch.no_grad():
        module.train()(torch.full((2, 4, 9, 8), 3.0))
    module.eval()


def train_bn_only(module: ConvBnScale2d) -> None:
    """Moves the statistics with no train() or eval() of the module itself."""
    module.bn.train()
    with torch.no_grad():
        module(torch.full((2, 4, 9, 8), 3.0))
    module.bn.eval()


def set_attribute(owner: str, name: str, value: Any) -> Callable[[ConvBnScale2d], None]:
    return lambda module: setattr(module.get_submodule(owner), name, value)


STATE = [("conv", "weight"), ("conv", "bias"), *(("bn", n) for n in ("weight", "bias", "running_mean", "running_var"))]
CHANGES: dict[str, Callable[[ConvBnScale2d], Any]] = {
    **{f"write {owner}.{name}": write(owner, name) for owner, name in STATE},
    **{f"inference write {owner}.{name}": write(owner, name, torch.inference_mode) for owner, name in STATE},
    **{f"assign {owner}.{name}": assign(owner, name) for owner, name in STATE},
    "write scaling_factor": write("", "scaling_factor"),
    "assign scaling_factor tensor": assign("", "scaling_factor"),
    "assign scaling_factor float": set_attribute("", "scaling_factor", 3.0),
    "eps": set_attribute("bn", "eps", 0.5),
    "drop bn.weight": set_attribute("bn", "weight", None),
    "drop conv.bias": set_attribute("conv", "bias", None),
    "new bn": lambda module: setattr(module, "bn", nn.BatchNorm2d(6).eval()),
    "activation": set_attribute("", "activation", "relu"),
    "load": load,
    "load by assignment": lambda module: load(module, assign=True),
    "data swapped": swap_data,
    **{f"write {owner}.{name}.data": write_data(owner, name) for owner, name in STATE},
    **{f"write {owner}.{name} by numpy": write_numpy(owner, name) for owner, name in STATE},
    **{f"write {owner}.{name}'s memory": write_alias(owner, name) for owner, name in STATE},
    "F.batch_norm": lambda module: F.batch_norm(
        torch.randn(9, 6) * 5 + 4, module.bn.running_mean, module.bn.running_var, training=True
    ),
    **{f"fused {kind.__name__}": fused_step(kind) for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)},
    "negative_slope": lambda module: (
        setattr(module, "activation", "leaky_relu"),
        setattr(module, "negative_slope", 0.5),
    ),
    "data written, then eval": write_data_then_eval,
    "optimizer step": step,
    "train forward": train_forward,
    "train forward of bn alone": train_bn_only,
    "half": lambda module: (module.half(), module.float()),
    "double": lambda module: module.double(),
    "apply": lambda module: module.apply(lambda m: write("", "running_var")(m) if m is module.bn else None),
    "reset": lambda module: module.bn.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_results_follow_every_change(change: str, generator: torch.Generator) -> None:
    _, ours = models(generator, scaling_factor=torch.tensor(1.7))
    x = sample(generator)
    with torch.no_grad():
        before = ours(x)
        CHANGES[change](ours)
        x = x.to(ours.conv.weight.dtype)
        y = ours(x)
        plain = Plain(4, 6, 3)
        plain.conv, plain.bn, plain.scaling_factor = ours.conv, ours.bn, ours.scaling_factor
        if change != "negative_slope":
            check(y, plain, x, None, ours.activation)
        else:
            torch.testing.assert_close(y, F.leaky_relu(plain(x), 0.5))
    if change not in ("half", "double"):
        # A change that left the results alone would prove nothing: far beyond rounding.
        assert error(y, before) > 1e-2


def test_float_scaling_factor_change(generator: torch.Generator) -> None:
    _, ours = models(generator)
    x = sample(generator)
    with torch.no_grad():
        before = ours(x)
        ours.scaling_factor = 3.4
        assert torch.equal(ours(x), before * 2)  # 1.7 * 2: only exponents differ


def write_to_list(module: ConvBnScale2d) -> None:
    module.conv.stride = [1, 1]
    module(torch.ones(2, 4, 9, 8))
    module(torch.ones(2, 4, 9, 8))
    module.conv.stride[0] = 2


CONFIGURATIONS: dict[str, Callable[[ConvBnScale2d], Any]] = {
    "stride": set_attribute("conv", "stride", (2, 1)),
    "stride in a list": write_to_list,
    "padding": set_attribute("conv", "padding", (0, 2)),
    "no padding": set_attribute("conv", "padding", "valid"),
    "uneven padding": lambda module: (
        setattr(module.conv, "weight", nn.Parameter(module.conv.weight[:, :, :2])),
        setattr(module.conv, "padding", "same"),
    ),
    "padding mode": set_attribute("conv", "padding_mode", "reflect"),
    "dilation": set_attribute("conv", "dilation", (1, 2)),
    "new conv": lambda module: setattr(module, "conv", nn.Conv2d(4, 6, 3)),
    "conv of another class": lambda module: setattr(module, "conv", nn.Sequential(nn.Conv2d(4, 6, 1))),
    "bn of another class": lambda module: setattr(module, "bn", nn.Identity()),
    "weights computed": lambda module: nn.utils.parametrizations.spectral_norm(module.conv),
    "hook": lambda module: module.conv.register_forward_hook(lambda m, args, y: y + 1),
    "hook before": lambda module: module.bn.register_forward_pre_hook(lambda m, args: args[0] + 1),
    "forward": lambda module: setattr(module.bn, "forward", lambda x: x * 2),
    "bn in training": lambda module: module.bn.train(),
}


@pytest.mark.parametrize("change", CONFIGURATIONS)
def test_every_configuration_is_seen(change: str, generator: torch.Generator) -> None:
    _, ours = models(generator, padding=1)
    x = sample(generator)
    with torch.no_grad():
        for _ in range(2):
            before = ours(x)
        CONFIGURATIONS[change](ours)
        plain = Plain(4, 6, 3, 1.7)
        plain.conv, plain.bn = copy.deepcopy(ours.conv), copy.deepcopy(ours.bn)
        for _ in range(2):
            y = ours(x)
            check(y, plain, x)
        assert y.shape != before.shape or error(y, before) > 1e-2


def test_calls_of_all_kinds_by_turns(generator: torch.Generator) -> None:
    """What serves one call does not serve one of another kind."""
    plain, ours = models(generator, padding=1, activation="silu")
    x, other = sample(generator), torch.randn(1, 4, 5, 9, generator=generator)
    full, row = torch.randn(ours(x).shape, generator=generator), torch.randn(1, 6, 1, 1, generator=generator)
    calls: dict[str, Callable[..., Tensor]] = {
        "plain": lambda m: m(x),
        "other shape": lambda m: m(other),
        "channels_last": lambda m: m(x.to(memory_format=torch.channels_last)),
        "residual": lambda m: m(x, full),
        "residual to broadcast": lambda m: m(x, row),
        "residual of another dtype": lambda m: m(x, full.double()),
        "float64": lambda m: m.double()(x.double()),
    }

    def truth(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = copy.deepcopy(plain).double()(x.double())
        return F.silu(y if residual is None else y + residual.double())

    for name in [*calls, *reversed(calls), *calls]:
        with torch.no_grad():
            y = calls[name](ours)
            expected = truth(x) if name == "float64" else calls[name](truth)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        assert y.dtype == (torch.float64 if name in ("float64", "residual of another dtype") else torch.float32)
        ours.float()
        assert ours(x).requires_grad and not y.requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == torch.bfloat16


def test_nothing_is_kept(device: str, generator: torch.Generator) -> None:
    """A call is one op, the first as the last, and leaves the module as it was."""
    for factor in (1.7, torch.tensor(1.7)):
        _, ours = models(generator, device, scaling_factor=factor)
        before = {name: id(value) for name, value in vars(ours).items()}
        x = sample(generator, device)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            for _ in range(2):
                with mode(), Ops() as ops:
                    ours(x)
                assert [name for name in ops.names if "fused_conv_bn" in name] == [FUSED]
                assert len(ops.names) == 1 or isinstance(factor, Tensor) or mode is torch.enable_grad
        assert {name: id(value) for name, value in vars(ours).items()} == before


def test_inference_tensors(generator: torch.Generator) -> None:
    """They keep no version, so nothing tells of a write."""
    with torch.inference_mode():
        ours = ConvBnScale2d(4, 6, 3, 1.7).eval()
        randomize(ours, generator)
    x = sample(generator)
    assert ours.bn.weight.is_inference()
    with torch.inference_mode():
        before = ours(x)
        ours.bn.running_mean.add_(1)
        plain = Plain(4, 6, 3, 1.7)
        plain.conv, plain.bn = ours.conv, ours.bn
        y = ours(x)
        check(y, plain, x)
        assert error(y, before) > 1e-2
    assert ops_of(ours, x).count(FUSED) == 1


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch_round_trip(module),
}


def torch_round_trip(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@rows
@pytest.mark.parametrize("how", COPIES)
def test_copies(row: Row, how: str, device: str, generator: torch.Generator) -> None:
    _, ours = models(generator, device, activation="silu", scaling_factor=torch.tensor(1.7), row=row)
    x = sample(generator, device, row=row)
    with torch.no_grad():
        y = ours(x)
        twin = COPIES[how](ours)
        assert type(twin) is row.of and torch.equal(twin(x), y) and repr(twin) == repr(ours)
        twin.bn.running_mean.add_(1)
        twin.scaling_factor.mul_(2)
        assert error(twin(x), y) > 1e-2
        assert torch.equal(ours(x), y)
        ours.bn.bias.add_(1)
        assert error(ours(x), y) > 1e-2


def test_moves(two_gpus: tuple[str, str], generator: torch.Generator) -> None:
    plain, ours = models(generator)
    x = sample(generator)
    with torch.no_grad():
        for place in (two_gpus[0], two_gpus[1], "cpu"):
            y = ours.to(place)(x.to(place))
            assert y.device == torch.device(place)
            check(y, plain.to(place), x.to(place))


def test_moves_to_cuda_and_back(device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator)
    x = sample(generator)
    with torch.no_grad():
        for place in (device, "cpu"):
            ours(x.to(ours.conv.weight.device))
            y = ours.to(place)(x.to(place))
            check(y, plain.to(place), x.to(place))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("warm", [False, True])
def test_cuda_graph(warm: bool, device: str, generator: torch.Generator) -> None:
    """A replay sees new parameters, as the plain model's would."""
    plain, ours = models(generator, device)
    x = sample(generator, device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        plain(x)  # cuDNN and its workspace are set up outside the capture
        if warm:
            ours(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = ours(x)
        check(ours(x), plain, x)  # before any replay
        for _ in range(2):
            for module in (plain, ours):
                module.bn.running_mean.add_(1)
                module.conv.bias.mul_(2)
            x.copy_(sample(generator))
            graph.replay()
            torch.cuda.synchronize()
            check(y, plain, x)
