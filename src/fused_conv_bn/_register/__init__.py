"""What parts of PyTorch ask about an op: one file for each of them, which registers its answers when it is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from . import autocast, fake, flops  # noqa: F401
from ._later import when_imported

when_imported("torch.distributed.tensor", lambda _: importlib.import_module(".sharding", __name__))


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export`` needs to write this package's ops as ONNX's standard operators.

    A model that is exported as it is has PyTorch's ops alone and needs nothing of this. It is for programs that keep
    this package's ops (:func:`fused_conv_bn.export_ops`)::

        torch.onnx.export(program, dynamo=True, custom_translation_table=fused_conv_bn.onnx_translations())

    Returns:
        A dictionary from each op that an evaluation graph may have to a function that writes it: ``bn_scale``,
        ``bn_scale_cat``, ``conv_bn_scale``, ``conv_bn_scale_mean``, ``conv_scale_shift``, ``fold_bn``, ``gate``,
        ``gate_conv_bn_scale``, ``max_pool2d``, ``scale_shift``, ``spatial_mean``, ``squeeze_excite``.

    Raises:
        ImportError: onnxscript is not installed.
    """
    try:
        from .onnx import translations  # takes seconds, and a package that this one does not require
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("onnx"):
            raise
        raise ImportError(
            f"onnx_translations: {error.name} is not installed, and torch.onnx.export(dynamo=True) needs it: "
            f"pip install onnx onnxscript"
        ) from None
    return translations()
