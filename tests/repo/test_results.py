"""The documents' tables of the benchmark are those of benchmarks/results, whose records are short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import documents, record

ROOT = Path(__file__).resolve().parents[2]
# What tests/fuzz/many.py wrote.
FUZZED = [record.RESULTS / f"h200_{name}.jsonl" for name in ("fuzz", "memcheck", "racecheck", "synccheck")]
RECORDS = sorted(set(record.RESULTS.glob("*.jsonl")) - set(FUZZED))


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_document_has_the_tables_of_the_records(name: str) -> None:
    text = (ROOT / name).read_text()
    assert text == documents.render(text), f"run: python -m benchmarks --render {name}"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_as_the_program_writes_it(path: Path) -> None:
    found = record.read(path)
    assert "".join(f"{line}\n" for line in record.lines(found)) == path.read_text()
    assert {"commit", "date", "device", "versions", "flags", "settings", "notes", "validation"} <= found.keys()


@pytest.mark.parametrize("path", FUZZED, ids=lambda path: path.stem)
def test_a_record_of_random_problems_adds_up(path: Path) -> None:
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert {
        "commit",
        "date",
        "device",
        "versions",
        "flags",
        "fuzzed",
        "first",
        "last",
        "lost_processes",
    } <= header.keys()
    assert header["problems"] == sum(row["problems"] for row in rows if row["part"] == "problems")
    failed = sum(row["problems"] for row in rows if row.get("outcome") == "failed")
    assert failed == sum(row["part"] == "failures" for row in rows)


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
