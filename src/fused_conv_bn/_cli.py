"""What the programs of this package and of its source tree have in common: how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from . import _interrupt


class UsageError(Exception):
    """What is wrong with a command line, in one sentence."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run(program: str, main: Callable[[], int]) -> int:
    """The exit status of ``main``. What a user can do wrong, and what the system refuses, ends in one sentence."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as `>&-` does it
            setattr(sys, name, open(os.devnull, "w"))
    try:
        try:
            with _interrupt.raised():
                return main()
        finally:  # --help leaves by SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough: `| head`
        drop_unwritten_output()
        return 141  # as of a program that SIGPIPE ends
    except (UsageError, OSError) as error:
        drop_unwritten_output()
        print(f"{program}: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return _interrupt.STATUS


def drop_unwritten_output() -> None:
    """Leaves nothing that Python would write once more, and fail, when it ends: its exit status would then be 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reason(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def why_not_writable(path: Path) -> str:
    """Why there cannot be such a file, or nothing. Asked before minutes of work, and leaves all files as they are."""
    try:
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        return reason(error)
    return ""
