"""Fused models under ``torch.export`` where ``export_ops()`` keeps the ops: the graph of an earlier call goes into the
program, each group as its op.

Tensors are torch.export's then, and have no values: nothing can be captured or compared.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn

from .. import conditions
from .capture import Arguments, Refused


def run_exported(root: nn.Module, state: Any, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The graph where a call like this one was captured, and still holds; else the class' own forward."""
    if not _may_be_fused(root, state):
        return own(root, *args, **kwargs)
    try:
        arguments = Arguments(inspect.signature(own), root, args, kwargs)
    except (TypeError, Refused):
        return own(root, *args, **kwargs)
    key = arguments.call_key(root)
    entry = next((e for e in state.entries.get(key, ()) if e.guard.holds_but_for_tensors(root)), None)
    if entry is None and key not in state.refused:
        warnings.warn(
            f"fused_conv_bn: {type(root).__name__} was not called like this after fuse(), so that the program has "
            f"PyTorch's ops for it: call the model once before torch.export, in the same grad mode",
            stacklevel=2,
        )
    if entry is None or not entry.groups or entry.unchecked:
        return own(root, *args, **kwargs)
    return entry.run_groups(root, entry.quick, *arguments.tensors.values())


def _may_be_fused(root: nn.Module, state: Any) -> bool:
    """Under strict=True dynamo sees the forward itself. Snapshots, and what trains, are exported as they are."""
    if torch.compiler.is_dynamo_compiling() or state.frozen or state.reason is not None or root.training:
        return False
    return state.owner() is root and not conditions.hooks_for_all()
