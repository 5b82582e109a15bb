"""fuse(tune=True): choices are measured, hold for exactly what was measured, are kept, and never make a result wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import RESIDUALS
from conv_problems import Call, check, make
from fused_conv_bn import __main__, _choices, reference
from fused_conv_bn._fuse import tune as tuning
from fused_conv_bn._stopwatch import Figure, Processors

OPS = torch.ops.fused_conv_bn
has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_vectors = pytest.mark.skipif(not has_vectors, reason="PyTorch's convolution alone covers anything without AVX2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder for each test, and libraries that know nothing before and after it."""

    def forget() -> None:
        for name in list(_choices._known):
            _choices._hand_over(name, {})
        _choices._known.clear()

    monkeypatch.setenv("FUSED_CONV_BN_CHOICES", str(tmp_path / "choices"))
    forget()
    monkeypatch.setattr(tuning, "_UNDECIDED", float("inf"))  # on a busy machine as on others
    monkeypatch.setattr(Processors, "look", lambda self: None)
    yield tmp_path / "choices"
    forget()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_ROUNDS", 1)
    monkeypatch.setattr(tuning, "_SAMPLES", 1)


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, (2, 1)),
        nn.BatchNorm2d(16),
    ]
    model = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.weight, m.bias):
                nn.init.normal_(t)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return model.eval().to(device)


X = torch.randn(2, 3, 40, 60, generator=torch.Generator().manual_seed(4))


def set_choice(algorithm: str, x: Tensor, w: Tensor, **how: Any) -> None:
    device, problem, names = OPS._candidates(x, w, **how)
    assert algorithm in names.split(",")
    _choices.add(device, {tuple(problem): algorithm})


# ---- the whole of it -------------------------------------------------------------------------------------------------

PROCESS = """
import sys, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, fused_conv_bn as fcb
assert not torch.cuda.is_initialized()
print([str(w.message) for w in seen if "fused_conv_bn" in str(w.message)])
print(fcb.explain(torch.randn(2, 3, 40, 60), torch.randn(8, 3, 3, 3), padding=1))
print(fcb.explain(torch.randn(3, 3, 40, 60), torch.randn(8, 3, 3, 3), padding=1))
"""


def in_a_new_process() -> tuple[str, str, str]:
    """Its warnings, and what it runs for the first layer: as it was tuned, and of another batch."""
    run = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    warned, first, other = run.stdout.splitlines()
    return warned, first, other


@needs_vectors
def test_the_cycle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    with torch.no_grad():
        expected = model(X)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random_state = torch.get_rng_state()
    assert fcb.fuse(model, X, tune=True) is model
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())

    problems = _choices.known("cpu")
    assert len(problems) == 3 and set(problems.values()) <= {"direct_cpu", "aten"}
    explained = fcb.explain(X, model[0].weight, padding=1)
    assert explained in ("direct_cpu, tuned", "aten, tuned")
    rows = {row.path: row for row in fcb.report(model).rows}
    assert rows["0"].algorithm == explained and rows["3"].algorithm.endswith(", tuned")
    with torch.no_grad():
        y = model(X)
    torch.testing.assert_close(y, expected, rtol=3e-6, atol=3e-6 * float(expected.abs().max()))

    (file,) = folder.iterdir()
    versions = f"choices-{fcb.__version__}-torch-{torch.__version__}-cudnn-{_choices._cudnn()}.json"
    assert file == _choices.path() and file.name == versions
    (processor,) = json.loads(file.read_text())
    assert processor.startswith("cpu ") and processor.endswith(torch.backends.cpu.get_cpu_capability())
    untuned = fcb.explain(torch.randn(3, 3, 40, 60), model[0].weight, padding=1)
    assert in_a_new_process() == ("[]", explained, untuned)

    # Another version of anything has a file of its own, and another processor a place of its own in it.
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert not _choices.path().exists() and _choices.path().parent == folder
    file.write_text(file.read_text().replace(processor, "cpu of another kind"))
    warned, first, _ = in_a_new_process()
    assert warned == "[]" and "tuned" not in first


@needs_vectors
def test_what_is_known_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(case: tuning.Case) -> None:
        measured.append(case.text())
        case.choice = "aten"

    monkeypatch.setattr(tuning, "measure", measure)
    model = network()
    fcb.fuse(model, X, tune=True)
    assert measured == [
        "2x3x40x60 float32 8 of 3x3 padding 1",
        "2x8x40x60 float32 16 of 3x3 stride 2x1",
        "2x16x19x58 float32 4 of 1x1",
    ]
    fcb.fuse(network(), X, tune=True)
    assert len(measured) == 3
    fcb.fuse(network(), torch.cat([X, X]), tune=True)
    assert len(measured) == 6 and measured[3].startswith("4x3x40x60")
    tuning.tune_cases(model, (X,), again=True)
    assert len(measured) == 9


@needs_vectors
def test_what_was_measured_before_an_interruption_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a convolution that memory does not suffice for is left to the rule."""
    ends: list[type[BaseException]] = [torch.OutOfMemoryError, KeyboardInterrupt]

    def measure(case: tuning.Case) -> None:
        if "16 of 3x3" in case.text():
            raise ends[0]
        if "4 of 1x1" in case.text():
            raise ends[1]
        case.choice = "aten"

    monkeypatch.setattr(tuning, "measure", measure)
    model = network()
    with pytest.raises(KeyboardInterrupt):
        fcb.fuse(model, X, tune=True)
    assert list(_choices._read(_choices.path())[_choices._in_file("cpu")].values()) == ["aten"]
    assert fcb.explain(X, model[0].weight, padding=1) == "aten, tuned"


def test_example_inputs_are_needed() -> None:
    model = network()
    with pytest.raises(ValueError) as caught:
        fcb.fuse(model, tune=True)
    assert str(caught.value) == (
        "fuse: tune is True and example_inputs is None, expected a tensor or a tuple of arguments"
    )
    assert type(model) is nn.Sequential


# ---- what is measured ------------------------------------------------------------------------------------------------


@needs_vectors
def test_all_ways_to_a_convolution_are_seen(quick: None) -> None:
    """The module with its quick call, functions, all forms of training; not what has no choice."""
    block = fcb.ConvBnScale2d(3, 8, 3, 2.0, activation="relu").eval()
    w = torch.randn(8, 3, 3, 3)

    class All(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = block(x) + block(x)
            y = y + fcb.conv_scale_shift(x, w, None, torch.ones(8), residual=y, activation="gelu")
            block.train()
            y = y + block(x)
            block.eval()
            for form in (OPS.conv_bn_scale_train_stats, OPS.conv_bn_scale_train_functional):
                y = y + form(x, w, None, None, None)[0]
            with torch.autocast("cpu", torch.bfloat16):
                block(x)
            block(x.to(memory_format=torch.channels_last))
            fcb.conv_scale_shift(x[..., 0], w[..., 0], None, None)
            fcb.conv_scale_shift(
                x[..., None].expand(-1, -1, -1, -1, 3), w[..., None].expand(-1, -1, -1, -1, 3), None, None
            )
            return y

    cases = tuning.cases_of(All(), (X,))
    names = [(case.text().split("3x3 ")[-1], sum(case.calls.values()), len(case.calls)) for case in cases]
    assert names == [
        ("2x3x40x60 float32 8 of 3x3", 2, 1),
        ("residual", 1, 1),
        ("training", 3, 3),
        ("2x3x40 float32 8 of 3", 1, 1),
    ]
    for case in cases:
        tuning.measure(case)
        assert set(case.times) == {"direct_cpu", "aten"} and case.choice in case.times
        assert all(0 < t.low <= t.us <= t.high for t in case.times.values())


@needs_vectors
@pytest.mark.parametrize(
    ("times", "rule", "choice"),
    [
        ({"direct_cpu": 90.0, "aten": 100.0}, "aten", "direct_cpu"),
        ({"direct_cpu": 99.0, "aten": 100.0}, "aten", "aten"),
        ({"direct_cpu": 100.0, "aten": 99.0}, "direct_cpu", "direct_cpu"),
        ({"direct_cpu": 110.0, "aten": 100.0}, "direct_cpu", "aten"),
    ],
)
def test_ties_are_the_rule_s(times: dict[str, float], rule: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {name: Figure(us, us, us) for name, us in times.items()}
    monkeypatch.setattr(tuning._Measured, "times", lambda self, names: figures)
    size = {"aten": (2, 3, 40, 60), "direct_cpu": (1, 3, 80, 200)}[rule]
    (case,) = tuning.cases_of(nn.Sequential(fcb.ConvBnScale2d(3, 32, 3).eval()), (torch.randn(size),))
    tuning.measure(case)
    assert (case.rule, case.choice) == (rule, choice)


@needs_vectors
def test_what_is_wrong_is_not_chosen(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An algorithm that is off by more than is allowed, and one that fails, however fast they are."""
    (case,) = tuning.cases_of(nn.Sequential(fcb.ConvBnScale2d(3, 32, 3).eval()), (torch.randn(1, 3, 80, 200),))
    run, explained = tuning._Measured.run, tuning._Measured.explained

    def off(self: Any) -> Tensor:
        return run(self) * (1 + 2.0**-18) if explained(self).startswith("direct_cpu") else run(self)

    def fails(self: Any) -> Tensor:
        if explained(self).startswith("direct_cpu"):
            raise RuntimeError("out of something")
        return run(self)

    for broken in (off, fails):
        monkeypatch.setattr(tuning._Measured, "run", broken)
        tuning.measure(case)
        assert case.rule == "direct_cpu" and case.choice == "aten" and set(case.times) == {"aten"}


# ---- what a choice holds for -----------------------------------------------------------------------------------------


@needs_vectors
def test_a_choice_holds_for_its_problem_alone() -> None:
    w = torch.randn(8, 3, 3, 3)
    set_choice("direct_cpu", X, w, padding=1)
    assert fcb.explain(X, w, padding=1) == "direct_cpu, tuned"
    others: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (X[:1], w, {"padding": 1}),
        (X[..., 1:], w, {"padding": 1}),
        (X[..., 1:, :], w, {"padding": 1}),
        (X[:, :2], w[:, :2], {"padding": 1}),
        (X, w[:7], {"padding": 1}),
        (X, w[..., :2], {"padding": 1}),
        (X, w, {}),
        (X, w, {"padding": (1, 2)}),
        (X, w, {"padding": 1, "stride": (2, 1)}),
        (X, w, {"padding": 1, "dilation": (2, 1)}),
        (X, w, {"padding": 1, "residual": True}),
        (X, w, {"padding": 1, "training": True}),
        (X.double(), w.double(), {"padding": 1}),
        (X.to(memory_format=torch.channels_last), w, {"padding": 1}),
    ]
    for x, weight, how in others:
        assert fcb.explain(x, weight, **how) == "aten"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert fcb.explain(X, w, padding=1) == "aten"
    finally:
        torch.set_num_threads(threads)
    set_choice("aten", X, w, padding=1)
    assert fcb.explain(X, w, padding=1) == "aten, tuned"


@needs_vectors
def test_a_choice_runs(generator: torch.Generator) -> None:
    """In evaluation and in training, where PyTorch's convolution is seen or not."""
    x, w, bn = X, torch.randn(8, 3, 3, 3), nn.BatchNorm2d(8)

    def runs_pytorchs(training: bool) -> bool:
        with torch.autograd.profiler.profile() as profile, torch.no_grad():
            if training:
                fcb.conv_bn_scale_train(x, w, None, None, None, bn.weight, bn.bias, residual=torch.ones(2, 8, 38, 58))
            else:
                fcb.conv_scale_shift(x, w, None, None)
        return any(event.name.startswith("aten::") and "conv" in event.name for event in profile.function_events)

    assert runs_pytorchs(False) and runs_pytorchs(True)
    set_choice("direct_cpu", x, w)
    assert not runs_pytorchs(False) and runs_pytorchs(True)
    set_choice("direct_cpu", x, w, has_statistics=True, has_residual=True)
    assert not runs_pytorchs(True)


# What the kernel covers and the rule leaves to PyTorch: narrow results, many terms, few channels, strides with dilation.
COVERED = {
    "32 columns": ((2, 3, 20, 32), (9, 3, 3, 3), 1, 1),
    "33 columns": ((1, 3, 6, 35), (8, 3, 3, 3)),
    "256 terms": ((1, 64, 9, 40), (17, 64, 2, 2)),
    "1x1": ((3, 256, 3, 37), (5, 256, 1, 1)),
    "1x1, stride 2": ((2, 20, 9, 81), (12, 20, 1, 1), 2),
    "one channel": ((1, 1, 5, 40), (1, 1, 3, 3), 1, 1),
    "stride 2 with dilation": ((2, 4, 30, 99), (10, 4, 3, 3), 2, (2, 3), (2, 3)),
    "rows far apart": ((1, 2, 150, 50), (4, 2, 7, 5), (3, 1), (60, 2), (40, 1)),
}


@needs_vectors
@pytest.mark.parametrize("problem", COVERED)
def test_choices_beyond_the_rule_are_accurate(problem: str, generator: torch.Generator) -> None:
    x, w, *window = COVERED[problem]
    for residual, bn in zip(RESIDUALS, (True, False, False), strict=True):
        activation = {"first": "silu", "last": "relu"}.get(residual, "none")
        call: Call = make(
            generator, "cpu", torch.float32, x, w, *window, residual=residual, activation=activation, bn=bn
        )
        lists = [[v] if isinstance(v, int) else v for v in window]
        how = dict(zip(("stride", "padding", "dilation"), lists, strict=False))
        if residual != "last":  # which is the same problem as "first"
            assert fcb.explain(call.x, call.w, *window, residual=residual != "none") == "aten"
        set_choice("direct_cpu", call.x, call.w, **how, has_residual=residual != "none")
        assert fcb.explain(call.x, call.w, *window, residual=residual != "none") == "direct_cpu, tuned"
        assert check(call)


@pytest.mark.parametrize("algorithm", ["direct_cpu", "stem_sm90", "fastest"])
def test_an_algorithm_that_does_not_cover_a_problem_is_not_chosen(algorithm: str) -> None:
    """Whatever a file says: numbers of a problem that the kernel cannot run, and names that are none."""
    narrow, w = torch.randn(2, 3, 20, 20), torch.randn(8, 3, 3, 3)
    expected = fcb.conv_scale_shift(narrow, w, None, None)
    numbers = [2, 3, 20, 20, 8, 3, 3, 18, 18, 1, 1, 0, 0, 1, 1, 1, 4, 0, 0, 0, 0, 0, torch.get_num_threads()]
    _choices.add("cpu", {tuple(numbers): algorithm})
    assert OPS._candidates(narrow, w)[1:] == ([], "")
    assert fcb.explain(narrow, w) == "aten"
    assert torch.equal(fcb.conv_scale_shift(narrow, w, None, None), expected)


@needs_vectors
def test_an_unknown_name_leaves_the_rule() -> None:
    x, w = torch.randn(1, 3, 80, 200), torch.randn(32, 3, 3, 3)
    _, problem, _ = OPS._candidates(x, w)
    _choices.add("cpu", {tuple(problem): "fastest"})
    assert fcb.explain(x, w) == "direct_cpu"


@needs_vectors
@pytest.mark.parametrize(
    "x, w, window",
    [
        ((2, 3, 400), (16, 3, 7), (1, 3)),
        ((2, 3, 5, 6, 40), (16, 3, 1, 1, 3), (1, (0, 0, 1))),
        ((2, 3, 5, 4, 40), (16, 3, 3, 1, 1), (1, (1, 0, 0))),
        ((2, 3, 1, 9, 40), (16, 3, 1, 3, 3), (1, (0, 1, 1))),
        ((2, 3, 5, 4, 40), (16, 3, 1, 1, 1), (1, 0)),
    ],
)
def test_other_dimensions_take_what_was_measured(x: Any, w: Any, window: Any) -> None:
    """And nothing by rule: those were measured in two dimensions."""
    x, w = torch.randn(x), torch.randn(w)
    expected = fcb.conv_scale_shift(x.double(), w.double(), None, None, *window)
    assert fcb.explain(x, w, *window) == "aten"
    windows = [[v] * (x.dim() - 2) if isinstance(v, int) else list(v) for v in window]
    _, problem, names = OPS._candidates(x, w, *windows)
    assert names == "direct_cpu,aten"
    with _choices.trial("cpu", tuple(problem), "direct_cpu"):
        assert fcb.explain(x, w, *window) == "direct_cpu, tuned"
        got = fcb.conv_scale_shift(x, w, None, None, *window)
    torch.testing.assert_close(got, expected.float())


@needs_vectors
def test_threads_read_choices_while_others_set_them() -> None:
    x, w = torch.randn(1, 3, 40, 40), torch.randn(8, 3, 3, 3)
    expected = fcb.conv_scale_shift(x, w, None, None)
    errors: list[float] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            errors.append(float((fcb.conv_scale_shift(x, w, None, None) - expected).abs().max()))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        problem = tuple(OPS._candidates(x, w)[1])
        for turn in range(200):
            with _choices.trial("cpu", problem, ("direct_cpu", "aten")[turn % 2]):
                pass
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert errors and max(errors) <= 1e-5 * float(expected.abs().max())


def test_what_the_op_refuses() -> None:
    with pytest.raises(RuntimeError) as caught:
        OPS._set_choices.cpu([1, 2, 3], "aten,direct_cpu")
    assert str(caught.value).splitlines()[0] == (
        "_set_choices: problems has 3 numbers, expected 46, 23 for each of the 2 algorithms"
    )


# ---- the file --------------------------------------------------------------------------------------------------------

DAMAGED = {
    "nothing": "",
    "half a file": '{"cpu": {"1 2',
    "a list": "[]",
    "no problems": '{"cpu": 7}',
    "no algorithm": '{"cpu": {"1 2": 3}}',
    "several algorithms": '{"cpu": {"1 2": "aten,aten"}}',
    "no numbers": '{"cpu": {"one": "aten"}}',
    "too few numbers": '{"PROCESSOR": {"1 2": "aten"}}',
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_ignored_with_a_warning(damage: str, folder: Path) -> None:
    folder.mkdir()
    content = DAMAGED[damage]
    if isinstance(content, str):
        content = content.replace("PROCESSOR", _choices._in_file("cpu")).encode()
    _choices.path().write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"is damaged \(.*\) and was ignored: tune again, or delete it$") as caught:
        _choices.load()
    assert len(caught) == 1 and str(_choices.path()) in str(caught[0].message)
    assert _choices.known("cpu") == {}
    # What is tuned next is written over it.
    _choices.add("cpu", {(0,) * 23: "aten"})
    assert _choices._read(_choices.path()) == {_choices._in_file("cpu"): {(0,) * 23: "aten"}}


def test_a_new_process_warns_and_goes_on(folder: Path) -> None:
    folder.mkdir()
    _choices.path().write_text("{")
    warned, first, _ = in_a_new_process()
    assert "is damaged" in warned and "tuned" not in first


def test_files_of_several_devices_and_processes_are_merged(folder: Path) -> None:
    one, two, three = (0,) * 23, (1,) * 23, (2,) * 23
    _choices.add("cpu", {one: "aten"})
    content = json.loads(_choices.path().read_text())
    content[_choices._in_file("cpu")][" ".join(map(str, two))] = "direct_cpu"
    content["Some GPU, driver 13.0"] = {" ".join(map(str, three)): "depthwise"}
    _choices.path().write_text(json.dumps(content))  # another process
    _choices.add("cpu", {one: "direct_cpu"})
    assert _choices._read(_choices.path()) == {
        _choices._in_file("cpu"): {one: "direct_cpu", two: "direct_cpu"},
        "Some GPU, driver 13.0": {three: "depthwise"},
    }
    assert [file.name for file in folder.iterdir()] == [_choices.path().name]
    _choices.load()
    assert _choices.known("Some GPU, driver 13.0") == {three: "depthwise"}


@needs_vectors
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.write_text("no folder")
    w = torch.randn(8, 3, 3, 3)
    with pytest.warns(RuntimeWarning, match="could not be written .*: what was tuned holds for this process alone"):
        set_choice("direct_cpu", X, w)
    assert fcb.explain(X, w) == "direct_cpu, tuned"


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_CONV_BN_CHOICES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert _choices.folder() == Path("/some/cache/fused_conv_bn")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    monkeypatch.setenv("HOME", "/home/someone")
    assert _choices.folder() == Path("/home/someone/.cache/fused_conv_bn")


# ---- the command line ------------------------------------------------------------------------------------------------


@needs_vectors
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None) -> None:
    (tmp_path / "zoo_of_tune.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())\n"
    )
    command = ["tune", f"{tmp_path / 'zoo_of_tune.py'}:make", "--device", "cpu", "--batch", "2", "--size", "40"]
    assert __main__.main(command) == 0
    head, row, _, spread, kept = capsys.readouterr().out.splitlines()
    assert head.split() == ["convolution", "calls", "direct_cpu", "aten", "spread", "by", "rule", "chosen"]
    assert row.startswith("2x3x40x40 float32 8 of 3x3  1 ") and row.count(" us ") == 2
    assert row.split()[-3:-1] == ["0%", "aten"] and spread.startswith("spread: the largest one of the row's times, ")
    assert kept == f"Kept in {_choices.path()}"
    _choices.path().unlink()
    _choices.folder().rmdir()
    _choices.folder().write_text("no folder")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        assert __main__.main([*command, "--again"]) == 0
    assert "Kept in" not in capsys.readouterr().out
    chosen = row.split()[-1]
    assert __main__.main(command) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(f" {chosen}, known")
    assert __main__.main([*command, "--train"]) == 0
    assert "8 of 3x3 training" in capsys.readouterr().out
    assert __main__.main([*command, "--channels-last"]) == 0
    assert capsys.readouterr().out.startswith("There is nothing to choose")
    assert __main__.main(["tune", f"{tmp_path / 'zoo_of_tune.py'}:makes"]) == 2
    assert capsys.readouterr().err == f"tune: MODEL: {tmp_path / 'zoo_of_tune.py'} has no makes\n"
    with pytest.raises(SystemExit, match="2"):
        __main__.main([*command, "--batch", "0"])
    assert "argument --batch: '0', expected a whole number from 1 on" in capsys.readouterr().err


# ---- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_cycle_on_cuda(device: str, dtype: torch.dtype, training: bool, folder: Path) -> None:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))
    model = model.to(device, dtype, memory_format=torch.channels_last).train(training)
    x = torch.randn(4, 3, 64, 48, device=device).to(dtype, memory_format=torch.channels_last)
    before = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        expected = fcb.unfuse(fcb.fuse(model, x))(x)
    for name, b in model.named_buffers():
        b.copy_(before[name])
    random_state = torch.cuda.get_rng_state()
    fcb.fuse(model, x, tune=True)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    (name,) = _choices._known
    assert name.startswith(torch.cuda.get_device_name() + ", driver ")
    assert len(_choices.known(name)) == 3
    explained = fcb.explain(x, model[0].weight, 2, 1, training=training)
    assert explained.endswith(", tuned") and explained.split()[0].rstrip(",") in _choices.known(name).values()
    if not training:
        assert all(row.algorithm.endswith(", tuned") for row in fcb.report(model).rows if row.module == "conv")
    with torch.no_grad():
        y = model(x)
    error = float((y.float() - expected.float()).norm() / expected.float().norm())
    assert error <= max(8 * torch.finfo(dtype).eps, 3e-6)  # three layers of it, by two algorithms

    # Other training, other 16-bit dtype, other batch: by rule, which also a user may ask for.
    rule = fcb.explain(x[:3], model[0].weight, 2, 1, training=training)
    assert "tuned" not in rule
    assert "tuned" not in fcb.explain(x, model[0].weight, 2, 1, training=not training)
    if dtype != torch.float32:
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        assert "tuned" not in fcb.explain(x.to(other), model[0].weight.to(other), 2, 1, training=training)
    with fcb.use_algorithm("by rule"):
        assert "tuned" not in fcb.explain(x, model[0].weight, 2, 1, training=training)
    with fcb.use_algorithm("aten"):
        assert fcb.explain(x, model[0].weight, 2, 1, training=training) == "aten"

    # A new process has them, and nothing has begun with CUDA when it has imported the package.
    code = f"""
import ctypes, torch
def status():
    return ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p()))
before = status()
import fused_conv_bn as fcb
assert not torch.cuda.is_initialized() and status() == before
x = torch.empty(4, 3, 64, 48, device="cuda", dtype={dtype}).to(memory_format=torch.channels_last)
print(fcb.explain(x, torch.empty(16, 3, 3, 3, device="cuda", dtype={dtype}), 2, 1, training={training}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [explained]


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_each_algorithm_on_cuda_runs_as_chosen(device: str, generator: torch.Generator) -> None:
    for shape, weight, groups in (((2, 8, 19, 18), (6, 8, 3, 3), 1), ((2, 16, 19, 18), (16, 1, 3, 3), 16)):
        call = make(generator, device, torch.float16, shape, weight, 1, 1, 1, groups)
        name, problem, algorithms = OPS._candidates(call.x, call.w, [1], [1], [1], groups)
        assert len(algorithms.split(",")) >= 2
        for algorithm in algorithms.split(","):
            _choices.add(name, {tuple(problem): algorithm})
            explained = fcb.explain(call.x, call.w, 1, 1, 1, groups)
            assert explained.split()[0].rstrip(",") == algorithm and explained.endswith(", tuned")
            assert check(call)
        _choices.add(name, {tuple(problem): "fastest"})
        assert "tuned" not in fcb.explain(call.x, call.w, 1, 1, 1, groups)
    deep, w = torch.randn(2, 72, 9, 8, device=device), torch.randn(6, 72, 3, 3, device=device)
    assert OPS._candidates(deep, w)[1:] == ([], "")
    numbers = [2, 72, 9, 8, 6, 3, 3, 7, 6, 1, 1, 0, 0, 1, 1, 1, 4, 0, 0, 0, 0, 0, 0]
    _choices.add(name, {tuple(numbers): "stem_sm90"})
    assert fcb.explain(deep, w) == "aten"
    _choices.add(name, {tuple(numbers): "aten"})
    assert fcb.explain(deep, w) == "aten, tuned"  # so that the numbers are those of this problem


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_an_algorithm_of_the_environment_leaves_nothing_to_tune(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CONV_BN_CONV", "aten")
    with pytest.raises(RuntimeError) as caught:
        fcb.fuse(network(device), X.to(device), tune=True)
    assert str(caught.value) == (
        "tune: FUSED_CONV_BN_CONV is 'aten', expected nothing: an algorithm that it names always runs"
    )


def test_activations_are_all_measured_as_they_are_called() -> None:
    """Each call has its own epilogue, and makes the same tensors again."""
    for activation in reference.ACTIVATIONS:
        call = tuning.Call.of(
            OPS.conv_scale_shift.default, (X, torch.randn(8, 3, 3, 3), None, None), {"activation": activation}
        )
        named = call.tensors(torch.Generator().manual_seed(1))
        assert named["activation"] == activation and named["input"].shape == X.shape
        assert torch.equal(named["input"], call.tensors(torch.Generator().manual_seed(1))["input"])
    strided = X.transpose(2, 3)[..., ::2].expand(2, 3, 60, 20)
    call = tuning.Call.of(OPS.conv_scale_shift.default, (strided, torch.randn(8, 3, 3, 3), None, None), {})
    assert call.tensors(torch.Generator().manual_seed(1))["input"].stride() == strided.stride()
