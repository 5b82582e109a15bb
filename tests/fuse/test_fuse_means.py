"""Convolutions that put out the means which a squeeze behind them reads: on CUDA, and where these tests ask for it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse_squeeze import CHAINS, Model, data, model_of
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import assert_no_worse_than_eager
from fused_conv_bn._fuse import squeezes
from fused_conv_bn._fuse.blocks import PoolBlock
from small_network import random_statistics


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often convolutions put out means, and how often they were taken from their results."""
    counts = {"along": 0, "apart": 0}

    def counted(name: str, f: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return f(*args, **kwargs)

        return call

    monkeypatch.setattr(squeezes, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(squeezes, "_is_one_op", lambda x: False)
    monkeypatch.setattr(squeezes, "_conv_bn_mean", counted("along", squeezes._conv_bn_mean))

    class OfSqueeze(PoolBlock):
        quick = counted("apart", PoolBlock.quick)

    monkeypatch.setattr(squeezes, "PoolBlock", OfSqueeze)
    return counts


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, dtype: torch.dtype, memory_format: Any, device: str, called: dict[str, int]) -> None:
    """Values and strides; and no mean is read from a result that has put it out."""
    model = model_of(name, device, memory_format).to(dtype)
    x = data(device, dtype).contiguous(memory_format=memory_format)
    fused = fcb.fuse(copy.deepcopy(model), x.clone())
    called.update(along=0, apart=0)
    with torch.no_grad():
        got, expected = fused(x.clone()), model(x.clone())
    # Of one pixel, PyTorch's activations put out other strides than its convolutions.
    if device == "cuda" and name not in ("the result is put out", "the result is made larger"):
        assert got.stride() == expected.stride()
    assert_no_worse_than_eager(got, expected, copy.deepcopy(model).double()(x.double()))
    groups = len(CHAINS[name][1])
    along = groups - (name in ("two blocks", "written behind", "before a convolution"))  # where others read the result
    assert called == {"along": along, "apart": groups - along}


def _twice(m: Model, y: Tensor) -> Tensor:
    """A second reader writes to what the squeeze has read."""
    s = torch.sigmoid(m.fc2(F.relu(m.fc1(y.mean((2, 3), keepdim=True)))))
    z = y * s
    return z + y.relu_()


def _viewed(m: Model, y: Tensor) -> Tensor:
    flat = y.flatten(2)
    flat += 1
    return y * torch.sigmoid(m.fc2(F.relu(m.fc1(y.mean((2, 3), keepdim=True)))))


@pytest.mark.parametrize("f", [_twice, _viewed], ids=lambda f: f.__name__)
def test_results_that_others_read(f: Any, device: str, called: dict[str, int]) -> None:
    """They may be written to in between."""
    model = random_statistics(Model(f), torch.Generator().manual_seed(3)).to(device)
    fused = fcb.fuse(copy.deepcopy(model), data(device))
    called.update(along=0, apart=0)
    with torch.no_grad():
        torch.testing.assert_close(fused(data(device)), model(data(device)))
    assert called["along"] == 0


def test_only_where_a_squeeze_is_several_kernels(device: str, called: dict[str, int], monkeypatch: Any) -> None:
    fused = fcb.fuse(model_of("timm's", device), data(device))
    for captured, images, along in ((False, 2, 0), (True, 2, 1), (False, 65, 1)):
        monkeypatch.setattr(squeezes, "_is_one_op", lambda x, c=captured: x.size(0) <= squeezes.MOST_IMAGES and not c)
        called.update(along=0, apart=0)
        with torch.no_grad():
            fused(data(device, n=images))
        assert called["along"] == along


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool, device: str, called: dict[str, int]) -> None:
    model = model_of("timm's", device).train(training)
    fused = fcb.fuse(copy.deepcopy(model), data(device))
    fused(data(device))  # is compared
    model(data(device))
    called.update(along=0, apart=0)
    for m in (fused, model):
        m(data(device)).square().sum().backward()
    assert called["along"] == 0
    for mine, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_threads_have_their_own(device: str, called: dict[str, int]) -> None:
    model = model_of("timm's", device)
    fused = fcb.fuse(copy.deepcopy(model), data(device))
    inputs = [data(device) * (i + 1) for i in range(4)]
    with torch.no_grad():
        expected = [fused(x) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(20) if not torch.equal(fused(inputs[i]), expected[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and called["along"] >= 80


def test_a_squeeze_of_another_tensor(device: str, called: dict[str, int]) -> None:
    """What is left of a call that ended in between is nobody's."""
    model = model_of("timm's", device)
    fused = fcb.fuse(copy.deepcopy(model), data(device))
    with torch.no_grad():
        expected = fused(data(device))
        handle = fused.fc2.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fused(data(device) * 3)
        handle.remove()
        squeezes._means.keep(torch.zeros(2, 16, 9, 8), torch.zeros(2, 16, 1, 1))
        assert torch.equal(fused(data(device)), expected)
    assert squeezes._means.kept is None


@pytest.mark.cuda
def test_in_a_graph_of_a_network(device: str) -> None:
    """Depthwise convolutions in 16 bits: no kernel reads their results for means."""
    if device != "cuda":
        return
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dw, self.bn = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
            self.fc1, self.fc2 = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.bn(self.dw(x)))
            return y * torch.sigmoid(self.fc2(F.silu(self.fc1(y.mean((2, 3), keepdim=True)))))

    model = nn.Sequential(Layer(), Layer()).eval().cuda().half().to(memory_format=torch.channels_last)
    x = torch.randn(3, 32, 20, 30, device="cuda").half().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        fast = fcb.graphed(fcb.fuse(model))
        for _ in range(4):
            assert_no_worse_than_eager(fast(x), expected, exact)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            fast(x)
            torch.cuda.synchronize()
    names = [e.name for e in p.events()]
    # Of large images another kernel adds up the sums, in float32, of what each block has.
    assert sum("depthwise" in n for n in names) == 2 and not any("mean_columns_kernel<__half" in n for n in names)
