"""Which block runs in the place of a group."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from .blocks import Block, CatNormBlock, ConvBlock, ConvNormBlock, NormBlock, PoolBlock, StepsBlock
from .gates import GateBlock, GatedConvBlock
from .patterns import Group
from .squeezes import SqueezeBlock, SqueezedBlock


def block_of(group: Group, module: Callable[[fx.Node | None], nn.Module | None], bn: nn.Module | None) -> Block:
    """``module``: the one that a node calls."""
    conv = module(group.conv)
    if group.squeeze is not None:
        return SqueezeBlock(group, conv, module(group.squeeze.excite.conv))
    if group.is_gate:
        return GateBlock(group, None, None)
    if group.gate is not None:
        return GatedConvBlock(group, conv, bn)
    if group.pooling is not None:
        return PoolBlock(group, None, None)
    if bn is None:
        return ConvBlock(group, conv, None)
    if group.steps:
        return StepsBlock(group, conv, bn)
    if conv is None:
        return CatNormBlock(group, None, bn) if group.concatenates else NormBlock(group, None, bn)
    return SqueezedBlock(group, conv, bn) if group.is_squeezed else ConvNormBlock(group, conv, bn)
