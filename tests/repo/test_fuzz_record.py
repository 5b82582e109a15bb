"""What the fuzzer records: as the benchmarks do, a line that says what ran where, then a line a row."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz import __main__ as program


def test_record(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.jsonl"
    arguments = ["--device", "cpu", "--first", "0", "--count", "5", "--only", "scale_shift", "--commit", "abc"]
    assert program.main([*arguments, "--record", str(path)]) == 0
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert (header["commit"], header["fuzzed"], header["first"]) == ("abc", "cpu", 0) and header["last"] >= 4
    assert header["versions"]["torch"] and header["device"]["name"] and header["problems"] == 5
    assert sum(row["problems"] for row in rows) == 5
    assert all(row["part"] == "problems" and row["outcome"] == "held" and "scale_shift" in row["op"] for row in rows)
