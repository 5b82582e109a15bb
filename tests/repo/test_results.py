"""The documents' tables of the benchmark are those of benchmarks/results, whose records are short."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import documents, record

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted(record.RESULTS.glob("*.jsonl"))


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_document_has_the_tables_of_the_records(name: str) -> None:
    text = (ROOT / name).read_text()
    assert text == documents.render(text), f"run: python -m benchmarks --render {name}"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_as_the_program_writes_it(path: Path) -> None:
    found = record.read(path)
    assert "".join(f"{line}\n" for line in record.lines(found)) == path.read_text()
    assert {"commit", "date", "device", "versions", "flags", "settings", "notes", "validation"} <= found.keys()


def test_no_row_is_there_twice() -> None:
    """Of the same commit, part, group and case."""
    rows = []
    for path in RECORDS:
        found = record.read(path)
        rows += [
            (found["commit"], found["device"]["name"], part, row.get("group"), row["case"])
            for part in record.PARTS
            for row in found.get(part, [])
        ]
    assert len(rows) == len(set(rows)) > 900


def test_records_are_short() -> None:
    """All layers of ten networks at four batches are 1100 rows."""
    assert sum(len(path.read_text().splitlines()) for path in RECORDS) < 4000
