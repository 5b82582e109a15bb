"""Numbers with what they count, in the singular where it is one."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """``"1 thread"``, ``"2 threads"``. ``many``: where the plural of ``one`` takes more than an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
