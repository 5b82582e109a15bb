"""The benchmark of KernelBench's problems: a tiny run has every row, a wrong model none, and tables count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from benching import call
from benchmarks import documents, kernelbench, record
from benchmarks.kernelbench import ProblemCase
from benchmarks.kernelbench_problems import Made, Problem, Sizes


def tiny(s: Sizes) -> Made:
    c = s.width(8)
    return nn.Sequential(nn.Conv2d(3, c, 3), nn.BatchNorm2d(c), nn.ReLU()), (2, 3, 8, 8)


PROBLEM = Problem(2, 999, "tiny", tiny)


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> int:
    monkeypatch.setattr(kernelbench, "PROBLEMS", (PROBLEM,))
    own = ["--only=kernelbench", "--device=cpu", "--repeats=1", "--problems=tiny", f"--record={path}"]
    return call(*own, *arguments)


def test_both_modes_have_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    assert run(monkeypatch, path, "--quick") == 0
    found = record.read(path)
    assert [row["case"] for row in found["kernelbench"]] == ["2-999 tiny / 8 train", "2-999 tiny / 8 eval"]
    for row in found["kernelbench"]:
        assert row["us"].keys() == {"eager", "fused"} and row["missing"].keys() == {"compile"}
        assert row["eager/fused"] == row["us"]["eager"]["median"] / row["us"]["fused"]["median"]
        assert row["groups"] == {"conv bn relu": 1} and row["judged"]["ours"] < 1 and row["shape"] == [2, 3, 8, 8]
    assert found["validation"]["count"] == 2 and found["notes"]["kernelbench"] == kernelbench.NOTES
    out = capsys.readouterr().out
    assert "n/a for compile: limit of 0 s of compile time reached" in out
    assert documents.SECTIONS["problems"](found).count("2-999 tiny / 8") == 2
    means = documents.SECTIONS["problem_means"](found).splitlines()
    assert means[-2].startswith("| train |") and means[-1].startswith("| eval |") and means[-1].endswith("| 1 of 1 |")


def test_torch_compile_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    assert run(monkeypatch, path, "--quick", "--rivals=eager") == 0
    assert {row["missing"]["compile"] for row in record.read(path)["kernelbench"]} == {"left out by --rivals"}
    assert "n/a for compile" not in capsys.readouterr().out


def test_a_model_that_is_wrong_has_no_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Larger(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.model(x) * 1.001
            return y

    def wrong(model: nn.Module, *arguments: Any) -> nn.Module:
        return Larger(model).train(model.training)

    monkeypatch.setattr(fcb, "fuse", wrong)
    path = tmp_path / "record.jsonl"
    assert run(monkeypatch, path, "--quick", "--rivals=eager") == 1
    found = record.read(path)
    assert not found.get("kernelbench") and len(found["failed"]) == 2
    assert "relative error 0.001, allowed " in found["failed"]["2-999 tiny / 8 train"]
    assert "not measured: 2-999 tiny / 8 eval" in capsys.readouterr().err


def test_a_check_leaves_the_statistics() -> None:
    case = ProblemCase(PROBLEM, train=True)
    model, x = case.prepared("cpu")
    fused = fcb.fuse(case.prepared("cpu")[0])
    bench = kernelbench.ProblemBench("cpu", 1, None, None)  # type: ignore[arg-type]
    errors, judged = bench.judge(case, model, fused, x)
    assert 0 < errors["eager"] < 1e-6 and judged["truth"] > 0
    for m in (model, fused):
        assert int(m[1].num_batches_tracked) == 0 and not m[1].running_mean.any()
    assert torch.equal(case.prepared("cpu")[1], x)


def test_cases() -> None:
    assert len(kernelbench.problem_cases("cuda", quick=False)) == 60
    assert {case.small for case in kernelbench.problem_cases("cuda", quick=False)} == {1}
    quick = kernelbench.problem_cases("cpu", quick=True)
    assert len(quick) == 6 and {case.small for case in quick} == {8}
    assert [str(case) for case in kernelbench.problem_cases("cuda", False, ["resnet-18"])] == [
        "3-9 ResNet-18 train",
        "3-9 ResNet-18 eval",
    ]
