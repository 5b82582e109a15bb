"""The gates of squeeze-and-excite blocks in one launch: a function beside those of :mod:`fused_conv_bn.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import check_squeeze
from ._dispatch import RAW, twin, way_of
from ._memory import go_on_behind

_op = torch.ops.fused_conv_bn.squeeze_excite.default
_NAMES = ("input", "weight1", "weight2", "bias1", "bias2")


def squeeze_excite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    negative_slope: float = 0.01,
) -> Tensor:
    """The gates of squeeze-and-excite blocks: the mean of each channel, and two 1x1 convolutions with activations.

    Equivalent to ``gate(conv2d(activation(conv2d(input.mean((2, 3), True), weight1, bias1)), weight2, bias2))`` in 4
    dimensions, and what :func:`gate` takes. In channels_last on GPUs of compute capability 9.0 it is one launch, which
    rounds the result alone; elsewhere on CUDA two. The sums are in one order in every run. On the CPU it is PyTorch's
    mean and two convolutions. Differentiable: with grad mode on, and a tensor that requires grad, PyTorch's own ops
    run.

    Args:
        input: 3 to 5 dimensions, (N, C, ...).
        weight1: shape (R, C, 1, ...), of as many dimensions as ``input``, and ``input``'s dtype and device.
        bias1: shape (R,), or None.
        weight2: shape (K, R, 1, ...).
        bias2: shape (K,), or None.
        activation, gate: names of activations, see the module's documentation.
        negative_slope: of ``leaky_relu``.

    Returns:
        A contiguous tensor of shape (N, K, 1, ...) and ``input``'s dtype.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an argument that is no tensor where one is expected.
    """
    way = way_of("squeeze_excite", _NAMES, (input, weight1, weight2), (bias1, bias2))
    named = {"activation": activation, "gate": gate, "negative_slope": negative_slope}
    if way == RAW:
        try:
            y: Tensor = _op(input, weight1, bias1, weight2, bias2, **named)
            return y
        except RuntimeError as error:
            go_on_behind(error)
    reference.check_activation("squeeze_excite", activation, RuntimeError)
    reference.check_activation("squeeze_excite", gate, RuntimeError, "gate")
    check_squeeze(input, weight1, bias1, weight2, bias2)
    return twin(reference.squeeze_excite, input, weight1, bias1, weight2, bias2, **named)
