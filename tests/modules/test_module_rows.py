"""What is special to some of the modules, and that all of them are the same to the rest of PyTorch and to fuse()."""

from __future__ import annotations

import copy
import inspect
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn.conditions import why_not
from module_pairs import BN, BN_TRAIN, ROWS, Ops, Row, check, models, ops_of, randomize, residual_of, rows, sample

TRANSPOSED = {name: row for name, row in ROWS.items() if "transpose" in name}
transposed = pytest.mark.parametrize("row", TRANSPOSED.values(), ids=TRANSPOSED)


@transposed
@pytest.mark.parametrize("of", [list, tuple])
def test_output_size_as_the_second_argument(row: Row, of: type, generator: torch.Generator) -> None:
    """Where the layer has it, and the module its residual."""
    size = of(2 * s + 2 for s in row.size[2:])
    message = (
        f"{row.of.__name__}: residual is {size}, of type {of.__name__}, expected a tensor or None: an output size is"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)} passed as output_size={re.escape(str(size))}$"):
        row.of(**row.arguments)(sample(generator, row=row), size)


@transposed
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_output_size(grad: bool, training: bool, row: Row, generator: torch.Generator) -> None:
    plain, ours = models(generator, row=row, stride=2)
    x = sample(generator, row=row)
    size = [2 * s + 2 for s in row.size[2:]]  # the larger one of the two that lead to this input
    with torch.set_grad_enabled(grad):
        expected = plain.train(training)(x, output_size=size)
        y = ours.train(training)(x, output_size=size)
        assert list(y.shape[2:]) == size and y.requires_grad == grad
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        residual = torch.randn(y.shape, generator=generator)
        torch.testing.assert_close(ours(x, residual, size), plain(x, residual, output_size=size), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="requested an output size of"):
            ours(x, output_size=[2 * s + 9 for s in row.size[2:]])
        hook = ours.conv.register_forward_pre_hook(lambda m, args: None)
        torch.testing.assert_close(ours(x, None, size), plain(x, output_size=size), rtol=1e-4, atol=1e-4)
        hook.remove()
    torch.testing.assert_close(ours.bn.running_var, plain.bn.running_var) if not training else None


@transposed
def test_other_paddings_are_refused_as_by_the_layer(row: Row) -> None:
    with pytest.raises(ValueError, match='Only "zeros" padding mode is supported for ConvTranspose'):
        row.of(**row.arguments, padding_mode="reflect")


@rows
def test_python_s_messages_name_the_class(row: Row) -> None:
    """Those about arguments begin with a function's name, which is not to be that of a base class."""
    name, arguments = row.of.__name__, dict(row.arguments)
    made = row.of(**arguments)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("__init__", lambda: row.of()),
        ("__init__", lambda: row.of(**arguments, factor=2.0)),
        ("__init__", lambda: row.of(*range(30))),
        ("forward", lambda: made()),
        ("forward", lambda: made(sample(torch.Generator(), row=row), add=None)),
        ("from_modules", lambda: row.of.from_modules()),
        ("from_modules", lambda: row.of.from_modules(made, made, factor=2.0)),
    ]
    for method, call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value).startswith(f"{name}.{method}() "), str(caught.value)

    class Mine(row.of):  # type: ignore[misc, name-defined]
        pass

    assert "forward" not in Mine.__dict__ and Mine.forward is row.of.forward
    assert type(Mine(**arguments)) is Mine
    assert inspect.signature(row.of) == inspect.signature(Mine) and row.of.from_modules.__doc__


def test_linear_of_three_dimensions_has_the_axis_of_batch_norm(generator: torch.Generator) -> None:
    """Dimension 1, which is not the layer's: bn's features are those of dimension 1."""
    linear, bn = nn.Linear(4, 5), nn.BatchNorm1d(7)
    randomize(bn, generator)
    ours = fcb.LinearBnScale.from_modules(linear, bn, 1.5, "relu")
    x = torch.randn(3, 7, 4, generator=generator)
    for mode, op in ((False, BN), (True, BN_TRAIN)):
        ours.train(mode)
        twin = copy.deepcopy(bn)
        with torch.no_grad(), Ops() as ops:
            y = ours(x)
        assert ops.count(op) == 1
        with torch.no_grad():
            torch.testing.assert_close(y, torch.relu(twin(linear(x)) * 1.5))
        torch.testing.assert_close(bn.running_var, twin.running_var)
        with pytest.raises(RuntimeError) as plain:
            bn(linear(x[:, 0]))
        with pytest.raises(RuntimeError) as got:
            ours(x[:, 0])
        assert str(got.value) == str(plain.value)


def test_linear_by_name() -> None:
    linear, bn = nn.Linear(4, 6), nn.BatchNorm1d(6)
    assert fcb.LinearBnScale.from_modules(linear=linear, bn=bn).linear is linear
    assert sorted(fcb.LinearBnScale(4, 6).state_dict())[-2:] == ["linear.bias", "linear.weight"]


@rows
def test_why_not_knows_the_layer(row: Row, generator: torch.Generator) -> None:
    layer, bn, x = row.layer(**row.arguments), row.norm(6), sample(generator, row=row)
    assert why_not(layer, bn, x) is None
    name = row.norm.__name__
    assert why_not(layer, nn.Identity(), x) == f"bn is of class Identity, not nn.{name} itself"
    derived = type("Derived", (row.layer,), {})(**row.arguments)
    assert why_not(derived, bn, x) == f"{row.name} is of class Derived, not nn.{row.layer.__name__} itself"
    assert "not nn." in str(why_not(nn.Bilinear(2, 2, 6), bn))


@rows
def test_script(row: Row, generator: torch.Generator) -> None:
    """PyTorch's ops under the same names, saved and loaded."""
    _, ours = models(generator, activation="silu", row=row)
    ours.residual_last = True
    x, residual = sample(generator, row=row), residual_of(row, generator)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(ours), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    assert list(scripted.state_dict()) == list(ours.state_dict())
    torch.testing.assert_close(scripted(x), ours(x))
    torch.testing.assert_close(scripted(x, residual), ours(x, residual))
    if row in TRANSPOSED.values():
        torch.testing.assert_close(scripted(x, None, list(row.result[2:])), ours(x))


@rows
def test_traces(row: Row, generator: torch.Generator) -> None:
    _, ours = models(generator, activation="relu", row=row)
    x = sample(generator, row=row)
    with torch.no_grad():
        traced = torch.jit.trace(ours, x, check_trace=False)
        assert "fused_conv_bn::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), ours(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(ours, {"residual": None})(x, None), ours(x))


@rows
@pytest.mark.parametrize("keep", [False, True], ids=["plain ops", "this package's"])
def test_export(keep: bool, row: Row, generator: torch.Generator) -> None:
    _, ours = models(generator, activation="silu", row=row)
    x = sample(generator, row=row)
    if keep:
        with fcb.export_ops():
            program = torch.export.export(ours, (x,))
    else:
        program = torch.export.export(ours, (x,))
    found = [str(node.target) for node in program.graph.nodes if "fused_conv_bn" in str(node.target)]
    assert found == ([row.fused.replace("::", ".") + ".default"] if keep else [])
    torch.testing.assert_close(program.module()(x), ours(x))


@rows
def test_functional_transforms(row: Row, generator: torch.Generator) -> None:
    plain, ours = models(generator, dtype=torch.float64, activation="none", row=row)
    x = sample(generator, dtype=torch.float64, row=row)

    def loss(m: nn.Module) -> Any:
        parameters = {name: p.detach() for name, p in m.named_parameters()}
        return torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).square().sum())(parameters)

    expected, got = loss(plain), loss(ours)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
        assert value.abs().max() > 0


class Net(nn.Module):
    """The module, and a pair of layers that fuse() joins."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.block = row.of(**row.arguments, scaling_factor=1.7, activation="silu")
        self.bn = row.norm(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.block(x)))


@rows
def test_fuse_takes_it_as_one_module(row: Row, generator: torch.Generator) -> None:
    model = Net(row).eval()
    randomize(model, generator)
    x = sample(generator, row=row)
    twin = copy.deepcopy(model)
    fused = fcb.fuse(model)
    for mode in (False, True):
        fused.train(mode)
        twin.train(mode)
        with torch.no_grad():
            for _ in range(2):  # the first call captures the model
                with Ops() as ops:
                    y = fused(x)
                torch.testing.assert_close(y, twin(x), rtol=1e-4, atol=1e-4)
        assert ops.count(row.train if mode else row.fused) >= 1 and ops.count("fused_conv_bn") == 2
        for a, b in zip(fused.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert type(fused.block) is row.of
    assert type(fcb.unfuse(fused).block) is row.of


@pytest.mark.parametrize("row", [ROWS["conv1d"], ROWS["conv3d"]], ids=["conv1d", "conv3d"])
@pytest.mark.parametrize("padding", [0, "same"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fuse_runs_pairs_of_any_dimensions_as_the_module(
    autocast: bool, padding: Any, row: Row, generator: torch.Generator
) -> None:
    """Under autocast, padded by name, and where the statistics are a batch's."""
    for statistics in (True, False):
        bn = row.norm(6, track_running_stats=statistics)
        model = nn.Sequential(row.layer(**row.arguments, padding=padding), bn, nn.ReLU()).eval()
        randomize(model, generator)
        twin = copy.deepcopy(model)
        fused, x = fcb.fuse(model), sample(generator, row=row)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fused(x)  # which captures the model
            with Ops() as ops:
                y = fused(x)
            assert ops.count(row.fused if statistics else row.train) == ops.count("fused_conv_bn") == 1
            if statistics:
                check(y, twin, x)
            else:
                torch.testing.assert_close(y, twin(x), rtol=0.05, atol=0.05)


@rows
def test_a_call_costs_one_pass(row: Row, generator: torch.Generator) -> None:
    """Behind a layer of PyTorch's: its ops, and one of this package's for BatchNorm, factor, residual and activation."""
    plain, ours = models(generator, activation="silu", row=row)
    x, residual = sample(generator, row=row), residual_of(row, generator)
    layer = ops_of(getattr(plain, row.name), x).names if row.fused == BN else []
    assert ops_of(ours, x, residual).names == [*layer, row.fused]
