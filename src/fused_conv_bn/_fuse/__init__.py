"""Whole models: ``fuse`` puts the fused ops into them, and ``report`` says what came of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..conditions import compiled_by
from .compare import call_once
from .report import Report, report
from .root import freeze as freeze_roots
from .root import restore, swap

__all__ = ["Report", "fuse", "report", "thaw", "unfuse"]


_INSTEAD = {
    "TorchScript": "fuse the model that was scripted or traced",
    "torch.compile": "fuse the model itself, or compile it with backend='fused_conv_bn'",
}


def fuse(model: nn.Module, example_inputs: Any = None, *, freeze: bool = False, tune: bool = False) -> nn.Module:
    """Runs a model's convolutions with their BatchNorms, residuals and activations as fused ops. Returns the model.

    The model stays what it is: its class by isinstance(), its parameters, buffers, children, hooks and state_dict. What
    its forward computes is captured when it is called, part by part where the whole cannot be traced, and in evaluation
    mode the first call is compared with the model's own forward. :func:`unfuse` takes everything back.

    Args:
        model: an nn.Module.
        example_inputs: a tensor or a tuple of arguments to call the model with now, under ``no_grad``, in the mode that
            it is in; its buffers are left as they are. Anything else is its one argument, as a detector's list of
            images. Without them the first call captures.
        freeze: makes the model a snapshot for inference on the CPU. Each part, when it is called for the first time,
            folds BatchNorms and factors into the weights and packs them for oneDNN, in float32 and bfloat16. From then
            on it does not see changes of the parameters, until :func:`thaw` or :func:`unfuse`, or until
            ``freeze=True`` again or the model's ``load_state_dict``, for a new snapshot: :func:`report` says whether
            there were any. Results have no gradients. Parameters stay as they are.
        tune: measures which algorithm is the fastest for each convolution of that call, on the device that it is on.
            What was measured holds for all convolutions of the same shapes, dtype and layout, also in later processes:
            it is kept in the user's cache folder.

    Raises:
        TypeError: ``model`` is no module, or one whose calls a compiler makes; or its forward does not take
            ``example_inputs``, where that is neither a tensor nor a tuple, as its one argument.
        ValueError: ``tune`` without ``example_inputs``.
        RuntimeError: ``freeze``, and a module of the model is in training mode. A frozen model's calls raise it, too,
            and where an argument requires grad.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model is of type {type(model).__name__}, expected an nn.Module")
    if (compiler := compiled_by(model)) is not None:
        raise TypeError(
            f"fuse: model is of type {type(model).__name__} and compiled by {compiler}, expected an nn.Module that is "
            f"not compiled: {_INSTEAD[compiler]}"
        )
    if tune and example_inputs is None:
        raise ValueError("fuse: tune is True and example_inputs is None, expected a tensor or a tuple of arguments")
    if freeze:
        training = next((path or "the model itself" for path, m in model.named_modules() if m.training), None)
        if training is not None:
            raise RuntimeError(f"fuse: freeze is True, and {training} is in training mode, expected model.eval()")
    swap(model)
    if tune:
        from .tune import tune_cases  # which takes a tenth of the package's import

        freeze_roots(model, False)
        _call_with(model, example_inputs)
        tune_cases(model, _arguments(example_inputs))
    if freeze:
        freeze_roots(model, True)
    if example_inputs is not None:
        _call_with(model, example_inputs)
    return model


def _arguments(example_inputs: Any) -> tuple[Any, ...]:
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def _call_with(model: nn.Module, example_inputs: Any) -> None:
    """A detector takes a list of images as its one argument. What does not says so in PyTorch's words."""
    try:
        call_once(model, _arguments(example_inputs))
    except (TypeError, AttributeError) as error:
        if isinstance(example_inputs, (Tensor, tuple)):
            raise
        raise TypeError(
            f"fuse: example_inputs is of type {type(example_inputs).__name__}, which the model does not take as its "
            "one argument, expected a tensor or a tuple of arguments"
        ) from error


def thaw(model: nn.Module) -> nn.Module:
    """Makes a model that was frozen by ``fuse(model, freeze=True)`` fused and live again. Returns the model.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"thaw: model is of type {type(model).__name__}, expected an nn.Module")
    freeze_roots(model, False)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives the model back the classes that :func:`fuse` took. Returns the model.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model is of type {type(model).__name__}, expected an nn.Module")
    for m in model.modules():
        restore(m)
    return model
