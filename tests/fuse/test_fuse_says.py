"""What fuse() and its report say of models that are compiled, frozen, parts of others, or watched since."""

from __future__ import annotations

import logging
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import Picklable, close, randomised
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

import fused_conv_bn as fcb


def network() -> nn.Sequential:
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return randomised(nn.Sequential(stem, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))).eval()


def image() -> Tensor:
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(4))


class Detector(nn.Module):
    """A value decides in it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = network(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.backbone(x)
        return self.head(y[..., :3, :3]) if float(y.sum()) < 1e9 else y


def scripted(m: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.script(m)


def traced(m: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(m, torch.randn(2, m[0].in_channels if isinstance(m[0], nn.Conv2d) else 4, 9, 9))


def wrapped(m: nn.Module) -> nn.Module:
    return torch.compile(m, backend="eager")


def compiled_in_place(m: nn.Module) -> nn.Module:
    m.compile(backend="eager")
    return m


COMPILERS = {
    scripted: "TorchScript",
    traced: "TorchScript",
    wrapped: "torch.compile",
    compiled_in_place: "torch.compile",
}


def rows(model: nn.Module) -> list[tuple[str, str, str]]:
    return [(row.path, row.state, row.text) for row in fcb.report(model).rows]


# ---- compiled models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COMPILERS)
def test_a_compiled_model_is_refused(how: Callable[[nn.Module], nn.Module], no_leftover_graphs: None) -> None:
    model = how(network())
    expected = f"fuse: model is of type {type(model).__name__} and compiled by {COMPILERS[how]}, expected an nn.Module "
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}that is not compiled: fuse the model "):
        fcb.fuse(model, image())
    assert not any("_fused_conv_bn" in m.__dict__ for m in model.modules())
    report = fcb.report(model)
    assert report.not_captured == {"": f"it is compiled by {COMPILERS[how]}"}
    assert f"(the model) is not captured: it is compiled by {COMPILERS[how]}" in str(report)
    assert set(report.counts) <= {"left"} and {row.reason for row in report.rows} <= {"no capture"}


@pytest.mark.parametrize("how", COMPILERS)
def test_a_compiled_part_is_left_alone(how: Callable[[nn.Module], nn.Module], no_leftover_graphs: None) -> None:
    model = network()
    want = model(image())
    model[0] = how(model[0])
    classes = [type(m) for m in model[0].modules()]
    fcb.fuse(model, image())
    close(model(image()), want)
    assert [type(m) for m in model[0].modules()] == classes
    report = fcb.report(model)
    assert report.groups() == ["conv bn"] and report.not_captured == {"0": f"it is compiled by {COMPILERS[how]}"}
    for row in report.rows:
        assert row.state == ("left" if row.path.startswith("0") else "fused")
    assert fcb.report(model[0]).not_captured == {"": f"it is compiled by {COMPILERS[how]}"}


def test_compiled_behind_fuse(no_leftover_graphs: None) -> None:
    model = fcb.fuse(network(), image())
    assert fcb.report(wrapped(model)).counts == {"left": 4} and fcb.report(model).counts == {"fused": 4}
    model.compile(backend="eager")
    assert fcb.report(model).counts == {"left": 4}


@pytest.mark.parametrize("freeze", [False, True])
def test_what_dynamo_leaves_alone_is_fused(freeze: bool, no_leftover_graphs: None) -> None:
    """The model in the wrapper, whose calls are its own; and a part that is wrapped."""
    part = network()
    part[0] = torch.compiler.disable(part[0])
    for model in (torch.compiler.disable(network()), part):
        want = model(image())
        assert fcb.fuse(model, image(), freeze=freeze) is model
        close(model(image()), want)
        report = fcb.report(model)
        assert report.counts == {"fused": 4} and not report.not_captured
        fcb.unfuse(model)
        assert not any("_fused_conv_bn" in m.__dict__ for m in model.modules())


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [[image()], {"x": image()}, True, "x", network()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("tune", [False, True])
def test_example_inputs_that_are_no_argument(inputs: Any, tune: bool) -> None:
    message = (
        f"fuse: example_inputs is of type {type(inputs).__name__}, which the model does not take as its one argument"
    )
    with pytest.raises(TypeError, match=f"^{message}, expected a tensor or a tuple of arguments$"):
        fcb.fuse(network(), inputs, tune=tune)


def test_a_list_may_be_an_argument() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [self.body(x) for x in xs]

    assert fcb.report(fcb.fuse(Lists().eval(), [image()])).counts == {"fused": 4}
    with pytest.raises(TypeError, match="unexpected|takes"):  # PyTorch's or Python's own, of arguments that are some
        fcb.fuse(Lists().eval(), ([image()], 1))


# ---- hooks and parts -------------------------------------------------------------------------------------------------


def test_a_hook_that_came_later() -> None:
    model = fcb.fuse(network(), image())
    handle = model[0][0].register_forward_hook(lambda *_: None)
    report = fcb.report(model)
    assert report.counts == {"pending": 4} and {row.reason for row in report.rows} == {"again"}
    model(image())
    fresh = network()
    fresh[0][0].register_forward_hook(lambda *_: None)
    assert rows(model) == rows(fcb.fuse(fresh, image()))
    assert rows(model)[0][1] == "left" and "a hook watches it" in rows(model)[0][2]
    handle.remove()
    model(image())
    assert fcb.report(model).counts == {"fused": 4}


def test_a_hook_on_a_part() -> None:
    model = fcb.fuse(network(), image())
    model[0].register_forward_hook(lambda *_: None)
    assert fcb.report(model).counts == {"pending": 4}
    model(image())
    assert rows(model)[:2] == [("0.0", "fused", "conv bn relu"), ("0.1", "fused", "with 0.0")]


def test_a_hook_for_all_modules() -> None:
    model = fcb.fuse(network(), image())
    handle = torch_module.register_module_forward_hook(lambda *_: None)
    try:
        assert fcb.report(model).counts == {"left": 4}
        assert fcb.report(model).not_captured == {"": "a hook is registered for all modules"}
    finally:
        handle.remove()
    assert fcb.report(model).counts == {"fused": 4}


def test_the_capture_that_runs_is_described() -> None:
    """Not another one of the same kind of call, which came later."""
    model = network().train()
    for m in (model[0][1], model[2]):
        m.eval()
    before = fcb.report(fcb.fuse(model, image())).to_dict()
    model[2].train().register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(image())
    assert "a hook watches it" in str(fcb.report(model))
    model[2].eval()._forward_hooks.clear()
    assert fcb.report(model).to_dict() == before


def test_a_part_of_a_fused_model() -> None:
    model = nn.Sequential(network(), nn.ReLU()).eval()
    part = model[0]
    assert fcb.report(part).rows[0].reason == "not fused"
    fcb.fuse(model)
    assert fcb.report(part).counts == {"pending": 4}
    model(image())
    assert rows(part) == rows(fcb.fuse(network(), image()))[:-2] + [
        ("1", "fused", "conv bn relu"),
        ("2", "fused", "with 1"),
    ]
    assert rows(part[0][1]) == [("", "fused", "with 0.0.0")]  # which is not in that part
    assert rows(part[0][0]) == [("", "fused", "conv bn relu")]
    fcb.unfuse(model)
    assert fcb.report(part).rows[0].reason == "not fused"


def test_a_part_of_what_is_not_captured() -> None:
    model = fcb.fuse(Detector().eval(), image())
    assert rows(model)[1] == ("backbone.0.1", "fused", "with backbone.0.0")
    assert rows(model.backbone)[1] == ("0.1", "fused", "with 0.0") and not fcb.report(model.backbone).not_captured
    fcb.fuse(model, image(), freeze=True)
    assert fcb.report(model).frozen == {"": False} and fcb.report(model.backbone).frozen == {"": False}


# ---- snapshots -------------------------------------------------------------------------------------------------------


def test_a_report_says_frozen() -> None:
    model = fcb.fuse(network(), image(), freeze=True)
    line = "(the model) is frozen: a snapshot of its parameters and buffers"
    report = fcb.report(model)
    assert report.frozen == {"": False} == report.to_dict()["frozen"] and line in str(report).splitlines()
    assert fcb.report(model[0]).frozen == {"": False} and fcb.report(network()).frozen == {}
    with torch.no_grad():
        model[2].running_mean.add_(1)
    changed = f"{line}, which have changed since: fuse(model, freeze=True) takes a new one"
    assert fcb.report(model).frozen == {"": True} and changed in str(fcb.report(model)).splitlines()
    fcb.fuse(model, freeze=True)
    assert fcb.report(model).frozen == {"": False}
    model(image())
    model[1].weight = nn.Parameter(model[1].weight.detach() * 2)
    assert fcb.report(model).frozen == {"": True}
    fcb.thaw(model)
    assert fcb.report(model).frozen == {} and "frozen" not in str(fcb.report(model))


def test_a_frozen_part() -> None:
    model = network()
    fcb.fuse(model[0], image(), freeze=True)
    assert fcb.report(model).frozen == {"0": False}
    with torch.no_grad():
        model[0][0].weight.mul_(2)
        model[1].weight.mul_(2)
    assert fcb.report(model).frozen == {"0": True}


@pytest.mark.parametrize("place", ["model", "outside", "part"])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_takes_a_new_snapshot(place: str, assign: bool) -> None:
    model, other = network(), randomised(network())
    loads, source = model, other
    if place == "outside":
        loads, source = nn.ModuleDict({"body": model}), nn.ModuleDict({"body": other})
    elif place == "part":  # of which the snapshots are
        fcb.fuse(model[0], freeze=True)
    if place != "part":
        fcb.fuse(model, image(), freeze=True)
    with torch.no_grad():
        before = model(image())
        loads.load_state_dict({k: v.clone() for k, v in source.state_dict().items()}, assign=assign)
        close(model(image()), other(image()))
        assert not torch.allclose(before, other(image()))
    assert list(fcb.report(model).frozen.values()) == [False]
    with pytest.raises(RuntimeError, match="computes no gradients"):
        model(image().requires_grad_())


def test_a_state_that_does_not_fit() -> None:
    """What it could not load in whole was loaded in part."""
    model = fcb.fuse(network(), image(), freeze=True)
    state = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    del state["2.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    plain = network()
    plain.load_state_dict(state, strict=False)
    close(model(image()), plain(image()))


def test_loading_leaves_nothing_in_a_model() -> None:
    model = fcb.fuse(Picklable().eval(), image(), freeze=True)
    model.load_state_dict(Picklable().state_dict())
    assert not any(m._load_state_dict_post_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    assert type(pickle.loads(pickle.dumps(model))) is Picklable
    assert "_load_from_state_dict" not in vars(type(fcb.unfuse(model)))


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_first_call_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fused_conv_bn._fuse.compare"], "_SECONDS", -1.0)
    caplog.set_level(logging.INFO, "fused_conv_bn")
    model = fcb.fuse(network(), image())
    lines = [record.getMessage() for record in caplog.records if record.name == "fused_conv_bn"]
    numbers = [re.sub(r"\d+\.\d s", "N s", line) for line in lines]
    assert numbers == [
        "Sequential: its forward is captured",
        "Sequential: captured in N s, groups: 2",
        "Sequential: its first call is compared with its own forward",
        "group 1 of 2, 0.1, is compared with PyTorch's ops",
        "group 2 of 2, 2, is compared with PyTorch's ops",
        "Sequential: compared in N s",
    ]
    caplog.clear()
    model(image().requires_grad_())
    model(image())
    assert [r.getMessage() for r in caplog.records if "captured in" in r.getMessage()]  # with gradients, once
    caplog.clear()
    model(image())
    assert not caplog.records


def test_what_is_not_captured_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fused_conv_bn")
    fcb.fuse(Detector().eval(), image())
    (line,) = [r.getMessage() for r in caplog.records if "not captured" in r.getMessage()]
    assert line.startswith("Detector: not captured, its parts are when they are called: torch.fx cannot follow it: ")


def test_an_example_is_no_more_than_compared() -> None:
    """What is in no group runs in the model's own forward and in the graph. Nobody reads a third result."""
    calls: list[str] = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(op))
            return op(*args, **(kwargs or {}))

    model = nn.Sequential(network(), nn.AvgPool2d(2)).eval()
    with Ops():
        fcb.fuse(model, image())
    assert sum("avg_pool2d" in name for name in calls) == 2
    want = fcb.unfuse(model)(image())
    with torch.no_grad():
        close(fcb.fuse(model)(image()), want)  # a call has its own result
