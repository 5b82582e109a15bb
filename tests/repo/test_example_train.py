"""examples/train.py as a program: its quick mode, alone and in two processes, bad arguments, and Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "train.py"
QUICK = ("--quick", "--device=cpu")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def cells(output: str, line: str) -> list[str]:
    found = next(text for text in output.splitlines() if text.startswith(line))
    return found.removeprefix(line).split()


def test_quick(tmp_path: Path) -> None:
    done = run(*QUICK, "--channels-last", "--out", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    for epoch in (1, 2):
        eager, ours = map(float, cells(done.stdout, f"mean loss, epoch {epoch}"))
        assert abs(eager - ours) < 0.01
    assert float(eager) < 2.3, "it learns"
    eager, ours = (float(number) for number in cells(done.stdout, "kept for backward")[:3:2])
    assert ours <= eager
    assert len(cells(done.stdout, "time of a step, median")) == 5
    apart = re.search(r"losses: (\S+) in the first ten steps", done.stdout)
    assert apart and float(apart[1]) < 1e-3
    has_picture = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "new" / "train.png").exists() == has_picture
    assert ("wrote" in done.stdout) == has_picture


def test_in_two_processes() -> None:
    done = run(*QUICK, "--epochs=1", launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CPU, 2 processes, float32")
    eager, ours = map(float, cells(done.stdout, "mean loss, epoch 1"))
    assert abs(eager - ours) < 0.01


@pytest.mark.parametrize("arguments", ["--epochs=0", "--batch=0", "--batch=300", "--dtype=int8", "--out=/proc/nothing"])
def test_bad_arguments(arguments: str) -> None:
    done = run(*QUICK, arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert f"train.py: error: {arguments.partition('=')[0]}" in done.stderr.replace("argument --", "--")
    assert "Traceback" not in done.stderr


def test_interrupted() -> None:
    """What was measured until then, and no traceback."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *QUICK, "--epochs=10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # In the background of a shell the tests ignore it, and so would the program.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    try:
        while "loss" not in (seen := process.stderr.read(80)):
            assert seen, "it ended by itself"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors and "stopped" in errors
    assert cells(output, "time of a step, median")
