"""The fuzzer in several processes: one record of all, what fails in any of them, and a sanitizer's findings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fuzz import many


def test_one_record_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "many.jsonl"
    arguments = ["--device", "cpu", "--count", "40", "--processes", "2", "--first", "0", "--record", str(record)]
    assert many.main([*arguments, "--commit", "abc"]) == 0
    header, *rows = (json.loads(line) for line in record.read_text().splitlines())
    assert header["commit"] == "abc" and header["processes"] == 2 and header["lost_processes"] == 0
    assert header["problems"] == sum(row["problems"] for row in rows) == 40
    assert {row["part"] for row in rows} == {"problems"}
    # Two runs of seeds, as the one process has them.
    assert header["first"] == 0 and header["last"] >= 16 * 20 + 19
    assert "fuzz: 40 problems in" in capsys.readouterr().out


SANITIZER = """#!/bin/sh
# Runs what it is given, and finds what FINDS says.
while [ "$1" != "--print-limit" ]; do echo "$1"; shift; done
shift 2
"$@" || exit $?
echo "========= ERROR SUMMARY: $FINDS errors"
[ "$FINDS" = 0 ] || exit 66
"""


@pytest.mark.parametrize("finds", ["0", "3"])
def test_a_sanitizer(
    finds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FINDS", finds)
    record = tmp_path / "memcheck.jsonl"
    arguments = ["--device", "cpu", "--count", "4", "--processes", "2", "--sanitizer", "memcheck"]
    assert many.main([*arguments, "--record", str(record)]) == (0 if finds == "0" else 1)
    header = json.loads(record.read_text().splitlines()[0])
    assert header["sanitizer"] == "memcheck" and header["findings"] == {f"ERROR SUMMARY: {finds} errors": 2}
    printed = capsys.readouterr().out
    assert f"2 x ERROR SUMMARY: {finds} errors" in printed
    assert printed.count("========= ERROR SUMMARY: 3 errors") == (0 if finds == "0" else 2)


def test_processes_that_end_early_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert many.main(["--device", "cpu", "--count", "2", "--processes", "2", "--sanitizer", "racecheck"]) == 1


def test_there_is_no_sanitizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert many.main(["--sanitizer", "memcheck"]) == 2
    assert "--sanitizer needs compute-sanitizer" in capsys.readouterr().err
