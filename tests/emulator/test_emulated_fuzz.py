"""Random calls of the CUDA kernels, on the processor."""

from __future__ import annotations

from fuzz import __main__ as program


def test_some_seconds():
    assert program.main(["--device", "emulator", "--first", "0", "--count", "120", "--seconds", "40"]) == 0
