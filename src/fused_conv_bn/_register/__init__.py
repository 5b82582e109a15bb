"""What parts of PyTorch ask about an op: one file for each of them, which registers its answers when it is imported."""

import importlib

from . import autocast, fake, flops  # noqa: F401
from ._later import when_imported

when_imported("torch.distributed.tensor", lambda _: importlib.import_module(".sharding", __name__))
