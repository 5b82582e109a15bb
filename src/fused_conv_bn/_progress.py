"""Signs of life on stderr: what a command is at, how far it is, and for how long.

On a terminal that is one line, which is drawn again every second and goes away at the end. In a log it is a line every
few seconds.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")

SECONDS = 3.0
"""Between two lines of a log."""
TERMINAL_SECONDS = 1.0

_lock = threading.RLock()
_parts: list[Part] = []  # each inside of the one before it
_end: threading.Event | None = None  # of the thread that draws


@dataclass(eq=False)
class Part:
    what: str
    total: int = 0
    done: int = 0
    note: str = ""
    began: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        count = f" {self.done}/{self.total}" if self.total else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.what}{count}{note}, {time.monotonic() - self.began:.0f} s"

    def advance(self, note: str = "") -> None:
        self.done += 1
        self.note = note


@contextlib.contextmanager
def part(what: str, total: int = 0, of_command: bool = True) -> Iterator[Part]:
    """A part of a command, from here to the end of the ``with`` block. ``total``: of the steps that advance() counts.

    of_command: False for a function, which has no command around it then, and writes nothing into logs.
    """
    global _end
    own = Part(what, total)
    if not (of_command or _parts or _is_terminal()):
        yield own
        return
    with _lock:
        _parts.append(own)
        if _end is None:
            _end = threading.Event()
            threading.Thread(target=_draw, args=(_end,), name="fused_conv_bn progress", daemon=True).start()
        if _is_terminal():
            _write(own.text())
    try:
        yield own
    finally:
        with _lock:
            _parts.remove(own)
            if not _parts and _end is not None:
                _end.set()
                _end = None
            if _is_terminal():
                _write(_parts[-1].text() if _parts else "")


def progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """``items``, each of them a step of a part."""
    if not items:
        return
    with part(what, len(items)) as own:
        for item in items:
            yield item
            own.advance()


def _draw(end: threading.Event) -> None:
    while not end.wait(TERMINAL_SECONDS if _is_terminal() else SECONDS):
        with _lock:
            if _parts and not end.is_set():
                _write(_parts[-1].text())


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _write(line: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed, or there is none
        if _is_terminal():
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{line[:width]}")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
