"""torch.compile(model, backend="fused_conv_bn"): the groups of dynamo's graphs, and the same results and gradients."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._fuse import backend
from fused_conv_bn._fuse.backend import CompiledWords, compile_backend, rewrite


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1, self.r = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.c3, self.b4 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(12)
        self.c5, self.b5 = nn.Conv1d(12, 6, 3, dilation=2), nn.BatchNorm1d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.r(self.b1(self.c1(x)))
        y = self.b2(self.c2(x))
        y += x
        y = F.gelu(y)
        z = F.silu(self.c3(y))
        y = torch.relu(self.b4(torch.cat([y, z], 1)))
        y = y * y.mean((2, 3), keepdim=True)
        return F.leaky_relu(self.b5(self.c5(y.flatten(2))), 0.2) + 1


GROUPS = ["conv bn relu6", "conv bn add gelu", "conv silu", "bn relu", "conv bn leaky_relu"]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Those of each graph that was compiled."""
    found: list[list[str]] = []

    def rewritten(*args: Any) -> Any:
        done = rewrite(*args)
        found.append([group.describe() for group in done])
        return done

    monkeypatch.setattr(backend, "rewrite", rewritten)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def model_on(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = Model().to(device)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-1, 1)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -1, 1)
    return model


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    bound = tolerance * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=bound)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_evaluation(device: str, groups: list[list[str]], grad: bool, dynamic: bool | None) -> None:
    model = model_on(device).eval()
    compiled = torch.compile(model, backend=compile_backend, fullgraph=True, dynamic=dynamic, options={"then": "eager"})
    with torch.set_grad_enabled(grad):
        for size in (9, 12):
            x = torch.randn(2, 3, size, size, device=device)
            close(compiled(x), model(x))
        with torch.no_grad():
            model.c1.weight.mul_(2)
        close(compiled(x), model(x))
    expected = list(GROUPS)
    if dynamic:  # its limits are numbers that the graph does not have
        expected[0] = "conv bn"
    assert groups and all(found == expected for found in groups)


def test_training_step(device: str, groups: list[list[str]]) -> None:
    plain, fused = model_on(device), model_on(device)
    step = torch.compile(fused, backend=compile_backend, fullgraph=True, options={"then": "eager"})
    results = []
    for model, run in ((plain, plain), (fused, step)):
        x = torch.randn(4, 3, 12, 12, device=device, generator=torch.Generator(device).manual_seed(1)).requires_grad_()
        for _ in range(2):
            y = run(x)
            y.square().mean().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters()), *(b.double() for b in model.buffers())])
    assert groups == [GROUPS]
    for got, expected in zip(results[1], results[0], strict=True):
        close(got, expected, 2e-4)  # a gradient through five BatchNorms of few values


def test_inductor_has_the_rest(device: str, groups: list[list[str]]) -> None:
    """A first layer, for which there is a kernel, and one for which there is none."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 40, 3), nn.BatchNorm2d(40)).to(
        device
    )
    model.eval()
    x = torch.randn(1, 3, 64, 256, device=device)
    with torch.no_grad():
        compiled = torch.compile(model, backend=compile_backend)
        close(compiled(x), model(x))
        own = not fcb.explain(x, model[0].weight).startswith("aten")
        assert own or device == "cuda"
        second = fcb.explain(model[:3](x), model[3].weight)
        expected = ["conv bn relu"] * own + ["conv bn"] * (not second.startswith("aten"))
        assert groups == [expected]
    # Where a gradient is needed, inductor has all of it.
    compiled(x).square().mean().backward()
    assert len(groups) == 1 and model[0].weight.grad is not None


def test_what_the_matcher_leaves() -> None:
    """Another autocast, BatchNorms without statistics, arguments by keyword, a residual that is broadcast."""

    def seen(function: Any, *args: Tensor) -> list[str]:
        found: list[str] = []

        def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            found.extend(g.describe() for g in rewrite(graph, CompiledWords((float,)), lambda *_: True))
            return graph.forward

        torch._dynamo.reset()
        with torch.no_grad():
            close(torch.compile(function, backend=look)(*args), function(*args))
        return found

    x, w, mean, var = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3), torch.randn(3), torch.rand(3) + 1

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.conv2d(x, w)
        return F.batch_norm(y.float(), mean, var)

    assert seen(autocast, x) == []
    assert seen(lambda x: F.batch_norm(F.conv2d(x, w), None, None, training=True), x) == ["conv bn"]
    keywords = {"stride": 2, "padding": (1, 0), "bias": mean}
    assert seen(lambda x: F.batch_norm(F.conv2d(weight=w, input=x, **keywords), mean, var, eps=0.1), x) == ["conv bn"]
    assert seen(lambda x: F.batch_norm(F.conv2d(x, w, padding="same"), mean, var), x) == ["bn"]
    assert seen(lambda x: F.batch_norm(F.conv2d(x, w, padding=1), mean, var) + x[:, :, :1], x) == ["conv bn"]
    assert seen(lambda x: F.batch_norm(F.conv2d(x, w, padding=1), mean, var) + x.double(), x) == ["conv bn"]
    assert seen(lambda x: F.batch_norm(F.conv2d(x, w, padding=1), mean, var).relu_() + x, x) == ["conv bn relu add"]
    assert seen(lambda x: F.relu(F.conv2d(x[0], w)), x) == []


def test_options() -> None:
    compiled = torch.compile(nn.Conv2d(3, 4, 3), backend=compile_backend, options={"than": "eager"})
    with pytest.raises(Exception, match="options has 'than', expected 'then' with one of inductor, eager"):
        compiled(torch.randn(1, 3, 5, 5))
    compiled = torch.compile(nn.Conv2d(3, 4, 3), backend=compile_backend, options={"then": "tvm"})
    with pytest.raises(Exception, match="options has then='tvm', expected 'then' with one of inductor, eager"):
        compiled(torch.randn(1, 3, 5, 5))


def test_by_name() -> None:
    """An installed package has an entry point."""
    try:
        importlib.metadata.distribution("fused_conv_bn")
    except importlib.metadata.PackageNotFoundError:
        found = importlib.metadata.EntryPoint("fused_conv_bn", "fused_conv_bn._fuse.backend:compile_backend", "")
        assert found.load() is compile_backend
        return
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(1, 3, 8, 8)
    assert "fused_conv_bn" in torch._dynamo.list_backends()
    compiled = torch.compile(model, backend="fused_conv_bn", options={"then": "eager"})
    close(copy.deepcopy(compiled)(x), model(x))
