"""Tables as text."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]

LOG_WIDTH = 120
"""Of a table that goes to a file or a pipe."""


def table(rows: Rows, numbers_from: int | None = None, width: int | None = None) -> str:
    """Columns of equal width; those from ``numbers_from`` on are flushed right.

    What is wider than ``width`` (default: the terminal) is several tables, one below the other, each with the first
    column.
    """
    width = width or shutil.get_terminal_size((LOG_WIDTH, 0)).columns
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = len(widths) if numbers_from is None else numbers_from
    return "\n\n".join(
        "\n".join(
            "  ".join(row[i].rjust(widths[i]) if i >= right else row[i].ljust(widths[i]) for i in columns).rstrip()
            for row in rows
        )
        for columns in _blocks(widths, width)
    )


def _blocks(widths: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each table. One that is too wide by itself stands alone beside the first."""
    blocks = [[0]]
    for i in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[j] + 2 for j in blocks[-1]) + widths[i] > width:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks
