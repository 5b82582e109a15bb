"""What runs in the place of a group of nodes: modules that stay where they are in the model, called as one op."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops, reference
from ..modules import ConvBnScale2d
from .capture import has_hooks
from .patterns import NORMS, Group, norm_act_parts

_FORWARD = nn.BatchNorm2d.forward


def block_of(group: Group, modules: dict[str, nn.Module]) -> ConvBnScale2d | NormBlock | NormActBlock:
    bn = modules[group.bn]
    if norm_act_parts(bn):
        twin = twin_of(bn)
        parts = modules | {group.bn: twin}
        inner = NormBlock(twin, group) if group.conv is None else _conv_block(group, parts)
        return NormActBlock(bn, twin, inner)
    return NormBlock(bn, group) if group.conv is None else _conv_block(group, modules)


def _conv_block(group: Group, modules: dict[str, nn.Module]) -> ConvBnScale2d:
    assert group.conv is not None
    block = ConvBnScale2d.__new__(ConvBnScale2d)
    nn.Module.__init__(block)
    block._modules.update(conv=modules[group.conv], bn=modules[group.bn])
    _set_epilogue(block, group)
    return block


def _set_epilogue(block: ConvBnScale2d | NormBlock, group: Group) -> None:
    block.scaling_factor = group.factor
    block.activation, block.negative_slope = group.activation, group.negative_slope
    block.residual_last = group.residual_last


def plain_of(block: ConvBnScale2d | NormBlock | NormActBlock, x: Tensor, residual: Tensor | None) -> Tensor:
    """What PyTorch's own ops make of the same."""
    return block._forward_plain(x, residual) if isinstance(block, ConvBnScale2d) else block.plain(x, residual)


def twin_of(bn: nn.Module) -> nn.BatchNorm2d:
    """A plain BatchNorm with the same tensors: those that ``bn`` has whenever it is called."""
    twin = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    nn.Module.__init__(twin)
    twin.__dict__.update(_parameters=bn._parameters, _buffers=bn._buffers)
    return twin


class NormActBlock:
    """timm's BatchNormAct2d: a BatchNorm with an activation in it, of which the group knows."""

    def __init__(self, bn: nn.Module, twin: nn.BatchNorm2d, inner: ConvBnScale2d | NormBlock) -> None:
        self.bn, self.twin, self.inner = bn, twin, inner

    def _follow(self) -> None:
        for name in ("training", "eps", "momentum", "track_running_stats", "affine", "num_features"):
            self.twin.__dict__[name] = self.bn.__dict__[name]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._follow()
        return self.inner.forward(x, residual)

    def plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        self._follow()
        return plain_of(self.inner, x, residual)


class NormBlock:
    """A BatchNorm behind anything, with what follows it: one pass in evaluation, PyTorch's ops in training mode."""

    scaling_factor: float
    activation: str
    negative_slope: float
    residual_last: bool

    def __init__(self, bn: nn.Module, group: Group) -> None:
        self.bn = bn
        _set_epilogue(self, group)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bn = self.bn
        if (
            bn.training
            or bn.running_mean is None
            or type(bn) not in NORMS
            or has_hooks(bn)
            or "forward" in bn.__dict__
            or type(bn).forward is not _FORWARD
            or x.device.type not in ("cpu", "cuda")
            or (residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype))
        ):
            return self.plain(x, residual)
        try:
            return ops.bn_scale(
                *(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.scaling_factor, bn.eps),  # type: ignore[arg-type]
                residual=residual,
                activation=self.activation,
                negative_slope=self.negative_slope,
                residual_last=self.residual_last,
            )
        except (RuntimeError, TypeError):  # what the op refuses is PyTorch's to take, or to refuse in its own words
            return self.plain(x, residual)

    def plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = self.bn(x)
        if self.scaling_factor != 1.0:
            y = y * self.scaling_factor
        if residual is not None and not self.residual_last:
            y = y + residual
        y = reference.activate(y, self.activation, self.negative_slope)
        return y + residual if residual is not None and self.residual_last else y
