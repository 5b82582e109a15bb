"""The benchmark's steps: every row has its numbers and its line of a table, wrong gradients stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benching import SMALL, TINY, call
from benchmarks import common, conv, documents, record, report_steps, run, steps
from benchmarks.layers import PROBLEM_73, ConvCase, StepCase
from benchmarks.stopwatch import Stopwatch


def small_step_cases(device: str) -> list[StepCase]:
    small = ConvCase("small, step", SMALL[3], 3, torch.float32, "nchw", train=True, count=2)
    both = ("compile", "ours compiled")
    problem = ConvCase("problem 73, step", PROBLEM_73, 2, torch.float32, "nchw")
    return [
        StepCase(small, x=False),
        StepCase(replace(small, layer=SMALL[1], dtype=torch.bfloat16, layout="channels_last"), compiled=both),
        StepCase(replace(small, layer=SMALL[2])),
        StepCase(problem, frozen=True),
        StepCase(problem, x=False),
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "selected_steps", lambda args, device: small_step_cases(device))
    monkeypatch.setattr(run, "Stopwatch", lambda device, max_calls=5: Stopwatch(device, 5))


def fake_compile(function: Callable[..., Tensor], **arguments: Any) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs)


def test_steps(
    small: None, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", fake_compile)
    path = tmp_path / "report.jsonl"
    assert call("--only=steps", "--repeats=1", f"--record={path}", f"--device={device}") == 0
    found = record.read(path)
    rows = found["steps"]
    assert [row["case"] for row in rows] == [str(step) for step in small_step_cases(device)]
    parameters = {"conv.weight", "bn.weight", "bn.bias"}
    with_bias = {"conv.weight", "conv.bias", "bn.weight", "bn.bias"}
    assert [row["errors"].keys() for row in rows] == [
        parameters,
        {*parameters, "x", "residual"},
        {*parameters, "x"},
        {"conv.weight", "conv.bias", "x"},
        with_bias,
    ]
    for row, step in zip(rows, small_step_cases(device), strict=True):
        rivals = {"ours", "eager", *step.compiled}
        assert row["us"].keys() == {"copy", *rivals}
        assert row["peak_mb"].keys() == (rivals if device == "cuda" else set())
        assert row["eager/ours"] == row["us"]["eager"]["median"] / row["us"]["ours"]["median"]
        assert ("compile/ours compiled" in row) == bool(step.compiled) == (not row["missing"])
    assert found["validation"]["count"] == sum(len(row["errors"]) for row in rows)
    assert found["notes"]["steps"] == steps.NOTES and found["compile_s"]["steps"] > 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("steps, forward and backward (MB: peak): layers in training mode")
    assert lines[begin + 3].startswith(str(small_step_cases(device)[0])) and "n/a" in lines[begin + 3]
    assert "n/a" not in lines[begin + 4].replace("n/a", "", 0 if device == "cuda" else 2)
    assert any(line.startswith("problem 73, step ") for line in lines)
    assert len(documents.SECTIONS["steps"](found).splitlines()) == 2 + 2
    assert len(documents.SECTIONS["layer_steps"](found).splitlines()) == 2 + 3
    assert len(documents.SECTIONS["step_means"](found).splitlines()) == 2 + 2
    assert "times eager's; the largest factor is " in documents.SECTIONS["worst_step"](found)


def test_compiled_with_both(small: None, tmp_path: Path) -> None:
    """By torch.compile itself: one backward differentiates both, and neither was compiled anew while it was timed."""
    step = small_step_cases("cpu")[1]
    compiler = common.Compiler(600)
    torch._dynamo.reset()
    with torch.no_grad():
        row = steps.StepBench("cpu", 1, compiler, Stopwatch("cpu", 5)).row(step)
    if row["missing"]:
        pytest.skip(f"torch.compile does not work here: {row['missing']}")
    assert row["compile/ours compiled"] > 0 and row["compile_s"] == compiler.spent > 0
    torch._dynamo.reset()


def test_wrong_gradients_stop_the_program(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = steps.gradients

    def wrong(function: Any, owner: nn.Module, *arguments: Any) -> dict[str, Tensor]:
        found = right(function, owner, *arguments)
        return found if isinstance(function, conv.Plain) else {**found, "bn.weight": found["bn.weight"] * 1.01}

    monkeypatch.setattr(steps, "gradients", wrong)
    assert call(*TINY, "--device=cpu", "--only=steps") == 1
    assert "float32 nchw train, gradient of bn.weight: " in capsys.readouterr().err


def test_records_from_before() -> None:
    """Problem 73's steps in the rows of grad_mode."""

    def step(ours: float, eager: float) -> dict[str, Any]:
        us = {"ours": {"median": ours}, "eager": {"median": eager}}
        return {"us": us, "eager/ours": eager / ours, "peak_mb": {"ours": 10.0, "eager": 20.0}}

    old = {"grad_mode": [{"case": "a", "step": {"without x": step(1, 2), "with x": step(2, 3)}}, {"case": "b"}]}
    header, lines = report_steps.steps(old)
    assert [line[0] for line in lines] == ["a, without x", "a, with x"] and len(header) == len(lines[0])
    assert lines[1][1:3] == ["2.0", "3.0"] and lines[1][3] == "n/a"
    assert report_steps.layer_steps(old)[1] == []


def test_whether_a_step_is_slower() -> None:
    def row(name: str, factor: float) -> dict[str, Any]:
        return {"case": name, "eager/ours": factor}

    def said(*factors: float) -> str:
        return report_steps.worst_step({"steps": [row(str(f), f) for f in factors]})

    assert said(1.5, 0.98) == "None of 2 steps takes more than 1.03 times eager's; the largest factor is 1.020, 0.98."
    assert said(0.5, 1.0).startswith(
        "1 of 2 steps takes more than 1.03 times eager's; the largest factor is 2.000, 0.5"
    )


def names(cases: Sequence[StepCase]) -> list[str]:
    return [str(step) for step in cases]


def test_what_is_compiled_with_both_is_timed_first() -> None:
    seen: list[str] = []

    class Recorder(steps.StepBench):
        def row(self, step: StepCase) -> dict[str, Any]:
            seen.append(str(step))
            return {"case": str(step)}

    cases = small_step_cases("cpu")
    rows = Recorder("cpu", 1, common.Compiler(0), Stopwatch("cpu", 5)).time(cases)
    assert [row["case"] for row in rows] == names(cases) and seen[0] == str(cases[1])
