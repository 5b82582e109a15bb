"""The workflows in .github: they run what everybody runs, from the same lists, with no more rights than they need.

Their syntax is actionlint's business (make lint).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKE_TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)


def test_all_are_here() -> None:
    assert [path.stem for path in WORKFLOWS] == ["lint", "tests", "wheels"]


@each_workflow
def test_actions_are_pinned(workflow: Path) -> None:
    """A tag can be moved to other code; the hash of a commit cannot."""
    uses = re.findall(r"\buses: *(.*)", workflow.read_text())
    assert uses
    assert [line for line in uses if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_an_action_has_one_version() -> None:
    uses = {line for path in WORKFLOWS for line in re.findall(r"\buses: *(\S+)", path.read_text())}
    assert len({line.partition("@")[0] for line in uses}) == len(uses)


@each_workflow
def test_programs_exist(workflow: Path) -> None:
    text = workflow.read_text()
    targets = re.findall(r"\bmake (\w+)", text)
    assert targets if workflow.stem != "wheels" else "wheel" in targets
    assert set(targets) <= MAKE_TARGETS
    named = set(re.findall(r"(?<![\w/])(?:wheels|requirements)/\w+\.\w+", text))
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_workflow
def test_rights(workflow: Path) -> None:
    """None for the workflow, for a job those to read; only the job that publishes may prove who it is."""
    text = workflow.read_text()
    assert "\npermissions: {}\n" in text
    jobs = re.split(r"^  (\w+):\n", text.partition("\njobs:\n")[2], flags=re.MULTILINE)
    for name, body in zip(jobs[1::2], jobs[2::2], strict=True):
        (rights,) = re.findall(r"^    permissions:\n((?:      .*\n)+)", body, re.MULTILINE)
        expected = "id-token: write" if name == "publish" else "contents: read"
        assert [line.partition(" #")[0].strip() for line in rights.splitlines()] == [expected]
        assert body.count("uses: actions/checkout@") == body.count("persist-credentials: false")


def test_rows_are_not_repeated() -> None:
    """Which wheels and which torch versions there are is said by the tables in wheels/ alone."""
    text = next(path for path in WORKFLOWS if path.stem == "wheels").read_text()
    assert re.findall(r"(\w+): \$\{\{ fromJSON\(needs\.plan\.outputs\.(\w+)\) \}\}", text) == [
        ("wheel", "wheels"),
        ("row", "compat"),
    ]


def test_test_files_have_names_of_their_own() -> None:
    """``make test`` collects all of them in one run, and pytest imports them by these. CI runs some folders apart."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
