"""Fused models under torch.export: PyTorch's ops alone, unless export_ops() keeps the groups' ops."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import assert_no_worse_than_eager
from small_network import Network, random_statistics

KEPT = ["bn_scale_cat", "conv_bn_scale", "conv_bn_scale", "conv_scale_shift", "conv_scale_shift", "gate"]


def network(generator: torch.Generator) -> nn.Module:
    return random_statistics(Network(), generator)


def kept(program: torch.export.ExportedProgram) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return sorted(name.split(".")[1] for name in names if name.startswith("fused_conv_bn."))


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fused_conv_bn:")
        yield


def export(model: nn.Module, x: Tensor, keeps: bool = True, **options: object) -> torch.export.ExportedProgram:
    with fcb.export_ops() if keeps else contextlib.nullcontext():
        return torch.export.export(model, (x,), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grad", [False, True])
def test_the_groups_are_kept(grad: bool, generator: torch.Generator) -> None:
    model = network(generator)
    plain, double = copy.deepcopy(model), copy.deepcopy(model).double()
    x = torch.randn(2, 3, 32, 32, generator=generator)
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    with torch.set_grad_enabled(grad), without_warnings():
        fcb.fuse(model)(x)
        program = export(model, x, dynamic_shapes=shapes)
        assert kept(program) == KEPT
        assert kept(export(model, x, keeps=False)) == []
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32, generator=generator)
        with torch.no_grad():
            assert_no_worse_than_eager(program.module()(x), plain(x), double(x.double()))


def test_the_program_has_the_model_s_tensors(generator: torch.Generator) -> None:
    """By the model's own names, and none that the captures hold."""
    model = network(generator)
    x = torch.randn(2, 3, 32, 32, generator=generator)
    program = export(fcb.fuse(model, x), x, keeps=False)
    with torch.no_grad():
        fused = export(model, x)
    assert not fused.constants and fused.state_dict.keys() == program.state_dict.keys()
    with torch.no_grad():
        before = fused.module()(x)
        fused.state_dict["bn.running_mean"].add_(1)
        assert not torch.equal(fused.module()(x), before)


def test_a_model_that_was_not_called_is_exported_as_it_is(generator: torch.Generator) -> None:
    model = network(generator)
    x = torch.randn(2, 3, 32, 32, generator=generator)
    with pytest.warns(UserWarning, match="Network was not called like this after fuse.*call the model once"):
        assert kept(export(fcb.fuse(model), x)) == []
    fcb.fuse(model, x)  # under no_grad
    with pytest.warns(UserWarning, match="in the same grad mode"):
        assert kept(export(model, x)) == []
    with torch.no_grad(), without_warnings():
        assert kept(export(model, x)) == KEPT


@pytest.mark.parametrize("change", ["hook", "training", "frozen", "another class", "strict"])
def test_what_does_not_hold_is_exported_as_it_is(change: str, generator: torch.Generator) -> None:
    model = network(generator)
    x = torch.randn(2, 3, 32, 32, generator=generator)
    calls = []
    fcb.fuse(model, x, freeze=change == "frozen")
    if change == "hook":
        model.conv.register_forward_hook(lambda *_: calls.append(1))
    elif change == "training":
        model.bn.train()
    elif change == "another class":
        model.stem[2] = nn.Hardswish()
    with torch.no_grad():
        program = export(model, x, strict=change == "strict")
    assert kept(program) == []
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), fcb.unfuse(model)(x))
    assert bool(calls) == (change == "hook")


def test_parts_are_exported_where_the_whole_is_not_captured(generator: torch.Generator) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in "ab"])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x) if x.shape[1] == 3 else x  # torch.fx traces no such thing
            return x

    model = Parts().eval()
    x = torch.randn(2, 3, 16, 16, generator=generator)
    expected = model(x)
    with torch.no_grad():
        program = export(fcb.fuse(model, x), x)
        assert kept(program) == ["conv_bn_scale"] * 2
        torch.testing.assert_close(program.module()(x), expected)
