"""What runs in the place of a group of nodes: modules that stay where they are in the model, called as one op."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..conditions import has_hooks
from ..modules import ConvBnScale2d
from .patterns import NORMS, Group, norm_act_parts

_FORWARD = nn.BatchNorm2d.forward


def block_of(group: Group, modules: dict[str, nn.Module]) -> ConvBnScale2d | NormActBlock:
    bn = modules[group.bn]
    conv = None if group.conv is None else modules[group.conv]
    return NormActBlock(conv, bn, group) if norm_act_parts(bn) else _block(conv, bn, group)


def _block(conv: nn.Module | None, bn: nn.Module, group: Group) -> ConvBnScale2d:
    """Of modules that stay where they are, and are no children of a model's because of it."""
    kind = NormBlock if conv is None else ConvBnScale2d
    block = kind.__new__(kind)
    nn.Module.__init__(block)
    block._modules.update(conv=nn.Identity() if conv is None else conv, bn=bn)
    block.scaling_factor = group.factor
    block.activation, block.negative_slope = group.activation, group.negative_slope
    block.residual_last = group.residual_last
    return block


class NormBlock(ConvBnScale2d):
    """A BatchNorm behind anything, with what follows it: one pass in evaluation, PyTorch's ops in training mode.

    Its convolution is an nn.Identity.
    """

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
            return self._forward_plain(x, residual)
        try:
            return ops.bn_scale(
                *(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.scaling_factor, bn.eps),  # type: ignore[arg-type]
                residual=residual,
                activation=self.activation,
                negative_slope=self.negative_slope,
                residual_last=self.residual_last,
            )
        except (RuntimeError, TypeError):  # what the op refuses is PyTorch's to take, or to refuse in its own words
            return self._forward_plain(x, residual)


class NormActBlock:
    """timm's BatchNormAct2d: a BatchNorm with an activation in it, of which the group knows.

    The block has a plain BatchNorm in its place, with the same tensors: those that it has whenever it is called.
    """

    def __init__(self, conv: nn.Module | None, bn: nn.Module, group: Group) -> None:
        twin = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
        nn.Module.__init__(twin)
        twin.__dict__.update(_parameters=bn._parameters, _buffers=bn._buffers)
        self.bn, self.twin, self.block = bn, twin, _block(conv, twin, group)

    def _follow(self) -> ConvBnScale2d:
        for name in ("training", "eps", "momentum", "track_running_stats", "affine", "num_features"):
            self.twin.__dict__[name] = self.bn.__dict__[name]
        return self.block

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self._follow().forward(x, residual)
        return y

    def _forward_plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._follow()._forward_plain(x, residual)
