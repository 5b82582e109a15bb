"""Whole models: ``fuse`` puts the fused ops into them, and ``report`` says what came of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .report import Report, report
from .root import freeze as freeze_roots
from .root import restore, swap, undisturbed

__all__ = ["Report", "fuse", "report", "thaw", "unfuse"]


def fuse(model: nn.Module, example_inputs: Any = None, *, freeze: bool = False, tune: bool = False) -> nn.Module:
    """Runs a model's convolutions with their BatchNorms, residuals and activations as fused ops. Returns the model.

    The model stays what it is: its class by isinstance(), its parameters, buffers, children, hooks and state_dict. What
    its forward computes is captured when it is called, part by part where the whole cannot be traced, and in evaluation
    mode the first call is compared with the model's own forward. :func:`unfuse` takes everything back.

    Args:
        model: an nn.Module.
        example_inputs: a tensor or a tuple of arguments to call the model with now, under ``no_grad``, in the mode that
            it is in; its buffers are left as they are. Without them the first call captures.
        freeze: makes the model a snapshot for inference on the CPU. Each part, when it is called for the first time,
            folds BatchNorms and factors into the weights and packs them for oneDNN, in float32 and bfloat16. From then
            on it does not see changes of the parameters, until :func:`thaw` or :func:`unfuse`, or until
            ``freeze=True`` again, for a new snapshot. Results have no gradients. Parameters stay as they are.
        tune: measures which algorithm is the fastest for each convolution of that call, on the device that it is on.
            What was measured holds for all convolutions of the same shapes, dtype and layout, also in later processes:
            it is kept in the user's cache folder.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``tune`` without ``example_inputs``.
        RuntimeError: ``freeze``, and a module of the model is in training mode. A frozen model's calls raise it, too,
            and where an argument requires grad.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model is of type {type(model).__name__}, expected an nn.Module")
    if tune and example_inputs is None:
        raise ValueError("fuse: tune is True and example_inputs is None, expected a tensor or a tuple of arguments")
    if freeze:
        training = next((path or "the model itself" for path, m in model.named_modules() if m.training), None)
        if training is not None:
            raise RuntimeError(f"fuse: freeze is True, and {training} is in training mode, expected model.eval()")
    swap(model)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if tune:
        from .tune import tune_cases  # which takes a tenth of the package's import

        freeze_roots(model, False)
        with undisturbed(model):
            model(*args)
        tune_cases(model, args)
    if freeze:
        freeze_roots(model, True)
    if example_inputs is not None:
        with undisturbed(model):
            model(*args)
    return model


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
