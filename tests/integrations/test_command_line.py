"""``python -m fused_conv_bn``: what it says without a command, how it ends, and its signs of life."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import fused_conv_bn as fcb
from fused_conv_bn import _cli, _demo, _loader, _progress
from fused_conv_bn.__main__ import main

PROGRAM = [sys.executable, "-m", "fused_conv_bn"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(_loader.PACKAGE.parent)}


def test_without_a_command_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr()
    assert said.err == "" and all(command in said.out for command in ("info", "demo", "bench", "tune", "--version"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fused_conv_bn {fcb.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "bench", "tune"])
def test_without_a_gpu(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_demo, "why_no_gpu", lambda: "no GPU")
    monkeypatch.setattr("fused_conv_bn._bench.why_no_gpu", lambda: "no GPU")
    model = [] if command == "demo" else ["torch.nn:Identity"]
    assert main([command, *model, "--device=cuda"]) == 2
    assert capsys.readouterr().err == f"{command}: --device is cuda: no GPU\n"


# ---- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    command = f'exec "{PROGRAM[0]}" -m fused_conv_bn info {closed}'
    run = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env=ENVIRONMENT, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert bool(run.stdout) == (closed == "2>&-")


@pytest.mark.parametrize("arguments", [["info"], ["--help"], []], ids=" ".join)
def test_a_reader_that_has_seen_enough(arguments: list[str]) -> None:
    """As with ``| head``: no traceback, whether a line fails or what is left at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    for unbuffered in ("", "1"):
        environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
        run = subprocess.run([*PROGRAM, *arguments], stdout=writer, stderr=subprocess.PIPE, env=environment, text=True)
        assert run.stderr == ""
        assert run.returncode == 141 or (unbuffered and arguments != ["info"])  # argparse takes it as it comes
    os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk(unbuffered: str) -> None:
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        run = subprocess.run([*PROGRAM, "info"], stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert (run.returncode, run.stderr) == (2, "info: No space left on device\n")


def test_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert _cli.run("bench", interrupted) == 130
    assert capsys.readouterr().err == "bench: interrupted\n"


PAUSE = """
import atexit, os, sys, time

def pause():
    print("now", flush=True)
    try:
        time.sleep(60)
    except BaseException:  # some libraries take an interruption for a part of them that is missing
        raise ImportError

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["PAUSE_AT"]:
            pause()

sys.meta_path.insert(0, Finder())
if os.environ["PAUSE_AT"] == "the end":
    atexit.register(pause)
"""


@pytest.mark.parametrize("place", ["torch", "fused_conv_bn._fuse", "fused_conv_bn._bench", "the end"])
def test_an_interruption_before_and_after_a_command(place: str, tmp_path: Path) -> None:
    """While torch is imported, which takes seconds, while the package is, and while Python ends."""
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{_loader.PACKAGE.parent}", "PAUSE_AT": place}
    assert ended_by_interruption(["--version"], environment) == (130, "")


def test_an_interruption_of_a_command(tmp_path: Path) -> None:
    model = tmp_path / "slow_model.py"
    model.write_text("import time\ndef make():\n    print('now', flush=True)\n    time.sleep(60)\n")
    status, said = ended_by_interruption(["bench", f"{model}:make", "--device=cpu"], ENVIRONMENT)
    assert (status, said.splitlines()[-1]) == (130, "bench: interrupted") and "Traceback" not in said


def ended_by_interruption(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit status, and what stderr has, of a command that is interrupted when it says "now"."""
    command = [*PROGRAM, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert "now\n" in process.stdout
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_a_second_interruption_ends_at_once() -> None:
    """Whatever is done about the first one; and other programs are left alone, which have a handler of their own."""
    code = """
import signal, sys, time
from fused_conv_bn import _cli, _interrupt
before = signal.getsignal(signal.SIGINT)
def interrupted():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
        print("not ended", flush=True)
assert _cli.run("other", interrupted) == 130 and signal.getsignal(signal.SIGINT) is before
print("other program", flush=True)
_interrupt.end_at_once_from_here()
_cli.run("ours", interrupted)
"""
    run = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "other program\n", "other: interrupted\n")


@pytest.mark.parametrize("variable", ["FUSED_CONV_BN_CONV", "FUSED_CONV_BN_STATISTICS"])
def test_unknown_names_in_the_environment(variable: str) -> None:
    run = subprocess.run([*PROGRAM, "info"], env={**ENVIRONMENT, variable: "fastest"}, capture_output=True, text=True)
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (1, "", 1)
    assert run.stderr.startswith(f"fused_conv_bn: {variable} is 'fastest', expected one of '")
    assert (
        subprocess.run([*PROGRAM, "info"], env={**ENVIRONMENT, variable: ""}, stdout=subprocess.DEVNULL).returncode == 0
    )


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"\xff\xfe", r"'\udcff\udcfe', expected a name of ASCII characters"),
        ("\u00e4ten", "'\u00e4ten', expected a name of ASCII characters"),
        ("aten\nor not", r"'aten\nor not', expected a name of ASCII characters"),
        ("\x1b[31m", r"'\x1b[31m', expected a name of ASCII characters"),
        (" aten", "' aten', expected one of 'pointwise'"),
        ("ATEN", "'ATEN', expected one of 'pointwise'"),
        ("aten,aten", "'aten,aten', expected one of 'pointwise'"),
        ("%s%n", "'%s%n', expected one of 'pointwise'"),
        ("x" * 100_000, "'xxx"),
    ],
    ids=["no UTF-8", "no ASCII", "two lines", "a control sequence", "a space", "capitals", "several", "%", "long"],
)
def test_malformed_names_in_the_environment(value: str | bytes, told: str) -> None:
    environment: Any = {**ENVIRONMENT, "FUSED_CONV_BN_CONV": value, "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run([*PROGRAM, "info"], env=environment, capture_output=True)
    error = run.stderr.decode()
    assert (run.returncode, run.stdout, len(error.splitlines())) == (1, b"", 1), error[-500:]
    assert error.startswith("fused_conv_bn: FUSED_CONV_BN_CONV is " + told), error[:500]


# ---- signs of life ---------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a part of two steps, and one inside of it, write."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(_progress, "SECONDS", 0.05)
    monkeypatch.setattr(_progress, "TERMINAL_SECONDS", 0.05)
    for step in _progress.progress(["first", "second"], "outer"):
        if step == "first":
            with _progress.part("inner"):
                time.sleep(0.2)
        time.sleep(0.2)
    before = stream.getvalue()
    time.sleep(0.2)
    assert stream.getvalue() == before, "nothing is written when all is over"
    assert not any(thread.name == "fused_conv_bn progress" for thread in threading.enumerate())
    return before.replace("\r\x1b[K", "\n").split("\n")


def test_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [re.sub(r", \d s$", "", line) for line in drawn(io.StringIO(), monkeypatch)]
    assert list(dict.fromkeys(lines)) == ["inner", "outer 0/2", "outer 1/2", ""]


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    lines = drawn(Terminal(), monkeypatch)
    assert list(dict.fromkeys(lines)) == ["", "outer 0/2, ", "inner, 0 s", "outer 1/2, "]
    assert lines[-1] == ""  # the line goes away


def test_quick_parts_and_functions_say_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(_progress, "SECONDS", 0.05)
    assert list(_progress.progress([], "nothing")) == []
    with _progress.part("quick"):
        pass
    with _progress.part("of a function", of_command=False):
        time.sleep(0.2)
    assert stream.getvalue() == ""
    with _progress.part("command"), _progress.part("of a function", of_command=False):
        time.sleep(0.2)
    assert "of a function, 0 s" in stream.getvalue().splitlines()


def test_stderr_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "SECONDS", 0.02)
    monkeypatch.setattr(sys, "stderr", None)
    with _progress.part("nothing to write to"):
        time.sleep(0.1)
