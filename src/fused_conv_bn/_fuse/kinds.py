"""Which block runs in the place of a group."""

from __future__ import annotations

from torch import nn

from .blocks import Block, CatNormBlock, ConvBlock, ConvNormBlock, NormBlock, PoolBlock, StepsBlock
from .gates import GateBlock, GatedConvBlock
from .patterns import Group


def block_of(group: Group, conv: nn.Module | None, bn: nn.Module | None) -> Block:
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
    return ConvNormBlock(group, conv, bn)
