"""bn_scale_train and conv_bn_scale_train within PyTorch: opcheck, fake tensors, compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_conv_bn as fcb
from elementwise_problems import LAYOUTS, arrange, epilogue_of
from train_problems import CONV_CASES, EPS, FACTOR, MOMENTUM, OPS, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, statistics, layout, generator):
    x = arrange(torch.randn(3, 4, 5, 6, generator=generator).to(device, dtype), layout)
    s = state(4, dtype, device, generator) if statistics else [None] * 4
    kwargs = epilogue_of(x, "gelu", "last", generator)
    for form in ("", "_stats", "_functional"):
        op = getattr(OPS, f"bn_scale_train{form}").default
        torch.library.opcheck(op, (x, *copy.deepcopy(s), FACTOR, MOMENTUM, EPS), kwargs)
    w = torch.randn(4, 4, 3, 3, generator=generator).to(device, dtype)
    conv_bias = s[3]
    for form in ("", "_stats", "_functional"):
        op = getattr(OPS, f"conv_bn_scale_train{form}").default
        arguments = (x, w, conv_bias, *copy.deepcopy(s), FACTOR, MOMENTUM, EPS, [1], [1], [1], 1)
        torch.library.opcheck(op, arguments, kwargs)


def test_fake_is_like_real(device, generator):
    for size, weight_size, *window in CONV_CASES.values():
        for layout in LAYOUTS:
            x = arrange(torch.randn(size).to(device), layout)
            w = torch.randn(weight_size, device=device)
            if layout == "permuted":  # conv1d keeps the weight's permutation, and BatchNorm does not
                w = w.transpose(1, -1).contiguous().transpose(1, -1)
            calls = (
                lambda x, w: fcb.bn_scale_train(x, None, None),
                lambda x, w, window=window: fcb.conv_bn_scale_train(
                    x, w, None, None, None, None, None, 1.0, 0.1, 1e-5, *window
                ),
            )
            for call in calls:
                y = call(x, w)
                with FakeTensorMode() as mode:
                    fake = call(mode.from_tensor(x), mode.from_tensor(w))
                assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_functions(device, backend, generator):
    """With the writes to the running statistics, functionalised by AOTAutograd."""

    def f(x: Tensor, w: Tensor, s: list[Tensor]) -> tuple[Tensor, ...]:
        y = fcb.bn_scale_train(x, *s)
        first = s[0] + 1
        z = fcb.conv_bn_scale_train(y, w, s[3], *s, padding=1)
        return y, z, first, s[1] * 2

    torch._dynamo.reset()
    x, w = torch.randn(3, 4, 6, 5, device=device), torch.randn(4, 4, 3, 3, device=device)
    eagers = state(4, torch.float32, device, generator)
    compiled = copy.deepcopy(eagers)
    expected = f(x, w, eagers)
    got = torch.compile(f, fullgraph=True, backend=backend)(x, w, compiled)
    for a, b in zip((*expected, *eagers), (*got, *compiled), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
