"""Ctrl-C in a command: it ends with 130, as of a program that SIGINT ends, and never with a traceback.

Importing torch takes seconds, in which no command has begun that could catch a KeyboardInterrupt. This module imports
nothing that takes long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STATUS = 130


def is_imported_by_python_m() -> bool:
    """Whether Python was started as ``python -m fused_conv_bn``, and has not come to __main__.py yet."""
    program = sys.orig_argv[-len(sys.argv) :][:1]  # what stands before the arguments: packages may import this one
    return sys.argv[:1] == ["-m"] and program in (["fused_conv_bn"], ["-mfused_conv_bn"])


def end_at_once_from_here() -> None:
    """An interruption ends the program. Where SIGINT is ignored, as under nohup, or somebody else's, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, the first interruption is a KeyboardInterrupt; a second one ends the program, as one outside does.

    Programs that did not call :func:`end_at_once_from_here` keep what they do.
    """
    ours = signal.getsignal(signal.SIGINT) is _end
    if ours:
        signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(STATUS)  # whatever runs here may catch an exception, or print it


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt
