"""The benchmark program: a tiny run on the CPU has every number, its tables and its charts."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fused_conv_bn import _report, bench

TINY = ["--device=cpu", "--quick", "--max-mb=0.01", "--module-batch=1", "--repeats=1", "--commit=abc"]
PNG = b"\x89PNG"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.main(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "new" / "report.json"
    assert run(*TINY, "--json", str(path)) == 0
    return path


def test_json_has_every_number(report_file: Path) -> None:
    report = json.loads(report_file.read_text())
    assert report["commit"] == "abc"
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"]["threads"] == torch.get_num_threads()
    assert {"date", "flags", "settings", "notes", "seconds"} <= report.keys()
    assert [len(report[part]) for part in ("module", "bn_scale", "validation")] == [2, 4, 6]
    for row in report["module"] + report["bn_scale"]:
        assert {"copy", "ours", "eager"} == row["us"].keys()
        assert "compile" in row["missing"]
        assert all(0 < s["min"] <= s["median"] <= s["max"] for s in row["us"].values())
        assert row["share_of_copy_percent"] == pytest.approx(100 / row["ours/copy"])
    for check in report["validation"]:
        assert 0 <= check["ours"] <= check["limit"]
    assert report["host_us"].keys() == {"torch.mul", "eager", "ours"}
    assert report["import_ms"]["median"] > 0


def test_from_json_prints_the_tables_and_draws(
    report_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    charts = ["--charts", str(tmp_path)] if importlib.util.find_spec("matplotlib") else []
    assert run("--from-json", str(report_file), *charts) == 0
    lines = capsys.readouterr().out.splitlines()
    headers = [i for i, line in enumerate(lines) if line.split("  ")[0] == "case"]
    assert len(headers) == 2
    assert all(name in lines[headers[0]] for name in _report.HEADER)
    rows = [line for line in lines if line.startswith(("float32 ", "float16 "))]
    assert sum("n/a" in row for row in rows) == 6
    pngs = list(tmp_path.glob("*.png"))
    assert len(pngs) == (2 if charts else 0)
    assert all(png.read_bytes().startswith(PNG) for png in pngs)


def test_wrong_results_stop_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "ours_out", lambda x, bn, out: out.copy_(x))
    assert run(*TINY) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stopped before any timing: float32 nchw" in captured.err


@pytest.mark.parametrize("dtype", bench.DTYPES, ids=bench.dtype_name)
def test_cases_have_the_sizes_they_are_named_for(dtype: torch.dtype) -> None:
    cases = [case for case in bench.bn_cases(bench.SIZES, bench.DTYPES, 2**31, others=True) if case.dtype == dtype]
    assert len(cases) == 2 * (len(bench.SIZES) + 4)
    assert all(0.9 < case.bytes / case.nominal_bytes < 1.1 for case in cases)
    problem_73 = [case for case in cases if case.nominal_bytes == bench.PROBLEM_73]
    assert all(case.bytes == bench.PROBLEM_73 for case in problem_73)
