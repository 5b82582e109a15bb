"""Nested, sparse and oneDNN's tensors, and autocast of another device: what PyTorch's own ops do, and its messages."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb

C, K = 3, 8
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:Sparse CSR")


def nested(layout: torch.layout) -> Tensor:
    sizes = ((C, 8, 8), (C, 8, 8)) if layout == torch.strided else ((2, C, 8, 8), (3, C, 8, 8))
    return torch.nested.nested_tensor([torch.randn(size) for size in sizes], layout=layout)


def batch() -> Tensor:
    return torch.randn(2, C, 8, 8, generator=torch.Generator().manual_seed(1))


MADE: dict[str, Callable[[], Tensor]] = {
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "coo": lambda: batch().to_sparse(),
    "csr": lambda: torch.randn(C, K).to_sparse_csr(),
    "mkldnn": lambda: batch().to_mkldnn(),
}


def make(kind: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MADE[kind]()


def outcome(call: Callable[[], Tensor]) -> tuple[str, str] | Tensor:
    """The result, or the class and the first line of the error."""
    try:
        y = call()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0]
    return y.to_dense().detach() if y.layout != torch.strided else y.detach()


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want), (got, want)
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_modules(kind: str, training: bool, grad: bool) -> None:
    """As the layers by themselves: a result, or an error of the same words."""
    torch.manual_seed(3)
    conv, bn = nn.Conv2d(C, K, 3, padding=1), nn.BatchNorm2d(K)
    plain = nn.Sequential(conv, bn, nn.ReLU()).train(training)
    block = fcb.ConvBnScale2d.from_modules(copy.deepcopy(conv), copy.deepcopy(bn), activation="relu").train(training)
    model = fcb.fuse(copy.deepcopy(plain))
    x = make(kind)
    with torch.set_grad_enabled(grad):
        model(batch())  # captured
        want = outcome(lambda: plain(x))
        assert_same(outcome(lambda: block(x)), want)
        assert_same(outcome(lambda: model(x)), want)


@pytest.mark.parametrize("kind", ["nested", "coo"])
def test_residuals(kind: str) -> None:
    block = fcb.ConvBnScale2d(C, C, 3, padding=1).eval()
    residual = make(kind)
    with torch.no_grad():
        assert_same(
            outcome(lambda: block(batch(), residual)), outcome(lambda: block.bn(block.conv(batch())) + residual)
        )


@pytest.mark.parametrize("kind", MADE)
def test_functions(kind: str) -> None:
    """The dispatcher's message, which names the op and the kind of the tensor."""
    x, s = make(kind), torch.rand(C) + 0.5
    w, k = torch.randn(K, C, 3, 3), torch.rand(K) + 0.5
    calls: dict[str, Callable[[], Tensor]] = {
        "bn_scale": lambda: fcb.bn_scale(x, s, s),
        "scale_shift": lambda: fcb.scale_shift(x, s, s),
        "bn_scale_cat": lambda: fcb.bn_scale_cat([x], s, s),
        "gate": lambda: fcb.gate(x, torch.ones(2, C)),
        "max_pool2d": lambda: fcb.max_pool2d(x, 2),
        "spatial_mean": lambda: fcb.spatial_mean(x),
        "squeeze_excite": lambda: fcb.squeeze_excite(x, w[:, :, :1, :1], None, w[:C, :, :1, :1], None),
        "conv_scale_shift": lambda: fcb.conv_scale_shift(x, w, k, k),
        "conv_bn_scale": lambda: fcb.conv_bn_scale(x, w, None, k, k),
        "conv_bn_scale_mean": lambda: fcb.conv_bn_scale_mean(x, w, None, k, k)[1],
        "bn_scale_train": lambda: fcb.bn_scale_train(x, None, None),
        "conv_bn_scale_train": lambda: fcb.conv_bn_scale_train(x, w, None, None, None),
    }
    for op, call in calls.items():
        said = outcome(call)
        assert isinstance(said, tuple) and said[0] == "NotImplementedError", (op, said)
        assert said[1].startswith(f"Could not run 'fused_conv_bn::{op}' with arguments from the '"), (op, said)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "mtia", "hpu", "xla", "privateuseone"])
def test_autocast_of_another_device_changes_nothing(kind: str) -> None:
    """Of the module, of a fused model and of a function, with and without gradients; PyTorch's layers as well."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Conv2d(C, K, 3), nn.BatchNorm2d(K), nn.ReLU()).eval()
    block = fcb.ConvBnScale2d.from_modules(plain[0], plain[1], activation="relu")
    model, x = fcb.fuse(copy.deepcopy(plain)), batch()
    bn = plain[1].running_mean, plain[1].running_var
    calls: list[Callable[[], Tensor]] = [
        *(lambda m=m: m(x) for m in (plain, block, model)),
        lambda: fcb.conv_bn_scale(x, plain[0].weight, None, *bn),
    ]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            want = [call() for call in calls]
            was = torch.is_autocast_enabled(kind)
            torch.set_autocast_enabled(kind, True)
            try:
                got = [call() for call in calls]
            finally:
                torch.set_autocast_enabled(kind, was)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)  # the dtype, too
