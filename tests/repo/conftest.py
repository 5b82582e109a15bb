"""What builds the libraries and the wheels, imported anew for each test, and one report of the benchmark for all."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from building import load


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's tables in one piece."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What looks for torch and the compilers, with none of its environment variables set."""
    return load("build_tools.environment", monkeypatch)


@pytest.fixture
def libraries(environment: ModuleType) -> ModuleType:
    return importlib.import_module("build_tools.libraries")


@pytest.fixture
def flags(environment: ModuleType) -> ModuleType:
    return importlib.import_module("build_tools.flags")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load("build", monkeypatch)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    return module


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load("toolchain", monkeypatch)


@pytest.fixture(scope="session")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from benching import TINY, call  # most tests here run without the libraries, which it loads

    path = tmp_path_factory.mktemp("bench") / "new" / "report.jsonl"
    assert call(*TINY, "--device=cpu", "--record", str(path)) == 0
    return path
