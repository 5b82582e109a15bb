"""A group as a snapshot for inference on the CPU: BatchNorm folded into the weight, and that packed once.

What runs is this package's own kernel, or a primitive of oneDNN: a convolution with a bias, and post-ops for the
residual and the activation. The ops are those that inductor's freezing uses. In channels_last oneDNN adds a bias behind
all products, so that a shift may be one. Where nothing can be packed the live block runs.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._dispatch import keywords
from ..conditions import conv_output_size
from .blocks import Block, CatNormBlock, ConvBlock, ConvNormBlock, NormBlock
from .patterns import Group

Call: TypeAlias = Callable[..., Tensor]
PostOp: TypeAlias = tuple[str, list[float], str]
"""An activation in oneDNN: its name, its numbers and its algorithm."""

_ops = torch.ops.fused_conv_bn
_conv_packed = _ops._conv_packed.default._op
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_REFUSALS = RuntimeError, TypeError
_POST_OPS: dict[str, PostOp] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "hardsigmoid": ("hardsigmoid", [], ""),
    "tanh": ("tanh", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}
_AFTER_A_RESIDUAL = {"none": None, "relu": "relu"}
"""Those that oneDNN's op has behind a residual."""


def frozen_call(block: Block, group: Group) -> Call:
    """What runs for one group in a snapshot, without gradients, in the place of ``block.forward``."""
    if not block.is_quick or (block.bn_twin is not None and block.bn_twin.training):
        return block.forward
    if isinstance(block, CatNormBlock):
        return _FrozenCat(block).forward
    if isinstance(block, NormBlock):
        return _FrozenNorm(block).forward
    if isinstance(block, (ConvNormBlock, ConvBlock)) and type(block.conv_twin) is nn.Conv2d:
        return _FrozenConv(block, group).forward
    return block.forward


@functools.cache
def _has_packing() -> bool:
    """Whether this build of PyTorch has the ops, and the processor the instructions that make the bias come last."""
    pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.aten, "mkldnn_reorder_conv2d_weight")
        and pointwise is not None
        and {"default", "binary"} <= set(pointwise.overloads())
        and _bias_comes_last()
    )


def _takes(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return supported is not None and bool(supported())
    return dtype == torch.float32


def _pack(weight: Tensor, window: tuple[list[int], list[int], list[int], int], input_size: list[int]) -> Tensor:
    packed: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight.default(weight.to_mkldnn(), *window, input_size)
    return packed


def _bias_comes_last() -> bool:
    """Asks oneDNN: 1x1, 3x3 and depthwise convolutions of small products and a large bias.

    Added first, the bias would round every partial sum, which shows as an error of many of its last bits.
    """
    generator = torch.Generator().manual_seed(0)
    for channels, kernel, groups in ((256, 1, 1), (64, 3, 1), (64, 3, 64)):
        x = torch.rand(1, channels, 6, 6, generator=generator)
        weight = torch.rand(32 if groups == 1 else channels, channels // groups, kernel, kernel, generator=generator)
        bias = torch.full((weight.shape[0],), 2.0**14)
        padding = kernel // 2
        exact = F.conv2d(x.double(), weight.double(), bias.double(), 1, padding, 1, groups)
        window = [padding] * 2, [1, 1], [1, 1], groups
        y = torch.ops.mkldnn._convolution_pointwise.default(
            x, _pack(weight, window, list(x.shape)), bias, *window, "none", [], ""
        )
        # The products' sum is below 2**10, of which the last bits do not matter; one rounding of the result is 2**-10.
        if float((y.double() - exact).abs().max()) > 1.25 * 2.0**-10:
            return False
    return True


class _FrozenNorm:
    """A BatchNorm alone, folded on the first call."""

    def __init__(self, block: NormBlock) -> None:
        self.block = block
        self.folded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        block = self.block
        if type(x) is not Tensor or x.dim() not in block.dimensions or _is_any_autocast_enabled():
            return block.forward(x, residual)
        try:
            if self.folded is None:
                with torch.inference_mode(False), torch.no_grad():
                    self.folded = _affine(block, None)
            y: Tensor = _ops.scale_shift.default._op(x, *self.folded, residual=residual, **block.named)
            return y
        except _REFUSALS:
            return block.forward(x, residual)


class _FrozenCat:
    """The same of inputs that are concatenated. Its op takes a BatchNorm: one that the affine is all of."""

    def __init__(self, block: CatNormBlock) -> None:
        self.block = block
        self.folded: tuple[Tensor, ...] | None = None

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        block = self.block
        if any(type(t) is not Tensor or t.dim() not in block.dimensions for t in x) or _is_any_autocast_enabled():
            return block.forward(x, residual)
        try:
            if self.folded is None:
                with torch.inference_mode(False), torch.no_grad():
                    scale, shift = _affine(block, None)
                    self.folded = torch.zeros_like(scale), torch.ones_like(scale), scale, shift
            y: Tensor = _ops.bn_scale_cat.default._op(x, *self.folded, 1.0, 0.0, **block.named)
            return y
        except _REFUSALS:
            return block.forward(x, residual)


def _affine(block: Block, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a block's BatchNorm and its factor."""
    p, b = block.bn_twin._parameters, block.bn_twin._buffers
    tensors = b["running_mean"], b["running_var"], p["weight"], p["bias"]
    return ops.fold_bn(*tensors, block.factor, block.bn_twin.eps, conv_bias)


class _FrozenConv:
    """A convolution with what follows it, packed on the first call: for its dtype, and for its size in the first place.

    Other sizes run with the same weight, calls of another dtype, on another device or under autocast the live block.
    """

    def __init__(self, block: Block, group: Group) -> None:
        self.block, self.group = block, group
        self.lock = threading.Lock()
        self.dtype: torch.dtype | None = None  # what is packed
        self.run: Call = block.forward

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor or not x.is_cpu or _is_any_autocast_enabled() or x.dim() != 4:
            return self.block.forward(x, residual)
        if x.dtype is not self.dtype and not self._packed_for(x):
            return self.block.forward(x, residual)
        try:
            return self.run(x, residual)
        except _REFUSALS:
            return self.block.forward(x, residual)

    def _packed_for(self, x: Tensor) -> bool:
        """Whether the weight is packed for such calls, after packing it where this is the first one."""
        with self.lock:
            c = self.block.conv_twin._parameters
            if self.dtype is None and x.numel() > 0 and c["weight"].is_cpu and c["weight"].dtype == x.dtype:
                with torch.inference_mode(False), torch.no_grad():
                    run = self._packed(x, c["weight"].detach(), c["bias"])
                if run is not None:
                    self.run, self.dtype = run, x.dtype
            return self.dtype is x.dtype

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Call | None:
        block, conv = self.block, self.block.conv_twin
        if block.bn_twin is not None:
            scale, shift = _affine(block, bias)
            weight = weight.float() * scale[:, None, None, None]
        else:
            shift = torch.zeros(weight.shape[0]) if bias is None else bias.detach().float() * block.factor
            weight = weight.float() * block.factor
        if x.dtype == torch.float32 and _own_kernel_takes(conv, x.shape):
            window = conv.stride, conv.padding, conv.dilation
            return PackedConv(weight, shift, window, conv.groups, **block.named)
        if _takes(x.dtype) and _has_packing():
            return _one_dnn(block, self.group, weight.to(x.dtype).contiguous(), shift.to(x.dtype), list(x.shape))
        return None


# ---- this package's kernel -------------------------------------------------------------------------------------------


def _own_kernel_takes(conv: Any, size: Sequence[int]) -> bool:
    """Whether it computes such convolutions and is preferred. ``size``: of the input.

    Against oneDNN's op, on vectors of 8 (AMD Zen 2, one thread, 37 layers of ResNets, MobileNetV2 and
    EfficientNet-B0) it takes 0.36 to 1.05 of the time, depthwise 0.53 to 0.96. Not so for large images where the last
    tile of output channels is half empty, or where the rows of a filter are short (1.16 to 1.27). On vectors of 16 (AMD
    Zen 5, two threads, 77 layers) it takes 0.21 to 1.01, depthwise 0.43 to 1.10, and not so for larger filters of many
    products (1.01 to 1.22) and large batches (1.12).
    """
    tile = _ops._packed_channels.default()
    if not tile:
        return False
    images, channels, height, width = size
    if conv.groups == 1:
        taps, filters = conv.kernel_size[0] * conv.kernel_size[1], conv.out_channels
        if tile == 16:
            row = conv.kernel_size[1] * channels
            wasteful = -filters % tile * 5 > filters or (conv.kernel_size[0] > 1 and row < tile)
            dear = wasteful and height * width > 256
        else:
            pixels = images * height * width // (conv.stride[0] * conv.stride[1])
            dear = pixels * channels * taps * filters > 2**24 if taps > 1 else pixels * (channels + filters) > 2**23
        return bool(conv.dilation[1] == 1 and not (dear and _has_packing()))
    return bool(conv.groups == conv.in_channels == conv.out_channels and channels % 8 == 0)


class PackedConv:
    """The op and its arguments."""

    def __init__(self, weight: Tensor, shift: Tensor, window: Any, groups: int = 1, **named: Any) -> None:
        tile = _ops._packed_channels.default()
        self.filters = weight.shape[0]
        self.shift = F.pad(shift, (0, -self.filters % tile))
        if groups == 1:  # (tiles, R, S, C, tile)
            whole = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -self.filters % tile))
            self.weight = whole.view(-1, tile, *weight.shape[1:]).permute(0, 3, 4, 2, 1).contiguous()
        else:  # (R, S, C)
            self.weight = weight[:, 0].permute(1, 2, 0).contiguous()
        self.window, self.named = [list(values) for values in window], named

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = _conv_packed(
            x, self.weight, self.shift, self.filters, *self.window, residual=residual, **self.named
        )
        return y


def packed_conv(call: Call) -> PackedConv | None:
    """What a group's call in a snapshot runs, where that is this kernel and its weight is packed."""
    frozen = getattr(call, "__self__", None)
    return frozen.run if isinstance(frozen, _FrozenConv) and isinstance(frozen.run, PackedConv) else None


# ---- oneDNN ----------------------------------------------------------------------------------------------------------


def _one_dnn(block: Block, group: Group, weight: Tensor, bias: Tensor, input_size: list[int]) -> Call:
    conv = block.conv_twin
    window = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
    packed, size = _pack(weight, window, input_size), weight.shape
    # What is no post-op of oneDNN is one pass behind, in place.
    name, slope = group.activation, group.negative_slope
    op = ("leaky_relu", [slope], "") if name == "leaky_relu" else _POST_OPS.get(name)
    adds = group.residual is not None
    adds_inside = adds and name in _AFTER_A_RESIDUAL and not group.residual_last and conv.groups == 1
    after_residual = _AFTER_A_RESIDUAL.get(name)
    behind = {}
    if op is None or (adds and not group.residual_last):
        op, behind = _POST_OPS["none"], keywords(None, name, slope, group.residual_last)
    needs_pass = bool(behind) or (adds and not adds_inside)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    unary, binary, pass_behind = pointwise.default._op, pointwise.binary._op, _ops.scale_shift_.default._op

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor
        if adds_inside:
            # oneDNN would take one that is broadcast, or that broadcasts the result.
            if list(residual.shape) != conv_output_size(x.shape, size, window[1], window[0], window[2]):  # type: ignore[union-attr]
                raise RuntimeError("the residual is of another shape")
            y = binary(x, residual, packed, bias, *window, "add", None, after_residual, [], None)
            return y
        y = unary(x, packed, bias, *window, *op)
        if needs_pass:
            pass_behind(y, None, None, residual=residual, **behind)
        return y

    return run


class Versions:
    """Which parameters and buffers a snapshot was made from, and of which version each was. Calls do not ask."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.of = [weakref.ref(m) for m in dict.fromkeys(modules)]
        self.seen = [(weakref.ref(t), _version(t)) for t in self._tensors()]

    def have_changed(self) -> bool:
        """Whether one was replaced, or written to by an op that autograd sees: ``.data`` has a counter of its own."""
        now = self._tensors()
        if len(now) != len(self.seen):
            return True
        return any(ref() is not t or version != _version(t) for (ref, version), t in zip(self.seen, now, strict=True))

    def _tensors(self) -> list[Tensor]:
        modules = [m for ref in self.of if (m := ref()) is not None]
        return [t for m in modules for d in (m._parameters, m._buffers) for t in d.values() if t is not None]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # inference tensors have none


# ---- calls of a frozen root ------------------------------------------------------------------------------------------


def refuse_training(root: nn.Module) -> None:
    """A snapshot has no statistics to update."""
    path = next((path for path, m in root.named_modules() if m.training), None)
    if path is not None:
        name = f"its module {path}" if path else "it"
        raise RuntimeError(f"the model is frozen and {name} is in training mode, expected eval(), or thaw(model) first")


def run_frozen(root: nn.Module, values: tuple[Any, ...], call: Callable[[], Any]) -> Any:
    """A call without gradients, whose results have the memory format that the arguments have."""
    if root.training:
        refuse_training(root)
    if torch.is_grad_enabled():
        for v in torch.utils._pytree.tree_leaves(values):
            if isinstance(v, Tensor) and v.requires_grad:
                raise RuntimeError(
                    "the model is frozen and computes no gradients, and an argument requires grad: call thaw(model) "
                    "first, or pass argument.detach()"
                )
    with torch.no_grad():
        result = call()
    if any(isinstance(v, Tensor) and _is_channels_last(v) for v in values):
        return result
    if type(result) is Tensor:
        return result.contiguous() if _is_channels_last(result) else result
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.contiguous() if _is_channels_last(t) else t, result)


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
