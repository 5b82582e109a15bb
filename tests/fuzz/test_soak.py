"""The soak: calls that hold, a leak that it sees, and a result that changes."""

from __future__ import annotations

import re
import time

import pytest

from fuzz import soak


def test_a_short_one_holds(device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its memory still grows: what is kept for each kind of call comes in the first minutes."""
    monkeypatch.setattr(soak, "NOISE", 1 << 40)
    assert soak.main(["--seconds", "4", "--threads", "2", "--device", device]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"soak: [1-9]\d+ calls in \d+ s by 2 threads\nsoak: nothing broke\n$", printed), printed
    assert re.search(r"^process +grew by ", printed)


def test_all_kinds_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "NOISE", 1 << 40)
    summary = soak.soak("cpu", 6.0, 1, 1)
    assert summary["broken"] == [] and summary["calls"].keys() == {"op", "step", "model", "share"}


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[bytearray] = []

    def leaks(calls: soak.Calls) -> None:
        kept.append(bytearray(200_000))
        calls.counts["op"] += 1
        time.sleep(0.002)

    monkeypatch.setattr(soak.Calls, "one", leaks)
    assert soak.main(["--seconds", "4", "--threads", "1", "--device", "cpu"]) == 1
    found = re.search(r"soak: process: memory grew by [\d.]+ MiB, (\d+) bytes a call", capsys.readouterr().out)
    assert found is not None and 150_000 < int(found[1]) < 250_000


@pytest.mark.parametrize(("a_call", "calls", "wrong"), [(0, 10**6, False), (32, 10**6, False), (100, 10**6, True)])
def test_growth(a_call: int, calls: int, wrong: bool) -> None:
    """Of a process that fills what it keeps in the first third, and has 10 MB more or less at a time."""
    samples = [(i * calls // 60, min(i, 20) * 10**8 + i * calls // 60 * a_call + i % 3 * 10**7) for i in range(60)]
    grown, each = soak.growth(samples)
    assert abs(each - a_call) < 20 and abs(grown - a_call * calls / 3) < 2e7
    assert soak.too_much(samples) is wrong


def test_a_changed_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = soak.call, iter(range(10**9))

    def wrong(*args: object) -> object:
        results, leaves = real(*args)
        if next(count) % 50 == 49:
            results = {name: y + 1 for name, y in results.items()}
        return results, leaves

    monkeypatch.setattr(soak, "call", wrong)
    monkeypatch.setattr(soak, "KEPT_SEEDS", 5)
    (broken,) = soak.soak("cpu", 20.0, 1, 0)["broken"]
    assert re.match(r"Broken: seed \d+: two calls differ: Problem", broken)
