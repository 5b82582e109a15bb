"""``python -m fused_conv_bn bench``: tiny models on the CPU, with every number that the tables have."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import _bench, _model_times, _progress
from fused_conv_bn.__main__ import main
from fused_conv_bn._cli import UsageError
from fused_conv_bn._cli_model import load
from fused_conv_bn._fuse.guard import STATE
from fused_conv_bn._fuse.root import is_root
from fused_conv_bn._model_times import Case, Race
from fused_conv_bn._stopwatch import Processors

MODEL = """
import torch
from torch import nn
from helpers_of_the_model import CHANNELS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.b = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        return torch.relu(self.b(self.c(x)) + x)


def make():
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), Block(), nn.Dropout(0.1))


def flat():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.embedding = Block(), nn.Embedding(5, CHANNELS)

    def forward(self, x, numbers):
        return {"y": self.block(x) + self.embedding(numbers)[:, :, None, None], "n": numbers}


def with_inputs():
    return TwoInputs(), (torch.randn(2, CHANNELS, 5, 6), torch.tensor([1, 4]))


def with_a_list():
    return make(), [torch.randn(2, 3, 9, 9)]


def no_model():
    return 3


def fails():
    raise RuntimeError("no weights\\nmore of it")


def leaves():
    raise SystemExit(3)


class NoNumbers(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * float("nan")


def no_numbers():
    return NoNumbers(3, 4, 3)


ready = make()
number = 3
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processors, "look", lambda self: None)
    monkeypatch.setattr(_model_times, "SAMPLE_US", {"cpu": 1.0})
    monkeypatch.setattr(_model_times, "GROUP_SAMPLE_US", 1.0)
    monkeypatch.setattr(_model_times, "COPY_BYTES", {"cpu": 1 << 20})


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "helpers_of_the_model.py").write_text("CHANNELS = 4\n")
    path = tmp_path / "a_model.py"
    path.write_text(MODEL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("a_model", "helpers_of_the_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return str(path)


def record_of(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "record.json"
    assert main(["bench", *arguments, "--device", "cpu", "--rounds", "2", "--json", str(path)]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    for v in record["variants"]:
        assert v["problem"] is None and v["min_us"] <= v["median_us"] <= v["max_us"]
        assert v["speed-up"] == pytest.approx(record["variants"][0]["median_us"] / v["median_us"])
    for g in record["groups"]:
        assert g["speed-up"] == pytest.approx(g["pytorch_us"] / g["fused_us"])
    return record


def groups_of(record: dict[str, Any]) -> list[tuple[str, str, list[int], int]]:
    return sorted((g["group"], g["ops"], g["shape"], g["calls"]) for g in record["groups"])


def test_evaluation(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(tmp_path, f"{file}:make", "--batch", "2", "--size", "9")
    assert [v["name"] for v in record["variants"]][:2] == ["eager", "fused"]
    # Two layers: some roundings, of which a wrong one would make 1e-1.
    assert all(0 < v["error"] < 1e-5 for v in record["variants"])
    assert (record["inputs"], record["mode"], record["rounds"]) == ([[2, 3, 9, 9]], "eval", 2)
    assert (record["device"], record["dtype"], record["errors against"]) == ("CPU", "float32", "float64")
    assert record["copy"]["gb_per_s"] == pytest.approx(2 * (1 << 20) / record["copy"]["median_us"] / 1e3)
    assert record["report"] == {"fused": 4}
    assert groups_of(record) == [("0", "conv bn relu", [2, 3, 9, 9], 1), ("3.c", "conv bn add relu", [2, 4, 7, 7], 1)]
    said = capsys.readouterr().out
    for words in ("a_model.py:make on 2x3x9x9, float32, eval, CPU", "speed-up", "copy of 1 MB", "conv bn add relu"):
        assert words in said
    assert "not timed" not in said and "Eager's own error" not in said


@pytest.mark.parametrize("train", [False, True])
def test_16_bits_in_channels_last(file: str, tmp_path: Path, train: bool) -> None:
    options = ["--size", "3x9x9", "--dtype", "bfloat16", "--channels-last", *(["--train"] if train else [])]
    record = record_of(tmp_path, f"{file}:make", *options)
    assert (record["dtype"], record["channels_last"]) == ("bfloat16", True)
    # Rounded to 8 bits, but for what is exact by chance.
    assert all(2**-12 < v["error"] < 0.1 for v in record["variants"])
    assert len(record["groups"]) == 2


def test_training(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(tmp_path, f"{file}:make", "--batch", "2", "--size", "9", "--train")
    assert [v["name"] for v in record["variants"]] == ["eager", "fused"]
    assert all(0 < v["error"] < 1e-4 for v in record["variants"])
    assert record["mode"] == "train" and len(record["groups"]) == 2
    assert "training steps" in capsys.readouterr().out


def test_other_shapes_and_inputs_of_the_model_s_own(file: str, tmp_path: Path) -> None:
    record = record_of(tmp_path, f"{file}:flat", "--size", "2x11", "--batch", "3")
    assert groups_of(record) == [("0", "conv bn relu", [3, 2, 11], 1)]
    record = record_of(tmp_path, f"{file}:with_inputs")
    assert record["inputs"] == [[2, 4, 5, 6], [2]]
    assert groups_of(record) == [("block.c", "conv bn add relu", [2, 4, 5, 6], 1)]


def test_chart(file: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, options in (("groups.png", ["--size=9"]), ("none.png", ["--size=9", "--train", "--batch=2"])):
        chart = tmp_path / name
        record_of(tmp_path, f"{file}:make", *options, "--chart", str(chart))
        assert chart.read_bytes()[:4] == b"\x89PNG"


def test_a_model_in_which_nothing_is_fused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "torch.nn:Identity", "--device", "cpu", "--size", "9", "--rounds", "1"]) == 0
    assert "Nothing was fused" in capsys.readouterr().out


def test_signs_of_life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all that takes long, whatever it is: here a model that takes long to make."""
    slow = types.ModuleType("slow_to_make")
    slow.make = lambda: time.sleep(0.3) or nn.Identity()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slow_to_make", slow)
    monkeypatch.setattr(_progress, "SECONDS", 0.1)
    arguments = ["--device", "cpu", "--size", "9", "--rounds", "1"]
    assert main(["bench", "slow_to_make:make", *arguments]) == 0
    assert "slow_to_make:make, 0 s" in capsys.readouterr().err.splitlines()


BAD: list[tuple[str, list[str], str]] = [
    ("model", [], "MODEL is 'model', expected module:callable or file.py:callable"),
    ("nowhere.py:make", [], "there is no file nowhere.py"),
    ("no_such_module:make", [], "module no_such_module cannot be imported: ModuleNotFoundError"),
    ("FILE:nothing", [], "has no nothing"),
    ("FILE:number", [], "is of type int, expected a callable or an nn.Module"),
    ("FILE:no_model", [], "returned a int, expected an nn.Module, or one and its inputs"),
    ("FILE:fails", [], "fails() failed: RuntimeError: no weights\n"),
    ("FILE:leaves", [], "leaves() failed: SystemExit: 3\n"),
    ("FILE:no_numbers", ["--size=3x9x9"], "all of its results are Inf or NaN, which nothing can be compared with\n"),
    ("FILE:make", ["--size=4x9x9"], "the model does not take (1, 4, 9, 9): RuntimeError"),
    ("FILE:with_a_list", [], "the model does not take [(2, 3, 9, 9)], a list as its one argument: TypeError: conv2d()"),
    ("FILE:make", ["--size=0x9"], "argument --size: '0x9', expected a number, or several with x between them"),
    ("FILE:make", ["--batch=0"], "argument --batch: '0', expected a whole number from 1 on"),
    ("FILE:make", ["--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
    ("FILE:make", ["--device=tpu"], "argument --device: invalid choice: 'tpu'"),
    ("FILE:make", ["--jsn=x"], "unrecognized arguments: --jsn=x"),
    ("FILE:make", ["--json=nowhere/x"], "--json is nowhere/x, which cannot be written to: nowhere/x: No such file or"),
    ("FILE:make", ["--json=/"], "--json is /, which cannot be written to: /: Is a directory"),
    ("FILE:make", ["--chart=x.svg"], "--chart is x.svg, expected a name that ends in .png"),
    ("FILE:with_inputs", ["--batch=3"], "with_inputs comes with its own"),
]


@pytest.mark.parametrize("model, options, words", BAD, ids=[" ".join([m, *o]) for m, o, _ in BAD])
def test_one_sentence(
    file: str, model: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", model.replace("FILE", file), *options]
    if not any(option.startswith("--device") for option in options):
        arguments.append("--device=cpu")
    try:
        status = main(arguments)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        status = stop.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert words in said.err and len(said.err.splitlines()) == 1


def test_without_matplotlib(file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", f"{file}:make", "--chart=x.png"]) == 2
    assert capsys.readouterr().err == "bench: --chart needs matplotlib: pip install matplotlib\n"


def test_without_a_gpu(file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_bench, "why_no_gpu", lambda: "no GPU")
    assert main(["bench", f"{file}:make", "--device=cuda"]) == 2
    assert capsys.readouterr().err == "bench: --device is cuda: no GPU\n"


def test_load(file: str) -> None:
    assert load("torch.nn:modules.Identity")[1] is None
    model, inputs = load(f"{file}:ready")
    assert isinstance(model, nn.Sequential) and inputs is None
    model, inputs = load(f"{file}:with_inputs")
    assert inputs is not None and [t.dtype for t in inputs] == [torch.float32, torch.int64]
    with pytest.raises(UsageError, match="fails"):
        load(f"{file}:fails")


# ---- forms, and their check ------------------------------------------------------------------------------------------


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def case_of(model: nn.Module, *inputs: Tensor, **options: Any) -> Case:
    return Case(model, inputs or (torch.randn(2, 3, 6, 7),), "cpu", torch.float32, **options)


@pytest.mark.parametrize("train", [False, True])
def test_what_is_wrong_is_not_timed(
    train: bool, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = fcb.fuse

    def wrong(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        model[1].weight.data.mul_(1.5)  # type: ignore[index, union-attr, operator]
        return real(model, *args, **kwargs)

    monkeypatch.setattr(fcb, "fuse", wrong)
    arguments = ["bench", f"{file}:make", "--device=cpu", "--size=9", "--batch=2", "--rounds=1"]
    assert main([*arguments, *(["--train"] if train else []), f"--json={tmp_path / 'r.json'}"]) == 1
    assert "fused was not timed: its error is" in capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["groups"] == [] and "median_us" not in record["variants"][1]


def test_torch_compile(file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is timed, and where it does not work, that is said, and is no failure."""
    arguments = ["bench", f"{file}:make", "--device=cpu", "--size=9", "--rounds=1", "--compile"]
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert main(arguments) == 0
    assert "compile " in capsys.readouterr().out

    def fail(model: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fail)
    assert main(arguments) == 0
    assert "compile was not timed: RuntimeError: no compiler\n" in capsys.readouterr().out


def test_forms_take_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = fcb.fuse, []

    def fuse(model: nn.Module, inputs: Any, freeze: bool = False) -> nn.Module:
        asked.append((model, freeze))
        return real(model, inputs)

    monkeypatch.setattr(fcb, "fuse", fuse)
    monkeypatch.setattr(fcb, "graphed", lambda model: model)
    case = case_of(pair())
    models = {name: make() for name, make in _model_times.forms(case).items()}
    assert list(models) == ["eager", "fused", "frozen"]
    assert [freeze for _, freeze in asked] == [False, True]
    assert len({id(m) for m in models.values()}) == 3 and type(case.model) is nn.Sequential
    case.device = "cuda"
    assert list(_model_times.forms(case)) == ["eager", "fused", "frozen", "graphed"]
    case.train = True
    assert list(_model_times.forms(case)) == ["eager", "fused", "graphed"]


class NoDoubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = pair()

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        y: Tensor = self.pair(x)
        return y


def test_a_model_without_float64_is_compared_with_eager() -> None:
    case = case_of(NoDoubles())
    with torch.no_grad():
        variants, against = _model_times.checked(case)
    assert against == "eager" and variants[0].error == 0.0
    assert all(v.problem is None for v in variants)


def test_statistics_are_filled_in_where_there_are_none() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(*pair(), nn.BatchNorm2d(4))
    trained, norm = model[3], model[1]
    trained.running_mean.fill_(0.5)
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    case_of(model, torch.randn(64, 3, 6, 7))
    handle.remove()
    var, mean = torch.var_mean(seen[0], (0, 2, 3), correction=0)
    assert (norm.running_var / var - 1).abs().max() <= 0.25 and (norm.running_var != var).all()
    assert ((norm.running_mean - mean) / var.sqrt()).abs().max() < 0.1 * 6 and norm.weight.std() > 0
    assert (trained.running_mean == 0.5).all() and (trained.weight == 1).all()
    assert not norm._forward_pre_hooks


def test_errors() -> None:
    a = torch.tensor([1.0, -4.0, math.inf])
    assert _model_times.largest_error([a, a], [a, torch.tensor([1.0, -5.0, math.inf])]) == pytest.approx(0.2)
    for b in (torch.tensor([1.0, -4.0, 0.0]), torch.tensor([1.0, -4.0, math.nan]), a[:2]):
        assert _model_times.largest_error([a], [b]) == (math.inf if b.shape != a.shape or b[2] == 0 else 0.0)
        assert _model_times.largest_error([b], [a[:2] if b.shape == a.shape else a]) == math.inf
    assert _model_times.largest_error([a], []) == math.inf
    a = torch.tensor([3.0, 4.0])
    assert _model_times.norm_error([a, a], [a, a + torch.tensor([0.0, 1.0])]) == pytest.approx(1 / math.sqrt(59))
    assert (
        _model_times.norm_error([a / 0], [a]) == math.inf and _model_times.norm_error([a * math.nan], [a]) == math.inf
    )


# ---- times -----------------------------------------------------------------------------------------------------------


def test_rivals_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(_model_times, "call_us", lambda call, on_cuda: (call(), 4.0)[1])
    race = Race({name: (lambda name=name: order.append(name)) for name in "ab"}, False, 7.0)
    order.clear()
    # 7 us take two calls of 4 us, and one before them.
    assert race.run(range(2)) == {"a": [2.0, 2.0], "b": [2.0, 2.0]}
    assert "".join(order) == "aaabbb" + "bbbaaa"


@pytest.mark.parametrize("device_only", [False, True])
def test_a_gpu_is_held_back_before_each_sample_of_a_group(monkeypatch: pytest.MonkeyPatch, device_only: bool) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("sync "))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep " if cycles > 0 else "none "))
    monkeypatch.setattr(_model_times, "call_us", lambda call, on_cuda: (call(), 4.0)[1])
    race = Race({"a": lambda: order.append("a ")}, True, 7.0, device_only)
    order.clear()
    race.run(range(2))
    assert "".join(order) == 2 * ("sync a sleep a a " if device_only else "sync a a a ")


def twice(x_of: Callable[[Tensor], Tensor]) -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x).mean() + self.head(x_of(x)).mean()
            return y

    return Twice()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shrinks", [False, True])
def test_a_group_that_is_called_twice(train: bool, shrinks: bool) -> None:
    """One row a shape; and the model is as it was."""
    model = twice((lambda x: x[..., ::2]) if shrinks else (lambda x: -x))
    case = case_of(model, train=train)
    fused = fcb.fuse(case.model, case.inputs)
    before = [b.clone() for b in fused.buffers()]
    rows = _model_times.group_times(fused, case, 1)
    found = sorted((r["group"], tuple(r["shape"]), r["calls"]) for r in rows)
    full = (2, 3, 6, 7)
    assert found == ([("head.0", (2, 3, 6, 4), 1), ("head.0", full, 1)] if shrinks else [("head.0", full, 2)])
    assert all(torch.equal(a, b) for a, b in zip(fused.buffers(), before, strict=True))
    assert all(p.grad is None for p in fused.parameters())
    states = [m.__dict__[STATE] for m in fused.modules() if is_root(m)]
    blocks = [b for state in states for entries in state.entries.values() for e in entries for b in (*e.quick, *e.full)]
    assert len(blocks) == (8 if train else 4) and not any(isinstance(b, _model_times._TimedCall) for b in blocks)
