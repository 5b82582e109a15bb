"""What parts of PyTorch ask about an op: one file for each of them, which registers its answers when it is imported."""

from . import autocast, fake, flops  # noqa: F401
