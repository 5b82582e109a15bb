"""What torch.profiler says of the ops: which algorithm ran; and NVTX, which nobody hears of unless asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fused_conv_bn as fcb
from fused_conv_bn import profiling

X = torch.randn(2, 3, 20, 128, generator=torch.Generator().manual_seed(1))


def names(call: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        call()
    return [event.name for event in profile.events()]


def block(**kwargs: Any) -> fcb.ConvBnScale2d:
    torch.manual_seed(2)
    return fcb.ConvBnScale2d(3, 16, 3, **kwargs).eval()


def algorithm(weight: torch.Tensor, **kwargs: Any) -> str:
    return fcb.explain(X, weight, **kwargs)


def test_a_fused_model_names_its_layers_and_algorithms() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 20, 1), nn.BatchNorm2d(20))
    model = fcb.fuse(plain.eval(), X)
    said = [row.algorithm for row in fcb.report(model).rows if row.algorithm]
    assert said[0] == "direct_cpu" and said[1] == "aten"
    found = names(lambda: model(X))
    assert [name for name in found if name.startswith("fused_conv_bn: ")] == [
        "fused_conv_bn: conv bn relu [direct_cpu] 1",
        "fused_conv_bn: conv bn [aten] 4",
    ]
    assert found.count("fused_conv_bn::conv_bn_scale") == 2

    # The same while a profiler runs and while none does, and nothing is left of it.
    with torch.no_grad():
        want = model(X)
    with torch.profiler.profile(), torch.no_grad():
        assert torch.equal(model(X), want)


def test_nothing_is_spent_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_conv_bn._fuse import entry

    model = fcb.fuse(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval(), X)
    calls = []
    monkeypatch.setattr(entry, "record_function", lambda name: calls.append(name) or profiling.record_function(name))
    with torch.no_grad():
        model(X)
        assert calls == []
        with torch.profiler.profile():
            model(X)
    assert calls == ["fused_conv_bn: conv bn [direct_cpu] 1"]


def test_a_snapshot_s_ops_have_the_names_of_what_runs() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    model = fcb.fuse(copy.deepcopy(plain), X, freeze=True)
    with torch.no_grad():
        model(X)
    found = set(names(lambda: model(X)))
    ours = {"fused_conv_bn::_conv_packed", "fused_conv_bn::_conv_packed_chain", "fused_conv_bn::conv_scale_shift"}
    assert found & {*ours, "mkldnn::_convolution_pointwise"}


@pytest.mark.parametrize("grad", [False, True])
def test_functions_and_modules_in_a_context(grad: bool) -> None:
    m = block()
    w = m.conv.weight
    with torch.no_grad():
        want = m(X)

    def run() -> None:
        with fcb.name_algorithms(), torch.set_grad_enabled(grad):
            assert torch.allclose(m(X), want)
            fcb.conv_scale_shift(X, w.detach(), None, None, 2, 1)
            fcb.conv_bn_scale_train(X, w.detach(), None, None, None)
            fcb.gate(X, X[:, :, 0, 0])

    found = names(run)
    direct = algorithm(w)
    assert direct == "direct_cpu"
    assert f"fused_conv_bn::conv_bn_scale [{direct}]" in found
    assert f"fused_conv_bn::conv_scale_shift [{algorithm(w, stride=2, padding=1)}]" in found
    assert f"fused_conv_bn::conv_bn_scale_train [{algorithm(w, training=True)}]" in found
    assert not any("gate [" in name for name in found)
    assert "[" not in "".join(name for name in names(lambda: m(X)) if "fused_conv_bn" in name)


def test_what_an_op_refuses_is_said_by_it() -> None:
    with fcb.name_algorithms(), pytest.raises(RuntimeError, match="^conv_scale_shift: "):
        fcb.conv_scale_shift(X, torch.randn(4, 5, 3, 3), None, None)


def test_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("pop"))
    m = block()
    with torch.no_grad():
        with fcb.name_algorithms():
            m(X)
        assert ranges == []
        with fcb.name_algorithms(nvtx=True):
            ranges.clear()
            m(X)
    assert ranges == ["fused_conv_bn::conv_bn_scale [direct_cpu]", "pop"]

    def refuse(name: str) -> None:
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", refuse)
    message = "^name_algorithms: nvtx is True, and this torch has no NVTX"
    with pytest.raises(RuntimeError, match=message), fcb.name_algorithms(nvtx=True):
        pass
