"""The benchmark's convolutions, activations and grad mode: every row has its numbers, wrong results stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fused_conv_bn as fcb
from benching import SMALL, TINY, call, small_cases
from benchmarks import conv, host, record, run
from benchmarks.layers import ConvCase
from benchmarks.stopwatch import Stopwatch
from fused_conv_bn import reference

# ---- convolutions ----------------------------------------------------------------------------------------------------


def small_train_cases(group: str, device: str) -> list[ConvCase]:
    plain = ConvCase("small, training", SMALL[3], 2, torch.float32, "nchw", with_op=True)
    return [
        *(replace(plain, layer=layer, train=True, with_op=False) for layer in SMALL),
        *(replace(plain, layer=layer, train=True, with_op=False, dtype=torch.float16) for layer in SMALL),
        *(replace(plain, train=True, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
    ]


def test_every_kind_of_convolution(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "conv_cases", small_cases)
    monkeypatch.setattr(run, "Stopwatch", lambda device, max_calls=5: Stopwatch(device, 5))
    path = tmp_path / "report.jsonl"
    arguments = ["--only=resnet50", "--compile-budget=0", "--repeats=1", f"--record={path}"]
    with fcb.use_algorithm("depthwise"):  # what is measured is the rule
        assert call(*arguments, f"--device={device}") == 0
        if device == "cuda":
            assert torch.ops.fused_conv_bn._use_algorithm("", "")[0] == "depthwise"
    found = record.read(path)
    assert not {"bn_scale", "host", "import_ms"} & found.keys()
    rows = found["conv"]
    assert len(rows) == len(small_cases("", device))
    expected = {"copy", "ours", "eager", "conv", *(("aten", "cudnn") if device == "cuda" else ())}
    assert all(expected <= row["us"].keys() for row in rows)
    assert all(bool(row["algorithm"]) == (device == "cuda") for row in rows)
    assert "op" in rows[-1]["us"]
    if device == "cuda":
        assert "stem_sm80" in rows[-1]["us"]
        assert "does not cover" in rows[-1]["missing"]["depthwise"]
    out = capsys.readouterr().out
    assert any(line.split()[:2] == ["small", str(len(rows))] for line in out.splitlines())


def test_every_kind_of_convolution_in_training(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "conv_cases", small_train_cases)
    monkeypatch.setattr(run, "Stopwatch", lambda device, max_calls=5: Stopwatch(device, 5))
    path = tmp_path / "report.jsonl"
    arguments = ["--only=train", "--compile-budget=0", "--repeats=1", f"--record={path}"]
    assert call(*arguments, f"--device={device}") == 0
    found = record.read(path)
    assert not {"bn_scale", "bn_scale_train", "conv", "host"} & found.keys()
    rows = found["train"]
    assert len(rows) == len(small_train_cases("", device))
    expected = {"copy", "ours", "eager", "conv", *(("aten",) if device == "cuda" else ())}
    assert all(expected <= row["us"].keys() and "cudnn" not in row["us"] for row in rows)
    assert all(bool(row["algorithm"]) == (device == "cuda") for row in rows)
    assert all("op" in row["us"] for row in rows[-2:])
    assert any(line.startswith("small, training  ") for line in capsys.readouterr().out.splitlines())


def test_the_host_s_times(device: str) -> None:
    with torch.no_grad():
        rows = {row["case"]: row for row in host.time_host(Stopwatch(device), device, rounds=1, calls=2)}
    assert all(row["us"] >= row["min"] > 0 for row in rows.values())
    own = [name for name in rows if name.endswith(", own kernel")]
    assert len(own) == (6 if device == "cuda" else 0) and len(rows) == 2 + 2 * 12 + len(own)
    assert sum("over op" in row for row in rows.values()) == (4 if device == "cuda" else 2)


def test_grad_mode_is_on_for_the_calls_that_are_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def call(name: str) -> Callable[[int], object]:
        return lambda i: seen.update({name: torch.is_grad_enabled()})

    names = ("torch.mul", "a, grad mode", "a, grad mode, eager")
    monkeypatch.setattr(host, "bn_calls", lambda device: {name: call(name) for name in names})
    monkeypatch.setattr(host, "conv_calls", lambda device, train: {})
    with torch.no_grad():
        host.time_host(Stopwatch("cpu"), "cpu", rounds=1, calls=1)
    assert list(seen.values()) == [False, True, True]


def test_a_convolution_s_batch_is_that_of_all_images() -> None:
    case = ConvCase("", SMALL[3], 5, torch.float32, "nchw", train=True)
    with torch.no_grad():
        problem = conv.Problem(case, "cpu")
        truth, _ = problem.truth()
        plain = problem.plain.double()
        expected = plain(problem.x.double())[[0, 2, 4]]
    torch.testing.assert_close(truth, expected)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_eager_s_and_the_op_s_activation_is_the_row_s(activation: str) -> None:
    case = ConvCase("", replace(SMALL[1], activation=activation), 2, torch.float64, "nchw")
    with torch.no_grad():
        problem = conv.Problem(case, "cpu")
        errors = problem.errors({"eager": problem.plain, **problem.ours(), "op": problem.op})
    assert errors.keys() == {"eager", "ours", "pair", "op"}
    assert all(error < 1e-13 for of_call in errors.values() for error in of_call.values())


# ---- every activation, grad mode -------------------------------------------------------------------------------------


def test_every_activation(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = replace(SMALL[0], activation="none"), replace(SMALL[2], activation="none")
    cases = [
        ConvCase("activations", layer, 2, dtype, layout, forced=("aten",) if device == "cuda" else ())
        for layer, dtype, layout in zip(layers, (torch.float32, torch.float16), ("nchw", "channels_last"), strict=True)
    ]
    monkeypatch.setattr(run, "activation_cases", lambda device, quick: cases)
    monkeypatch.setattr(run, "Stopwatch", lambda device, max_calls=5: Stopwatch(device, 5))
    path = tmp_path / "report.jsonl"
    assert call("--only=activations", "--repeats=1", f"--record={path}", f"--device={device}") == 0
    found = record.read(path)
    rows = found["activations"]
    assert [row["activation"] for row in rows] == 2 * list(reference.ACTIVATIONS)
    assert len({row["case"] for row in rows}) == len(rows) == 24
    for row in rows:
        own = {"ours", *(("aten",) if device == "cuda" else ()), *(("pair",) if row["activation"] == "relu" else ())}
        assert row["us"].keys() == {"copy", "conv", *own}
        assert ("ours/aten" in row) == (device == "cuda") == bool(row["algorithm"])
        relu = next(r for r in rows if r["activation"] == "relu" and r["dtype"] == row["dtype"])
        assert row["ours/relu"] == row["us"]["ours"]["median"] / relu["us"]["ours"]["median"]
    assert found["validation"]["count"] == 2 * 2 * (12 * (2 if device == "cuda" else 1) + 1)
    lines = capsys.readouterr().out.splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("activations: ")]
    assert len(tables) == (4 if device == "cuda" else 2)
    for i in tables:
        assert lines[i + 1].split() == ["case", "algorithm", *reference.ACTIVATIONS]
        assert lines[i + 3].startswith("7x7/2 3->6 13x13 batch 2 float32 nchw  ")
        assert lines[i + 4].startswith("3x3/2 8 depthwise 9x9 batch 2 float16 channels_last  ")


def test_a_wrong_activation_stops_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op = conv.Problem.op
    monkeypatch.setattr(
        conv.Problem,
        "op",
        lambda self, x, activation: op(self, x, None, activation.replace("gelu_tanh", "gelu")),
    )
    assert call(*TINY, "--device=cpu", "--only=activations") == 1
    assert "any timing: 3x3/2 3->32 224x224 gelu_tanh batch 1 float32 nchw, ours, by norm" in capsys.readouterr().err


def small_grad_cases(device: str) -> list[ConvCase]:
    case = ConvCase("grad mode", SMALL[3], 3, torch.float32, "nchw", train=True)
    return [case, replace(case, train=False), replace(case, dtype=torch.bfloat16, layout="channels_last")]


def test_grad_mode(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "grad_mode_cases", small_grad_cases)
    monkeypatch.setattr(run, "Stopwatch", lambda device, max_calls=5: Stopwatch(device, 5))
    path = tmp_path / "report.jsonl"
    arguments = ["--only=grad_mode", "--quick", "--repeats=1", f"--record={path}", f"--device={device}"]
    assert call(*arguments) == 0
    found = record.read(path)
    rows = found["grad_mode"]
    assert [row["grad_fn"] for row in rows] == ["BnScaleTrainBackward", "BnScaleBackward", "BnScaleTrainBackward"]
    for row in rows:
        assert row["us"].keys() == {"copy", "ours", "eager", "no_grad"} and row["missing"].keys() == set()
        assert row["ours/no_grad"] == row["us"]["ours"]["median"] / row["us"]["no_grad"]["median"]
        assert ("kernelbench" in row) == row["train"]
    timed = rows[0]["kernelbench"]
    assert timed["eager/ours"] == timed["us"]["eager"]["mean"] / timed["us"]["ours"]["mean"]
    assert found["validation"]["count"] == 2 * 4 + 2  # outputs in two measures, in training two statistics
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("grad mode on, forward alone (no_grad: ours under it)")
    assert [sum(line.startswith(str(case)) for line in lines[begin:]) for case in small_grad_cases(device)] == [2, 3, 2]
