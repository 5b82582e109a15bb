"""The compatibility table: what wheels/compat.py reads, keeps and renders, without installing anything."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import compat

TABLE = [compat.Row("2.10.0", "3.10"), compat.Row("2.10.0", "3.13t"), compat.Row("newest", "3.13", cpu=True)]


def record(torch: str, python: str, **changes: Any) -> dict[str, Any]:
    """What compat.json has of a row that passed."""
    versions = {
        "torch": f"{torch}+cu128",
        "cuda": "12.8",
        "python": f"{python.rstrip('t')}.1",
        "loaded": ["cpu", "cu12"],
    }
    tests = {"passed": 1013, "failed": 0, "skipped": 846}
    return {"torch": torch, "python": python, "result": "passed", "versions": versions, "tests": tests, **changes}


def test_readme_has_the_table_of_the_record() -> None:
    readme = compat.README.read_text()
    assert readme == compat.render(readme, compat.read_record()), "run: python wheels/compat.py --render"


def test_every_row_is_recorded_once_and_in_order() -> None:
    rows, _ = compat.read_table()
    assert [(r["torch"], r["python"]) for r in compat.read_record()] == [row.key for row in rows]


def test_rendering_shows_failures_and_keeps_the_rest() -> None:
    failed = {"result": "failed", "tests": {"passed": 1011, "failed": 2, "skipped": 846}}
    records = [
        record("2.10.0", "3.10"),
        record("2.10.0", "3.13t", **failed),
        {"torch": "newest", "python": "3.13", "result": "failed", "error": "pip install failed: a | b"},
    ]
    readme = "above\n<!-- compat -->old<!-- /compat -->\nbelow\n"
    rendered = compat.render(readme, records)
    assert rendered == compat.render(rendered, records)
    assert rendered.startswith("above\n<!-- compat -->\n| torch |") and rendered.endswith(
        "|\n<!-- /compat -->\nbelow\n"
    )
    assert rendered.splitlines()[4:7] == [
        "| 2.10.0 | CUDA 12.8 | 3.10.1 | cpu, cu12 | 1013 passed |",
        "| 2.10.0 | CUDA 12.8 | 3.13.1 free-threaded | cpu, cu12 | **2 failed, 1011 passed** |",
        "| newest |  | 3.13 |  | **pip install failed: a \\| b** |",
    ]


@pytest.mark.parametrize("readme", ["", "<!-- compat -->", "<!-- /compat --><!-- compat -->"])
def test_rendering_needs_both_markers(readme: str) -> None:
    with pytest.raises(SystemExit, match="README.md must have"):
        compat.render(readme, [])


def test_merge_replaces_what_ran_and_forgets_what_is_no_row() -> None:
    old = [record("2.10.0", "3.10"), record("1.0", "3.10"), record("newest", "3.13")]
    new = [record("newest", "3.13", result="failed"), record("2.10.0", "3.13t")]
    assert compat.merge(TABLE, old, new) == [old[0], new[1], new[0]]


@pytest.mark.parametrize(
    ("only", "selected"),
    [([], TABLE), (["2.10.0"], TABLE[:2]), (["newest", "2.10.0/3.13t"], TABLE[1:])],
)
def test_only(only: list[str], selected: list[Any]) -> None:
    assert compat.select(TABLE, only) == selected


@pytest.mark.parametrize("name", ["2.10", "2.10.0/3.11", "3.10"])
def test_only_with_an_unknown_row(name: str) -> None:
    with pytest.raises(SystemExit, match=f"--only has '{name}', expected one of 2.10.0/3.10, "):
        compat.select(TABLE, ["2.10.0", name])


def test_summary_counts_failures_errors_and_reasons() -> None:
    junit = """<testsuites><testsuite>
      <testcase classname="tests.a" name="good"/>
      <testcase classname="tests.a" name="bad"><failure message="1 != 2&#10;more">trace</failure></testcase>
      <testcase classname="tests.a" name="broken"><error message="no fixture">trace</error></testcase>
      <testcase classname="tests.b" name="gpu"><skipped message="needs 1 GPU(s), 0 usable">where</skipped></testcase>
    </testsuite></testsuites>"""
    assert compat.summary(junit) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "skip_reasons": {"needs 1 GPU(s), 0 usable": 1},
        "failures": ["tests.a::bad: 1 != 2", "tests.a::broken: no fixture"],
    }


def test_environment_hides_cuda_and_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = tmp_path / "toolkit"
    toolkit.mkdir()
    (toolkit / "nvcc").touch()
    monkeypatch.setenv("PATH", f"{toolkit}:/usr/bin")
    for name in ("CUDA_HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "FUSED_CONV_BN_REQUIRE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "1")
    env = compat.clean_environment(tmp_path)
    assert env["PATH"] == "/usr/bin" and env["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"CUDA_HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "FUSED_CONV_BN_REQUIRE_CUDA"} & env.keys()
    assert "TORCH_CUDA_ARCH_LIST" not in env


def test_python_versions() -> None:
    version = compat.python_version(sys.executable)
    assert version is not None and version.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert compat.find_python(version, {}) == sys.executable
    assert compat.find_python("2.0", {}) is None
    assert compat.find_python("2.0", {"2.0": sys.executable}) is None


# ---- a row, with pip and Python replaced -----------------------------------------------------------------------------


class FakeEnvironment(compat.Environment):  # type: ignore[misc]
    """Knows which torch builds pip would find, and what the new environment says of itself."""

    def __init__(self, offered: str, told: str = "{}") -> None:
        self.python, self.offered, self.told = "python", offered, told
        self.commands: list[tuple[str, ...]] = []

    def run(self, *command: str) -> tuple[int, str]:
        self.commands.append(command)
        if "pip" in command:
            found = any(word == self.offered for word in command)
            return (0, "") if found else (1, "ERROR: No matching distribution found\nhint")
        return 0, self.told


@pytest.mark.parametrize(
    ("row", "installed"),
    [
        (compat.Row("newest", "3.13"), "torch"),
        (compat.Row("2.10.0", "3.10"), "torch==2.10.0"),
        (compat.Row("2.13.0", "3.11", cpu=True), "torch==2.13.0+cpu"),
    ],
)
def test_install(row: Any, installed: str) -> None:
    environment = FakeEnvironment(offered=installed)
    compat.install(environment, row, Path("a.whl"))
    (command,) = environment.commands
    assert command[-2:] == (installed, "a.whl") and "--no-deps" not in command


def test_cpu_build_comes_from_torchs_index_if_need_be() -> None:
    environment = FakeEnvironment(offered=compat.CPU_INDEX)
    compat.install(environment, compat.Row("2.13.0", "3.11", cpu=True), Path("a.whl"))
    assert [compat.CPU_INDEX in command for command in environment.commands] == [False, True]


def test_failed_install() -> None:
    with pytest.raises(compat.RowError, match="^pip install failed: ERROR: No matching distribution found$"):
        compat.install(FakeEnvironment(offered=""), compat.Row("2.10.0", "3.10"), Path("a.whl"))


@pytest.mark.parametrize(
    ("row", "told", "message"),
    [
        (TABLE[0], {"installed": False}, "from somewhere else"),
        (TABLE[0], {"foreign": ["/usr/lib/libcudart.so.12"]}, "CUDA is not hidden: /usr/lib/libcudart.so.12"),
        (TABLE[1], {}, "the GIL is on"),
        (TABLE[2], {}, r"torch 2.15.0\+cu132 is built for CUDA 13.2, expected a build without CUDA"),
    ],
)
def test_an_environment_that_tests_something_else_fails(row: Any, told: dict[str, Any], message: str) -> None:
    facts = {"torch": "2.15.0+cu132", "cuda": "13.2", "gil": True}
    environment = FakeEnvironment("", compat.json.dumps({"installed": True, "foreign": [], "facts": facts, **told}))
    with pytest.raises(compat.RowError, match=message):
        compat.gather_facts(environment, row)


def test_wheel_is_described_by_the_code_in_it(tmp_path: Path) -> None:
    for name, readme in (("a.whl", "one"), ("b.whl", "two")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("fused_conv_bn/_cpu.so", "code")
            archive.writestr("METADATA", readme)
    a, b = (compat.describe_wheel(tmp_path / name) for name in ("a.whl", "b.whl"))
    assert a["libraries"] == b["libraries"] and list(a["libraries"]) == ["_cpu.so"]
    assert a["sha256"] != b["sha256"] and a["file"] == "a.whl"
