"""What bench and tune make of a busy machine: how far a time is known, which choices that leaves, and what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused_conv_bn import __main__, _choices, _model_times, _stopwatch, fuse
from fused_conv_bn._fuse import tune as tuning
from fused_conv_bn._stopwatch import Figure, Processors

has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_vectors = pytest.mark.skipif(not has_vectors, reason="PyTorch's convolution alone covers anything without AVX2")


@pytest.fixture(autouse=True)
def _choices_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSED_CONV_BN_CHOICES", str(tmp_path / "choices"))
    monkeypatch.setattr(_choices, "_known", {})
    yield
    _choices._hand_over("cpu", {})


# ---- choices ---------------------------------------------------------------------------------------------------------

FIGURES: dict[str, tuple[dict[str, tuple[float, float, float]], tuple[str, bool]]] = {
    "faster for sure": ({"direct_cpu": (90, 88, 94), "aten": (100, 96, 105)}, ("direct_cpu", True)),
    "faster, and no more than they vary": ({"direct_cpu": (95, 91, 99), "aten": (100, 96, 103)}, ("aten", False)),
    "as fast, and known well": ({"direct_cpu": (99, 98, 101), "aten": (100, 98, 102)}, ("aten", True)),
    "as fast on a busy machine": ({"direct_cpu": (100, 100, 180), "aten": (99, 99, 210)}, ("aten", False)),
    "one sample of luck": ({"direct_cpu": (60, 60, 120), "aten": (100, 100, 103)}, ("aten", False)),
    "slower for sure on a busy machine": ({"direct_cpu": (300, 250, 600), "aten": (100, 90, 180)}, ("aten", True)),
    "the fastest of those that are for sure": (
        {"stem": (50, 50, 101), "direct_cpu": (70, 69, 72), "depthwise": (80, 79, 82), "aten": (100, 100, 104)},
        ("direct_cpu", True),
    ),
    "the rule's failed": ({"direct_cpu": (80, 60, 200), "stem": (90, 80, 95)}, ("direct_cpu", True)),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_what_is_within_the_spread_is_not_chosen(kind: str) -> None:
    figures, expected = FIGURES[kind]
    assert tuning.choose({name: Figure(*values) for name, values in figures.items()}, "aten") == expected


@needs_vectors
def test_what_is_undecided_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rule's runs, the next time it is measured again, and what was known before stays."""
    monkeypatch.setattr(Processors, "look", lambda self: None)
    figures = {"direct_cpu": Figure(80.0, 80.0, 130.0), "aten": Figure(100.0, 100.0, 160.0)}
    monkeypatch.setattr(tuning._Measured, "times", lambda self, names: figures)
    (tmp_path / "one_layer.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"
    )
    command = ["tune", f"{tmp_path / 'one_layer.py'}:make", "--device", "cpu", "--batch", "2", "--size", "40"]
    for _ in range(2):
        assert __main__.main(command) == 0
        _, row, _, _, note = capsys.readouterr().out.splitlines()
        assert row.split()[-4:] == ["62%", "aten", "aten,", "undecided"] and note.startswith("undecided: ")
        assert _choices.known("cpu") == {} and not _choices.path().exists()
    figures["direct_cpu"] = Figure(80.0, 80.0, 84.0)
    assert __main__.main(command) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(" aten     direct_cpu")
    figures["direct_cpu"] = Figure(99.0, 80.0, 200.0)
    assert __main__.main([*command, "--again"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(" aten     direct_cpu, undecided")
    assert list(_choices.known("cpu").values()) == ["direct_cpu"]


@needs_vectors
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("disturbed", ["before", "after", ""])
def test_what_threads_took_beside_other_programs_is_not_kept(
    disturbed: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However clear it looks: several threads wait for one, by one algorithm longer than by another."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    figures = {"direct_cpu": Figure(80.0, 80.0, 81.0), "aten": Figure(100.0, 100.0, 101.0)}
    shares = iter([0.7 if disturbed == when else 1.0 for when in ("before", "after")])

    def look(self: Processors) -> None:
        self.used, self.wanted = self.used + next(shares), self.wanted + 1.0

    monkeypatch.setattr(tuning._Measured, "times", lambda self, names: figures)
    monkeypatch.setattr(Processors, "look", look)
    seen = Processors()
    (case,) = tuning.tune_cases(fuse(pair().eval()), (torch.randn(2, 3, 40, 40),), processors=seen)
    is_kept = not disturbed or threads == 1
    assert list(_choices.known("cpu").values()) == (["direct_cpu"] if is_kept else [])
    assert case.is_decided == is_kept and case.choice == ("direct_cpu" if is_kept else "aten")
    assert seen.share == pytest.approx(0.85 if disturbed else 1.0)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_samples_of_a_figure(on_cuda: bool) -> None:
    """Of nine: the least with the lower quartile, or the median with both."""
    samples = [105.0, 100.0, 900.0, 110.0, 104.0, 120.0, 300.0, 101.0, 115.0]
    if on_cuda:
        assert Figure.of_median(samples) == Figure(110.0, 104.0, 120.0)
    else:
        assert Figure.of_least(samples) == Figure(100.0, 100.0, 104.0)
        assert Figure.of_least(samples).spread == pytest.approx(0.04)
    total = Figure(10.0, 9.0, 12.0).plus(Figure(1.0, 1.0, 2.0), 3)
    assert total == Figure(13.0, 12.0, 18.0)


# ---- other programs --------------------------------------------------------------------------------------------------


def looked(used: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> Processors:
    """After three looks, in each of which the process uses that much of one processor. Time passes with work alone."""
    now = [0.0]

    def work(x: torch.Tensor) -> None:
        now[0] += 0.005

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "sin_", work)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: used * now[0])
    processors = Processors()
    for _ in range(3):
        processors.look()
    return processors


@pytest.mark.parametrize(
    ("used", "threads", "there", "said"),
    [
        (0.97, 1, 4, ""),
        (3.8, 4, 4, ""),
        (2.1, 2, 2, ""),
        (0.5, 1, 4, "whose 1 thread had a processor for 50% of the time"),
        (2.4, 4, 4, "whose 4 threads had a processor for 60% of the time"),
        (2.0, 8, 2, "8 threads share 2 processors, which disturbs the measurement: set OMP_NUM_THREADS=2"),
        (1.0, 3, 1, "3 threads share 1 processor, which disturbs the measurement: set OMP_NUM_THREADS=1"),
    ],
)
def test_what_is_said_of_processors(
    used: float, threads: int, there: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(there)))
    why = looked(used, threads, monkeypatch).why_disturbed()
    assert said in why and bool(said) == bool(why) and "\n" not in why
    assert Processors().why_disturbed() == "", "without a look"


def test_a_busy_processor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of two programs on one processor."""
    threads, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    one = {min(allowed)}
    os.sched_setaffinity(0, one)
    torch.set_num_threads(1)
    try:
        with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1) as other:
            try:
                assert other.stdout is not None
                other.stdout.readline()
                processors = Processors()
                for _ in range(10):
                    processors.look()
            finally:
                other.kill()
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)
    assert processors.share < _stopwatch.ENOUGH
    assert processors.why_disturbed().startswith("other programs disturb the measurement, whose 1 thread had ")


@pytest.mark.parametrize("command", ["bench", "tune", "demo"])
@pytest.mark.parametrize("disturbed", [False, True])
def test_commands_say_it_in_one_line(
    command: str, disturbed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[Processors] = []

    def look(self: Processors) -> None:
        looks.append(self)
        self.used, self.wanted = (0.5 if disturbed else 1.0), 1.0

    monkeypatch.setattr(Processors, "look", look)
    monkeypatch.setattr(_model_times, "SAMPLE_US", {"cpu": 1.0})
    monkeypatch.setattr(_model_times, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = [] if command == "demo" else ["fused_conv_bn:demo_pair", "--size=40"]
    monkeypatch.setattr("fused_conv_bn.demo_pair", pair, raising=False)
    assert __main__.main([command, *model, "--device=cpu", *(["--rounds=2"] if command == "bench" else [])]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "disturb" in line]
    expected = f"{command}: other programs disturb the measurement, whose 1 thread had a processor for 50% of the time"
    assert [line.startswith(expected) for line in lines] == [True] * disturbed
    assert looks


def pair() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_spreads_of_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The distance of the quartiles of all that is timed: of the model's forms, of the copy and of each group."""
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(Processors, "look", lambda self: None)
    monkeypatch.setattr(_model_times, "SAMPLE_US", {"cpu": 1.0})
    monkeypatch.setattr(_model_times, "GROUP_SAMPLE_US", 1.0)
    monkeypatch.setattr(_model_times, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(
        _model_times, "call_us", lambda call, on_cuda: (call(), (100.0, 120.0)[next(ticks) // 7 % 2])[1]
    )
    monkeypatch.setattr("fused_conv_bn.demo_pair", pair, raising=False)
    assert __main__.main(["bench", "fused_conv_bn:demo_pair", "--size=9", "--device=cpu", "--rounds=8"]) == 0
    said = capsys.readouterr().out
    head, *rows = [line.split() for line in said.splitlines() if "spread" in line or "copy of" in line or " us" in line]
    assert "spread: the distance of the quartiles" in " ".join(head)
    percents = [word for row in rows for word in row if word.endswith("%")]
    assert len(percents) == 5 and any(word != "0%" for word in percents), said
    assert _model_times.spread([7.0]) is None and _model_times.spread([100.0, 110.0, 120.0]) == pytest.approx(10 / 110)
