"""The file of measured choices, malformed or out of reach: the package is imported all the same, with a warning or none.

(What it is for, and other damages: test_tune.py)
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fused_conv_bn import _choices

PROBLEM = (0,) * _choices.NUMBERS
KEY = " ".join(map(str, PROBLEM))


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In a folder of its own; libraries know nothing before and behind a test."""

    def forget() -> None:
        for name in list(_choices._known):
            _choices._hand_over(name, {})
        _choices._known.clear()

    monkeypatch.setenv("FUSED_CONV_BN_CHOICES", str(tmp_path))
    forget()
    yield _choices.path()
    forget()


def of_cpu(problem: str = KEY, algorithm: Any = "aten") -> dict[str, Any]:
    return {_choices._in_file("cpu"): {problem: algorithm}}


MALFORMED: dict[str, Any] = {
    "nested deeply": "[" * 100_000,
    "objects nested deeply": '{"cpu":' * 100_000,
    "random bytes": random.Random(1).randbytes(5000),
    "zeros": bytes(100),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "half a file": json.dumps(of_cpu())[:-20],
    "a number": "7",
    "a string": '"aten"',
    "null": "null",
    "NaN": "NaN",
    "a list of choices": json.dumps({"cpu": [KEY, "aten"]}),
    "an algorithm is null": json.dumps(of_cpu(algorithm=None)),
    "an algorithm is an object": json.dumps(of_cpu(algorithm={"name": "aten"})),
    "an algorithm in no ASCII": json.dumps(of_cpu(algorithm="\u00e4ten")),
    "a lone surrogate": json.dumps(of_cpu(algorithm="\ud800")),
    "a device of a lone surrogate": json.dumps({"GPU \ud800": {KEY: "aten"}}),
    "fractions": json.dumps(of_cpu(KEY[:-1] + "0.5")),
    "one number too many": json.dumps(of_cpu(KEY + " 0")),
    "a number of more than 64 bits": json.dumps(of_cpu(KEY[:-1] + "9" * 20)),
    "a number of more than 4300 digits": json.dumps(of_cpu(KEY[:-1] + "9" * 5000)),
    "what is wrong comes last": json.dumps(of_cpu() | {"Some GPU": {KEY[:-1] + "9" * 20: "aten"}}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_ignored(name: str, file: Path) -> None:
    """All of it, and what is tuned next is written over it."""
    content = MALFORMED[name]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match=r"is damaged \(.+\) and was ignored: tune again, or delete it$") as caught:
        _choices.load()
    (warning,) = caught
    assert str(file) in str(warning.message) and len(str(warning.message).splitlines()) == 1
    assert _choices._known == {}
    _choices.add("cpu", {PROBLEM: "aten"})
    assert json.loads(file.read_text()) == of_cpu() and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("numbers", [[-1] * 23, [2**63 - 1] * 23, [-(2**62)] * 23])
def test_numbers_of_no_problem_are_no_problem_s(numbers: list[int], file: Path) -> None:
    file.write_text(json.dumps(of_cpu(" ".join(map(str, numbers)))))
    _choices.load()
    assert _choices.known("cpu") == {tuple(numbers): "aten"}


def test_a_folder_in_its_place(file: Path) -> None:
    file.mkdir()
    with pytest.warns(RuntimeWarning, match=r"could not be read \(.*directory.*\): nothing that was tuned holds$"):
        _choices.load()
    with pytest.warns(RuntimeWarning, match="could not be written .*: what was tuned holds for this process alone$"):
        _choices.add("cpu", {PROBLEM: "aten"})
    assert _choices.known("cpu") == {PROBLEM: "aten"} and list(file.parent.iterdir()) == [file]


def test_a_file_that_may_not_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(Whoever runs this may be allowed everything.)"""

    def refuses(self: Path, *args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    file.write_text(json.dumps(of_cpu()))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuses)
        with pytest.warns(RuntimeWarning, match=r"could not be read \(.*Permission denied.*\): nothing that was tuned"):
            _choices.load()
    assert _choices.known("cpu") == {}
    _choices.load()
    assert _choices.known("cpu") == {PROBLEM: "aten"}


def test_a_folder_that_may_not_be_looked_into(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's home, which $HOME names in some containers: there is nothing of this user's."""

    def refuses(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    file.write_text(json.dumps(of_cpu()))
    monkeypatch.setattr(Path, "is_dir", refuses)
    _choices.load()
    assert _choices._known == {}


@pytest.mark.parametrize("variable", ["FUSED_CONV_BN_CHOICES", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize(
    "value", ["/" + "long" * 2000, "/dev/null", "/dev/null/folder", b"/tmp/\xff\xfe", "relative", ""]
)
def test_folders_that_cannot_be(variable: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package says nothing of them when it is imported: they need not exist."""
    for name in ("FUSED_CONV_BN_CHOICES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the others lead to
    monkeypatch.setenv(variable, os.fsdecode(value))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _choices.load()
    assert _choices._known == {}
    if value in ("/dev/null", "/dev/null/folder") or len(value) > 5000:
        with pytest.warns(
            RuntimeWarning, match="could not be written .*: what was tuned holds for this process alone$"
        ):
            _choices.add("cpu", {PROBLEM: "aten"})
