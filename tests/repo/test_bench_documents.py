"""The benchmark program's records, and the tables that documents have of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benching import call
from benchmarks import documents, record


def test_a_record_is_a_header_and_a_line_a_row(report_file: Path, tmp_path: Path) -> None:
    header, *rows = map(json.loads, report_file.read_text().splitlines())
    assert not header.keys() & set(record.PARTS)
    assert [row["part"] for row in rows] == sorted((row["part"] for row in rows), key=record.PARTS.index)
    assert len({(row["part"], row["case"]) for row in rows}) == len(rows)
    record.write(record.read(report_file), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == report_file.read_text()


def test_the_nearest_check_is_kept() -> None:
    checks = [{"ours": 1.0, "limit": 4.0}, {"ours": 0.5, "limit": 0.6}, {"ours": 2.0, "limit": 3.0}]
    assert record.summary(checks) == {"count": 3, "nearest": checks[1]}
    assert record.summary([]) == {"count": 0, "nearest": None}


def test_a_commit_is_that_of_the_package_s_own_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fused_conv_bn.__file__", str(tmp_path / "fused_conv_bn" / "__init__.py"))
    assert record.git_state() == (None, None)


def test_the_tables_of_a_document(report_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", report_file.parent)
    document = tmp_path / "README.md"
    document.write_text(
        "above\n<!-- conv report -->old<!-- /conv report -->\nbelow\n<!-- train report --><!-- /train report -->\n"
    )
    for _ in range(2):  # the second time over its own
        assert call("--render", str(document)) == 0
        evaluation, training = document.read_text().split("<!-- train report -->")
        above, begin, *rows, end, below = evaluation.splitlines()
        assert (above, begin, end, below) == ("above", "<!-- conv report -->", "<!-- /conv report -->", "below")
        assert [row.split(" | ")[0] for row in rows] == [
            "| us",
            "|---|---|---|---|---|---|---|---|",
            "| 3x3 8->64 128x128 batch 1 float32 nchw",
            "| 3x3 8->64 128x128 batch 1 float32 channels_last",
        ]
        assert len({row.count("|") for row in rows}) == 1
        header, _, *rows, end = training.splitlines()[1:]
        assert header == "| us | floor | copy of y | **ours** | eager | torch.compile | convolution alone |"
        assert [row.split(" | ")[0] for row in rows] == [
            "| 3x3 8->64 128x128 batch 1 float32 nchw train",
            "| 3x3 8->64 128x128 batch 1 float32 channels_last train",
        ]


def test_every_section_of_a_run(report_file: Path) -> None:
    found = record.read(report_file)
    lines = {
        name: documents.SECTIONS[name](found).splitlines()
        for name in ("origin", "bn_scale", "bn_scale_train", "conv_means", "train_means", "host")
    }
    assert {name: len(of_section) for name, of_section in lines.items()} == {
        "origin": 1,
        "bn_scale": 2 + 4,
        "bn_scale_train": 2 + 3,
        "conv_means": 2 + 1,
        "train_means": 2 + 1,
        "host": 2 + len(found["host"]),
    }
    assert f"torch {torch.__version__}; commit abc, " in lines["origin"][0]
    assert lines["conv_means"][-1].startswith("| problem 73 | 2 | ")


def test_the_factors_of_activations() -> None:
    def row(activation: str, factor: float, dtype: str = "float16", batch: int = 2) -> dict[str, Any]:
        shape = [batch, 3, 8, 8]
        return {"activation": activation, "dtype": dtype, "shape": shape, "algorithm": "a", "ours/relu": factor}

    rows = [
        row("relu", 1.0),
        row("silu", 1.25),
        row("silu", 1.5),
        row("silu", 9.0, batch=1),
        row("silu", 2.0, "float32"),
    ]
    assert documents.activations({"activations": rows}).splitlines() == [
        "| ours / ours with ReLU | `a`, 16 bits | `a`, float32 |",
        "|---|---|---|",
        "| `relu` | 1.00 to 1.00 |  |",
        "| `silu` | 1.25 to 1.50 | 2.00 to 2.00 |",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file has no markers"),
        ("<!-- conv cpu -->", "must have <!-- conv cpu --> and then <!-- /conv cpu -->"),
        ("<!-- /conv cpu --><!-- conv cpu -->", "must have <!-- conv cpu --> and then"),
        ("<!-- conv cpu --><!-- train cpu --><!-- /conv cpu -->", "must have <!-- conv cpu --> and then"),
        ("<!-- nothing cpu --><!-- /nothing cpu -->", "a marker names nothing, expected one of origin, "),
        ("<!-- conv none --><!-- /conv none -->", "the marker conv none needs .*none.jsonl, and there is no such file"),
    ],
)
def test_markers_that_nothing_can_be_rendered_for(text: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        documents.render(text)
