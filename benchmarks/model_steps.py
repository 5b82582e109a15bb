"""The benchmark's training step of a whole model: forward in autocast, and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_conv_bn._fuse.undisturbed import undisturbed
from fused_conv_bn._model_times import FACTOR, LARGE, norm_error

NOTES = {
    "step": "train: forward in training mode, in autocast to the dtype with float32 parameters, and backward of a "
    "gradient of the result that is always the same, over the number of images; without a loss, an optimiser and the "
    "scaling of gradients. fused: of fuse(model); graphed and eager graphed: graphs of forward and of backward, with "
    "copies of gradients. errors: the norm of the difference of all gradients over their norm in float64; what is "
    f"ours must be within max({FACTOR} * eager's, {LARGE}), as in python -m fused_conv_bn bench.",
}

Step = Callable[[], object]


class ModelStep:
    """Steps of models that are alike: each sets the gradients of its parameters, and updates running statistics."""

    def __init__(self, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        self.model, self.x, self.dtype = model.train(), x, dtype
        with undisturbed(model):
            y = self.forward(model)
        self.dy = torch.randn_like(y) / len(y)

    def forward(self, model: nn.Module) -> Tensor:
        with torch.autocast(self.x.device.type, self.dtype, cache_enabled=False):  # a graph must not have another's
            y: Tensor = model(self.x)
        return y

    def copied(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def step_of(self, model: Any) -> Step:
        """``model``: a module, or what torch.compile makes of one."""
        parameters = list(model.parameters())

        def step() -> None:
            for p in parameters:
                p.grad = None
            with torch.enable_grad():
                y = self.forward(model)
            y.backward(self.dy)

        return step

    def truth(self) -> list[Tensor]:
        model = self.copied().double()
        with torch.enable_grad():
            y: Tensor = model(self.x.double())
        y.backward(self.dy.double())
        return gradients(model)

    def error(self, model: nn.Module, step: Step, truth: list[Tensor]) -> float:
        """Of what the step leaves in the model's parameters."""
        with undisturbed(model):
            step()
            return norm_error(gradients(model), truth)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in model.parameters()]


def limit(eager: float) -> float:
    return max(FACTOR * eager, LARGE)
