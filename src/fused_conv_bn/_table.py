"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def table(rows: Rows, numbers_from: int | None = None) -> str:
    """Columns of equal width; those from ``numbers_from`` on are flushed right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = len(widths) if numbers_from is None else numbers_from
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i >= right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
