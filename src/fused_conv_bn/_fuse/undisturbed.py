"""Calls of a model that leave no trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .classes import ClassAttributes


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Calls of a model that leave its buffers, what forwards count in its classes and the random state as they were,
    under ``no_grad``."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    places = [(m._buffers, dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not (b.is_meta or torch.nn.parameter.is_lazy(b))]
    classes = ClassAttributes(model)
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            classes.restore()
            for place, of_place in places:
                if any(place.get(name) is not b for name, b in of_place.items()):
                    place.update(of_place)
            for b, before in buffers:
                if not _is_equal(b, before):
                    b.data.copy_(before)  # counts as no change: what a call before has saved is as it was


def _is_equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except torch.OutOfMemoryError:  # an answer takes memory, and a copy none
        return False
