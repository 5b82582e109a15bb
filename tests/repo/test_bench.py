"""The benchmark program: a tiny run on the CPU has every number, its tables and its charts."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benching import TINY, call, small_cases
from benchmarks import __main__, bn_scale, conv, layers, pools, record, report, report_conv
from benchmarks.common import (
    COMPILE_MODES,
    MB,
    MOMENTUM,
    Compiler,
    InaccurateError,
    batch_moments,
    check,
    dtype_name,
    statistics_errors,
)
from benchmarks.layers import Layer
from benchmarks.stopwatch import Stopwatch, kernelbench_us
from fused_conv_bn import reference
from fused_conv_bn._table import table

PNG = b"\x89PNG"
MODES = [mode or "" for mode, _ in COMPILE_MODES.values()]


def test_json_has_every_number(report_file: Path) -> None:
    found = record.read(report_file)
    assert found["commit"] == "abc"
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"]["threads"] == torch.get_num_threads()
    assert {"date", "flags", "settings", "notes", "seconds"} <= found.keys()
    assert found["compile_s"] == {
        "bn_scale": 0,
        "conv": 0,
        "train": 0,
        "grad_mode": 0,
        "steps": 0,
        "models": 0,
        "kernelbench": 0,
        "cat_gate": 0,
    }
    convolutions, trained = found["conv"], found["train"]
    assert [len(rows) for rows in (convolutions, trained, found["bn_scale"], found["bn_scale_train"])] == [2, 2, 4, 3]
    # Of each convolution, the module, the op and in evaluation the pair, each in two measures; in training also of two
    # running statistics.
    assert found["validation"]["count"] == 4 + 3 * 3 + 2 * 3 * 2 + 2 * 2 * 4 + 6 * 3
    assert [row["shape"] for row in found["short_planes"][-2:]] == [[8, 512, 7, 7], [128, 1000]]
    for row in found["short_planes"]:
        assert row["ours/batch_norm"] == row["us"]["ours"]["median"] / row["us"]["batch_norm"]["median"]
    for row in found["bn_scale_train"]:
        assert {"copy", "ours", "eager"} == row["us"].keys()
        assert row["missing"].keys() == {"compile"}
        assert row["bytes_moved"] == 3 * row["tensor_bytes"]
        assert row["share_of_floor_percent"] == pytest.approx(150 / row["ours/copy"])
    for row in found["bn_scale"]:
        assert {"copy", "ours", "eager"} == row["us"].keys()
        assert "compile" in row["missing"]
        assert row["share_of_copy_percent"] == pytest.approx(100 / row["ours/copy"])
    for row in convolutions + trained:
        train = row in trained
        ours = {"ours", "op", *(() if train else ("pair",))}
        rivals = {"eager", *(() if train else ("folded",))}
        assert {"copy", "conv", *rivals, *ours} == row["us"].keys()
        assert row["missing"].keys() == ({"compile"} if train else {"compile", "compile freezing"})
        assert row["case"].endswith(" train") == train
        assert row["best rival/ours"] == min(row[f"{name}/ours"] for name in rivals)
        assert row["eager/ours"] == row["us"]["eager"]["median"] / row["us"]["ours"]["median"]
        assert row["flop"] == 2 * 64 * 126**2 * 8 * 9
        assert row["bytes"] == (8 * 128**2 + 64 * 126**2 + 64 * 8 * 9) * getattr(torch, row["dtype"]).itemsize
        assert row["share_of_floor_percent"] == 100 * max(row["floor_us"].values()) / row["us"]["ours"]["median"]
        assert row["errors"].keys() == {*rivals, *ours}
        if not train:  # it is the same layer: what rounding the folded weight costs
            assert row["errors"]["folded"]["norm"] <= 4 * torch.finfo(getattr(torch, row["dtype"])).eps
        measures = {"norm", "element", *(("running_mean", "running_var") if train else ())}
        assert all(of_call.keys() == measures for of_call in row["errors"].values())
    for row in found["bn_scale"] + found["bn_scale_train"] + found["short_planes"] + convolutions + trained:
        assert all(0 < s["min"] <= s["median"] <= s["max"] for s in row["us"].values())
    nearest = found["validation"]["nearest"]
    assert 0 <= nearest["ours"] <= nearest["limit"]
    parts = {"bn_scale", "bn_scale_train", "short_planes", "host", "conv", "train"}
    assert found["notes"].keys() == {"device time", "repeats", "buffers", "validation", *parts}
    assert found["rates"]["copy_gb_per_s"] > 0
    ops = ("bn_scale", "bn_scale_train", "conv_bn_scale", "conv_bn_scale_train")
    modules = ("ConvBnScale2d in evaluation", "ConvBnScale2d in training")
    ours = {*ops, *modules, *(f"fcb.{name}, grad mode" for name in ops), *(f"{name}, grad mode" for name in modules)}
    of_host = {row["case"]: row for row in found["host"]}
    assert of_host.keys() == {"torch.mul", "conv_scale_shift", *ours, *(f"{name}, eager" for name in ours)}
    for name in ours:
        row, eager = of_host[name], of_host[f"{name}, eager"]
        assert row["eager/ours"] == eager["us"] / row["us"] and "eager/ours" not in eager
    for name, op in zip(modules, ops[2:], strict=True):
        assert of_host[name]["over op"] == of_host[name]["us"] / of_host[op]["us"] and "over op" not in of_host[op]
    assert found["import_ms"]["median"] > 0


def test_cat_and_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    assert call("--only=cat_gate", "--quick", "--repeats=1", "--device=cpu", f"--record={path}") == 0
    found = record.read(path)
    assert [row["op"] for row in found["cat_gate"]] == ["bn_scale_cat", "gate"]
    for row in found["cat_gate"]:
        assert {"copy", "ours", "eager"} == row["us"].keys() and "compile" in row["missing"]
        assert row["eager/ours"] == row["us"]["eager"]["median"] / row["us"]["ours"]["median"]
    assert found["validation"]["count"] == 2 and "bn_scale_cat and gate" in capsys.readouterr().out


def test_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    assert call("--only=pools", "--quick", "--repeats=1", "--device=cpu", f"--record={path}") == 0
    found = record.read(path)
    of_maxima = [("max_pool2d", "train"), ("max_pool2d", "backward")]
    ops = [("max_pool2d", ""), ("spatial_mean", ""), *of_maxima]
    assert [(row["op"], row["step"]) for row in found["pools"]] == ops
    forward, _, train, backward = (row["bytes_moved"] for row in found["pools"])
    assert forward < backward < 1.1 * forward and train == 2 * backward  # a byte for each position
    for row in found["pools"]:
        assert {"copy", "ours", "eager"} == row["us"].keys()
        assert row["ours/copy"] == row["us"]["ours"]["median"] / row["us"]["copy"]["median"]
    printed = capsys.readouterr().out
    assert found["validation"]["count"] == 6 and "max_pool2d and spatial_mean" in printed
    assert "64 224x224 batch 1 float32 channels_last backward" in printed


@pytest.mark.parametrize("wrong", ["result", "gradient"])
def test_wrong_steps_of_pools_are_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = pools.PoolCase("max_pool2d", "3x3/2", 1, 8, 16, torch.float32, "nchw", "train")
    bench = pools.PoolBench("cpu", 1, Stopwatch("cpu"))
    assert [c["case"] for c in bench.check([case])] == [str(case), f"{case}, gradient"]

    def of_wrong(case: pools.PoolCase, x: Tensor) -> Tensor:
        y = pools.eager(case, x)
        return y * 1.01 if wrong == "result" else y + 0.01 * (x.sum() - x.detach().sum())

    monkeypatch.setattr(pools, "ours", of_wrong)
    with pytest.raises(InaccurateError, match="max_pool2d .* train" + (", gradient:" if wrong == "gradient" else ":")):
        bench.check([case])


def test_from_json_prints_the_tables_and_draws(
    report_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    charts = ["--charts", str(tmp_path)] if importlib.util.find_spec("matplotlib") else []
    assert call("--from-record", str(report_file), *charts) == 0
    lines = capsys.readouterr().out.splitlines()

    def header(title: str) -> str:
        return lines[next(i for i, line in enumerate(lines) if line.startswith(title)) + 1]

    assert "running_var" in header("problem 73, training") and "running_var" not in header("problem 73")
    assert all(name in header("bn_scale (") for name in report.HEADER)
    assert all(name in header("bn_scale_train (") for name in report.TRAIN_HEADER)
    assert header("bn_scale_train on the CPU, short planes").split("  ")[-1] == "ours/F.batch_norm"
    assert sum("conv_scale_shift with a fold made before; the largest of 2 is " in line for line in lines) == 1
    assert not any("one pass behind it" in line for line in lines)  # which the CPU has no row of
    begin = lines.index("accuracy: 59 checks, each within max(2 * eager's error, rounding); the nearest to that:") + 2
    below = next(i for i, line in enumerate(lines) if i >= begin and line.startswith("bn_scale ("))
    above = [line for line in lines[begin:below] if line.startswith("3x3 8->64 128x128 ")]
    rows = [line for line in lines[below:] if line.startswith(("float32 ", "float16 "))]
    assert sum("n/a" in row for row in rows) == 4 + 3
    assert len({line.split("  ")[0] for line in above}) == 2 + 2
    assert sum(line.startswith(("problem 73  ", "problem 73, training  ")) for line in lines) == 2
    assert sum(line.startswith("conv_bn_scale_train") for line in lines) == 2
    assert sum(", grad mode" in line for line in lines) == 12
    pngs = list(tmp_path.glob("*.png"))
    assert len(pngs) == (3 if charts else 0)
    assert all(png.read_bytes().startswith(PNG) for png in pngs)


def test_wrong_results_stop_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bn_scale, "ours_out", lambda x, bn, out: out.copy_(x))
    assert call(*TINY, "--device=cpu") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stopped before any timing: float32 nchw" in captured.err


def test_wrong_convolutions_stop_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conv.Problem, "op", lambda self, x: self.plain(x) * 1.0001)
    assert call(*TINY, "--device=cpu", "--only=problem_73") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stopped before any timing: 3x3 8->64 128x128 batch 1 float32 nchw, op, by norm" in captured.err


def test_wrong_batch_statistics_stop_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outputs that are right, and running statistics that were not updated."""
    arguments = [*TINY, "--device=cpu", "--only", "bn_scale_train", "train"]
    op = conv.Problem.op
    monkeypatch.setattr(conv.Problem, "op", lambda self, x: (op(self, x), self.restore())[0])
    assert call(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "any timing: 3x3 8->64 128x128 batch 1 float32 nchw train, op, by running_mean" in captured.err
    ours = bn_scale.ours_train
    monkeypatch.setattr(bn_scale, "ours_train", lambda x, bn: ours(x, [t.clone() for t in bn]))
    assert call(*arguments) == 1
    assert "any timing: float32 nchw 3x64x4x4 train, running_mean" in capsys.readouterr().err


def test_running_statistics_of_eager_are_right() -> None:
    """To two roundings, and not by the biased variance, another momentum or a NaN."""
    x, before = torch.randn(4, 5, 3, 2), [torch.randn(5), torch.rand(5) + 0.1]
    moments, eps = batch_moments(x.double()), torch.finfo(torch.float32).eps

    def errors(momentum: float, mean: Tensor | None = None) -> dict[str, float]:
        after = [t.clone() for t in before]
        reference.bn_scale_train(x, *after, momentum=momentum)
        return statistics_errors(before, after if mean is None else [mean, after[1]], moments)

    assert max(errors(MOMENTUM).values()) <= eps
    assert min(errors(0.2).values()) > 1e3 * eps
    biased = moments[0], moments[1] * 23 / 24, moments[2]
    after = [t.clone() for t in before]
    reference.bn_scale_train(x, *after, momentum=MOMENTUM)
    assert statistics_errors(before, after, biased)["running_var"] > 1e3 * eps
    nan = torch.tensor([math.nan, *after[0][1:].tolist()])
    with pytest.raises(InaccurateError):
        check("NaN", eps, {"ours": errors(MOMENTUM, nan)["running_mean"], "eager": 0.0})


@pytest.mark.parametrize("max_mb", [math.inf, 64, 0.01])
def test_training_cases_have_the_sizes_they_are_named_for(max_mb: float) -> None:
    cases = list(bn_scale.bn_train_cases(bn_scale.DTYPES, max_mb * MB, others=True))
    assert len(cases) == len({str(case) for case in cases}) == (12 if max_mb > 1 else 4)
    assert all(case.train and 0.7 < case.bytes / case.nominal_bytes < 1.2 for case in cases)
    if max_mb == math.inf:
        assert all(case.bytes == bn_scale.PROBLEM_73 for case in cases if case.main)


@pytest.mark.parametrize("dtype", bn_scale.DTYPES, ids=dtype_name)
def test_cases_have_the_sizes_they_are_named_for(dtype: torch.dtype) -> None:
    cases = [
        case for case in bn_scale.bn_cases(bn_scale.SIZES, bn_scale.DTYPES, 2**31, others=True) if case.dtype == dtype
    ]
    assert len(cases) == 2 * (len(bn_scale.SIZES) + 4)
    assert all(0.9 < case.bytes / case.nominal_bytes < 1.1 for case in cases)
    problem_73 = [case for case in cases if case.nominal_bytes == bn_scale.PROBLEM_73]
    assert all(case.bytes == bn_scale.PROBLEM_73 for case in problem_73)


def test_kernelbench_s_mean_leaves_out_the_first_trial() -> None:
    calls = []
    us = kernelbench_us(lambda: calls.append(1), False, trials=3)
    assert len(calls) == 5 + 1 + 3
    assert 0 < us["min"] <= us["mean"] <= us["max"]


def test_activation_and_grad_mode_cases() -> None:
    cases = layers.activation_cases("cuda", quick=False)
    assert len({str(case) for case in cases}) == len(cases) == 9 * 5
    assert all(case.forced == ("aten",) and case.layer.activation == "none" for case in cases)
    assert len(layers.activation_cases("cpu", quick=True)) == 2
    cases = layers.grad_mode_cases("cuda")
    assert len({str(case) for case in cases}) == 4 and {case.batch for case in cases} == {128}


def test_step_cases() -> None:
    for device, of_network, counts in (("cuda", 53, 1), ("cpu", 20 + 52, 2)):
        cases = layers.step_cases(device)
        assert len({(step.case.group, str(step)) for step in cases}) == len(cases)
        of_layers = [step for step in cases if step.in_network]
        assert len(cases) - len(of_layers) == 2 * 2 * 3  # x, dtype, mode
        assert sum(step.case.count for step in of_layers) == of_network
        assert sum(not step.x for step in of_layers) == counts, "a network's first layer has no gradient of its input"
        assert all(step.case.train for step in of_layers)
        compiled = [step for step in cases if set(step.compiled) == {"compile", "ours compiled"}]
        assert sum(step.in_network for step in compiled) == (4 if device == "cuda" else 0)
        assert any(step.frozen for step in compiled) and any(step.case.train for step in compiled)


def test_rows_that_are_too_slow_have_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, ours: float, aten: float, **others: float) -> dict[str, Any]:
        us = {"ours": ours, "aten": aten, **others}
        return {"case": name, "algorithm": "stem_sm90", "us": {who: {"median": t} for who, t in us.items()}}

    parts = {"conv": [row("a", 104, 100), row("b", 102, 100, pair=100)], "activations": [row("c", 200, 100)]}
    report_conv.print_slower(parts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "slower than 1.03 times the bare convolution with one pass behind it; the largest of 3 is 2.000, c"
    )
    assert [line.split() for line in lines[3:5]] == [
        ["c", "stem_sm90", "200.0", "100.0", "2.00"],
        ["a", "stem_sm90", "104.0", "100.0", "1.04"],
    ]
    assert lines[6] == (
        "No row is slower than 1.03 times conv_scale_shift with a fold made before; the largest of 1 is 1.020, b."
    )


def test_a_file_that_cannot_be_written_stops_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it measures; and what an earlier run wrote stays until a later one is through."""
    monkeypatch.setattr(__main__, "measure", lambda args: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "report.jsonl"):
        assert call("--record", str(path)) == 2
        assert f"benchmarks: --record is {path}, which cannot be written to: " in capsys.readouterr().err
    assert call("--charts", str(tmp_path / "file")) == 2
    assert f"benchmarks: --charts is {tmp_path / 'file'}, which cannot be written to: " in capsys.readouterr().err

    def fail(args: argparse.Namespace) -> dict[str, Any]:
        raise InaccurateError

    monkeypatch.setattr(__main__, "measure", fail)
    for path, text in ((tmp_path / "new" / "report.jsonl", None), (tmp_path / "old.jsonl", "kept")):
        if text:
            path.write_text(text)
        assert call("--record", str(path)) == 1
        assert (path.read_text() if path.exists() else None) == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from-record", "nothing.jsonl"], "nothing.jsonl: No such file or directory"),
        (["--from-record", __file__], f"--from-record is {__file__}, expected a file that --record wrote"),
        (["--render", "nothing.md"], "nothing.md: No such file or directory"),
        (["--device=cpu", "--only", "bn_scale", "--max-mb=0.001"], "nothing of bn_scale is left to measure: --max-mb"),
        (["--device=cpu", "--only", "models", "--models=none"], "nothing of models is left to measure: --max-mb"),
    ],
    ids=str,
)
def test_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"benchmarks: {words}") and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("argument", ["--max-mb=0", "--max-mb=x", "--max-mb=nan", "--repeats=0", "--conv-batch=-1"])
def test_numbers_that_make_no_sense(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(argument)
    option, value = argument.split("=")
    assert f"argument {option}: {value!r}, expected a " in capsys.readouterr().err


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(__main__, "why_no_gpu", lambda: "no GPU")
    assert call("--device=cuda") == 2
    assert capsys.readouterr().err == "benchmarks: --device is cuda: no GPU\n"


def test_tables_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the terminal, and without one into 120 columns, if a column beside the first does."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert call("--from-record", str(record.RESULTS / "h200_grad_mode.jsonl")) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")]
    assert tables and max(map(len, tables)) <= 120
    rows = [["case", "a", "b", "c"], ["x", "10", "200", "3000"]]
    assert table(rows, numbers_from=1, width=14) == "case   a    b\nx     10  200\n\ncase     c\nx     3000"
    assert table(rows, width=3).count("case") == 3


def test_folded_weights_for_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    def folded(x, weight, bias, *window):  # some libraries add a bias first, and lose digits
        return F.conv2d(x, weight, None, *window) + bias.view(-1, 1, 1)

    def conv_add_relu(x, weight, residual, alpha, bias, *window):
        assert alpha == 1
        return (folded(x, weight, bias, *window) + residual).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *arguments: folded(*arguments).relu())
    for case in small_cases("", "cpu"):
        with torch.no_grad():
            problem = conv.Problem(case, "cpu")
            y, (truth, sizes) = problem.folded_cudnn()(*problem.inputs()), problem.truth()
        error = ((y - truth.relu()).abs() / sizes).max() if case.layer.activation != "relu6" else 0.0
        assert error < 4 * torch.finfo(case.dtype).eps


def test_networks_have_the_weights_that_they_are_known_for() -> None:
    """11,689,512, 25,557,032 and 3,504,872 parameters, less those of BatchNorm and of the classifier."""
    for network, weights, mac in (
        (layers.resnet18_layers(), 11_689_512 - 9_600 - 513_000, 1.814e9),
        (layers.resnet50_layers(), 25_557_032 - 53_120 - 2_049_000, 4.087e9),
        (layers.mobilenet_v2_layers(), 3_504_872 - 34_112 - 1_281_000, 0.2995e9),
    ):
        listed = list(network)
        assert sum(torch.Size(layer.weight_shape).numel() for layer in listed) == weights
        assert sum(layer.flop for layer in listed) / 2 == pytest.approx(mac, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("group", layers.GROUPS)
def test_cases_of_a_group_differ(group: str, device: str) -> None:
    cases = layers.conv_cases(group, device)
    assert len({str(case) for case in cases}) == len(cases) > 2
    assert all(mode in COMPILE_MODES for case in cases for mode in case.compile_modes)
    if group in ("resnet50", "mobilenetv2"):
        assert sum(case.count for case in cases) == 2 * (53 if group == "resnet50" else 52)
        assert layers.COMPILED_LAYERS & {case.layer for case in cases}


def test_the_pixels_that_windows_skip_are_not_counted() -> None:
    assert Layer(8, 4, 1, 10, 2).elements == 8 * 25 + 4 * 25
    assert Layer(8, 4, 3, 10, 2, 1, residual=True).elements == 8 * 100 + 2 * 4 * 25


def test_compile_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mode has its options, which are in force where the function is first called; and there is a limit of time."""
    import torch._inductor.config as config

    seen = []

    def fake_compile(function: Callable[..., Tensor], **arguments: Any) -> Callable[..., Tensor]:
        def compiled(*inputs: Tensor) -> Tensor:
            seen.append((arguments["options"], config.freezing))
            return function(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", fake_compile)
    x = torch.ones(2)
    compiled, missing = Compiler(60)(torch.neg, [x], COMPILE_MODES)
    assert compiled.keys() == COMPILE_MODES.keys() and not missing
    assert [freezing for _, freezing in seen] == [freezing for _, freezing in COMPILE_MODES.values()]
    assert len({str(options) for options, _ in seen}) == len(COMPILE_MODES)
    assert [bool(options.get("max_autotune")) for options, _ in seen] == ["max-autotune" in name for name in MODES]
    assert [bool(options.get("triton.cudagraphs")) for options, _ in seen] == [
        name in ("reduce-overhead", "max-autotune") for name in MODES
    ]
    assert not config.freezing
    compiled, missing = Compiler(0)(torch.neg, [x], COMPILE_MODES)
    assert not compiled and missing.keys() == COMPILE_MODES.keys()
