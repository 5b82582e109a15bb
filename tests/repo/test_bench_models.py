"""The benchmark's whole models: rivals that are asked for or left out, training steps, JAX, and what fails."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from bench_models import tiny
from benching import call
from benchmarks import documents, model_rivals, models, record
from benchmarks.common import MB
from benchmarks.models import ModelCase
from fused_conv_bn._fuse import gates

TINY = ModelCase("tiny", "bench_models:tiny", 2, torch.float32, size=12)


def run(monkeypatch: pytest.MonkeyPatch, path: Path, device: str, cases: list[ModelCase], *arguments: str) -> int:
    monkeypatch.setattr(models, "model_cases", lambda device, quick, words: cases)
    monkeypatch.setattr(models, "FOOTPRINT", MB)
    own = ["--only=models", f"--device={device}", "--repeats=1", "--quick", f"--record={path}"]
    return call(*own, *arguments)


def test_rows_have_every_form_and_why_others_are_missing(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    cases = [TINY, replace(TINY, layout="nchw"), replace(TINY, train=True, dtype=torch.bfloat16)]
    assert run(monkeypatch, path, device, cases) == 0
    found = record.read(path)
    on_cuda = device == "cuda"
    evaluation, _, step = found["models"]
    assert [row["case"] for row in found["models"]] == [
        "tiny batch 2 float32 12x12",
        "tiny batch 2 float32 nchw 12x12",
        "tiny batch 2 bfloat16 train 12x12",
    ]
    timed = {"fused", "eager", *(("graphed", "eager graphed", "cudnn graphed") if on_cuda else ("frozen",))}
    compiled = {"compile graphed", "autotune graphed"} if on_cuda else {"compile freezing"}
    assert timed | {"copy of 1 MB"} == evaluation["us"].keys()
    assert evaluation["missing"].keys() == compiled | {"jax"}
    assert evaluation["missing"]["jax"] == "benchmarks/jax_models.py does not have it"
    best = "graphed" if on_cuda else "frozen"
    times = {name: of["median"] for name, of in evaluation["us"].items()}
    assert evaluation["best rival/ours"] == times[evaluation["best rival"]] / times[best]
    assert evaluation[f"eager/{best}"] == times["eager"] / times[best]
    assert {"eager", "fused"} <= step["us"].keys()
    assert step["missing"].keys() == {"compile"} and step["errors"].keys() >= {"eager", "fused"}
    assert all(sum(row["groups"].values()) == 3 for row in found["models"])
    assert found["validation"]["count"] == 3
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("case  "))
    assert "best rival / ours" in header


def test_rivals_are_left_out_by_name(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    assert run(monkeypatch, path, device, [TINY], "--rivals=jax") == 0
    found = record.read(path)
    (row,) = found["models"]
    assert "eager" not in row["us"] and row["missing"]["eager"] == models.LEFT_OUT and "best rival" not in row
    assert row["errors"]["eager"] > 0, "what is ours is held to it"
    out = capsys.readouterr().out
    assert "tiny batch 2 float32 12x12: n/a for eager: left out by --rivals" in out and "left out  " in out
    assert "| left out |" in documents.SECTIONS["models"](found).splitlines()[2]
    with pytest.raises(SystemExit):
        call("--rivals=eager,nothing")
    assert "'nothing' is none of eager, cudnn, compile, autotune, jax" in capsys.readouterr().err


def test_a_model_that_fails_leaves_the_others_their_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    broken = replace(TINY, name="broken", source="bench_models:missing")
    assert run(monkeypatch, path, "cpu", [broken, TINY], "--rivals=eager") == 1
    found = record.read(path)
    assert [row["model"] for row in found["models"]] == ["tiny"]
    assert found["failed"] == {"broken batch 2 float32 12x12": "ImportError: no such package"}
    assert "not measured: broken batch 2 float32 12x12: ImportError: no such package" in capsys.readouterr().err


def test_a_model_that_is_wrong_has_no_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
        return nn.Sequential(model, nn.Threshold(-1e9, 0.0), Larger())

    class Larger(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.001

    monkeypatch.setattr(fcb, "fuse", wrong)
    path = tmp_path / "record.jsonl"
    assert run(monkeypatch, path, "cpu", [TINY], "--rivals=eager") == 1
    assert "tiny batch 2 float32 12x12: relative error 0.001, allowed " in record.read(path)["failed"][str(TINY)]
    assert not record.read(path).get("models")


def test_a_rival_that_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiler(wrong: Callable[[nn.Module], Callable[..., Tensor]]) -> Any:
        return lambda self, model, inputs, modes: ({name: wrong(model) for name in modes}, {})

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no graph\nfor this")

    for wrong, expected in (
        (lambda model: lambda x: 2 * model(x), "its error is 1, eager's "),
        (lambda model: fails, "RuntimeError: no graph"),
    ):
        monkeypatch.setattr(models.Compiler, "__call__", compiler(wrong))
        assert run(monkeypatch, tmp_path / "record.jsonl", "cpu", [TINY], "--rivals=compile") == 0
        (row,) = record.read(tmp_path / "record.jsonl")["models"]
        assert row["missing"]["compile freezing"].startswith(expected) and "compile freezing" not in row["us"]


def test_a_training_step_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def all_of(self: Any, functions: dict[str, Any], first_call: Callable[[Any], object]) -> Any:
        first_call(functions["compile"])
        return functions, {}

    monkeypatch.setattr(models.Compiler, "all_of", all_of)
    case = replace(TINY, train=True, dtype=torch.bfloat16)
    assert run(monkeypatch, tmp_path / "record.jsonl", "cpu", [case]) == 0
    (row,) = record.read(tmp_path / "record.jsonl")["models"]
    assert row["errors"]["compile"] == row["errors"]["eager"] and "compile" in row["us"]


def test_cudnn_s_ops_compute_the_model(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which has no such ops, its convolution with a bias stands for them."""
    torch.manual_seed(0)
    model, x = TINY.prepared(device)
    with torch.no_grad():
        expected = model.double()(x.double())
        y = model_rivals.cudnn_model(model.float(), x)(x)
    assert (y - expected).norm() < (1e-2 if device == "cuda" else 1e-5) * expected.norm()


def test_residuals_and_relu_go_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, *window: Any) -> Tensor:
        seen.append("relu")
        return F.conv2d(x, weight, bias, *window).relu()

    def conv_add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *window: Any) -> Tensor:
        seen.append("add relu")
        return (F.conv2d(x, weight, bias, *window) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    monkeypatch.setattr(model_rivals, "on_cuda", lambda x: True)
    torch.manual_seed(0)
    model, x = TINY.prepared("cpu")
    with torch.no_grad():
        expected, y = model(x), model_rivals.cudnn_model(model, x)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert seen == ["relu", "add relu"]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.conv, self.bn = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x * self.narrow(x.mean((2, 3), keepdim=True)).sigmoid())).relu()


def test_a_gate_is_multiplied_before_cudnn_s_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "DEVICES", ("cpu", "cuda"))
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        expected, found = model(x), model_rivals.cudnn_model(model, x)
        assert "gate conv bn relu" in fcb.report(found).groups()
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)


def test_jax_is_missing_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(None), torch.ones(1, 3, 12, 12)

    def why(name: str, x: Tensor) -> str:
        with pytest.raises(model_rivals.NoRivalError) as caught:
            model_rivals.jax_result(name, model, x, 1, 1)
        return str(caught.value)

    assert why("tiny", x) == "benchmarks/jax_models.py does not have it"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why("ResNet-50", x) == "jax is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert why("ResNet-50", x.bfloat16()) == "numpy has no such dtype"


def test_what_happens_in_jax_s_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it ends, and that JAX is for another device."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)), torch.ones(1, 3, 12, 12)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def process(code: int, result: dict[str, Any] | None) -> Any:
        def run(command: list[str], **named: Any) -> Any:
            if result is not None:
                (Path(command[-1]) / "result.json").write_text(json.dumps(result))
            return type("Done", (), {"returncode": code, "stderr": "Traceback\nValueError: no device\n"})()

        return run

    for code, result, expected in (
        (1, None, "its process ended with 1: ValueError: no device"),
        (0, {"problem": "JAX runs on cpu here"}, "JAX runs on cpu here"),
    ):
        monkeypatch.setattr(model_rivals.subprocess, "run", process(code, result))
        with pytest.raises(model_rivals.NoRivalError, match=expected), torch.no_grad():
            model_rivals.jax_result("ResNet-50", model, x, 1, 1)


def test_model_cases() -> None:
    cases = models.model_cases("cuda", quick=False)
    assert len({str(case) for case in cases}) == len(cases)
    assert sum(case.train for case in cases) == 1 and sum(case.layout == "nchw" for case in cases) == 1
    assert [case.name for case in models.model_cases("cuda", False, ["resnet-18", "vgg"])] == ["ResNet-18", "VGG11-BN"]
    assert len(models.model_cases("cuda", quick=True)) == 1
