"""The README's tables of the benchmark are those of benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fused_conv_bn import _report, bench

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("record", ["h200.json", "h200_conv.json", "h200_train.json", "cpu.json"])
def test_readme_has_the_tables_of_the_record(record: str) -> None:
    path = ROOT / "benchmarks" / "results" / record
    readme = (ROOT / "README.md").read_text()
    rendered = _report.render(readme, bench.readme_sections(json.loads(path.read_text())))
    assert readme == rendered, f"run: python -m fused_conv_bn bench --from-json {path} --readme README.md"
