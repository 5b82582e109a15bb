"""Text has no "1 threads": whatever is counted in it is counted by one function, which knows the singular."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fused_conv_bn._count import counted

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("src", "benchmarks", "examples", "tests/fuzz")  # not those whose programs run without the package
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

COUNTED = frozenset(
    "calls channels checks combinations convolutions crops devices dimensions elements features files GPUs groups images "
    "kernels layers models modules numbers processes problems processors rounds rows steps tensors tests threads times "
    "trials values ways".split()
)


def plurals_of(source: str) -> list[str]:
    """A number that is filled in, and right behind it what it counts. Constants of the source are no such numbers."""
    found = []
    for text in ast.walk(ast.parse(source)):
        if not isinstance(text, ast.JoinedStr):
            continue
        for value, behind in zip(text.values, text.values[1:], strict=False):
            if isinstance(value, ast.FormattedValue) and isinstance(behind, ast.Constant):
                words = str(behind.value)
                is_number = value.format_spec is None and not ast.unparse(value.value).isupper()
                word = words[1:].split(" ")[0].rstrip(".,:;")
                if is_number and words.startswith(" ") and (word in COUNTED or word.endswith("(s)")):
                    found.append(f"{{{ast.unparse(value.value)}}} {word}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_counted_is_counted_by_one_function(path: Path) -> None:
    assert plurals_of(path.read_text()) == []


def test_one_and_several() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert [counted(n, "process", "processes") for n in (1, 3)] == ["1 process", "3 processes"]


def test_a_plural_is_found() -> None:
    """This test can fail."""
    assert plurals_of('f"{len(x)} rows, {n} GPU(s), {LIMIT} calls, {t:.0f} times"') == ["{len(x)} rows", "{n} GPU(s)"]
