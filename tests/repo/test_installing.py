"""docs/installing.md lists what the sources have: compute capabilities and environment variables."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "installing.md").read_text()


def test_compute_capabilities_are_those_of_the_wheel() -> None:
    """In what `info` is said to print."""
    shown = re.findall(r"^CUDA code for +(.+)$", DOCUMENT, re.MULTILINE)
    libraries = json.loads((ROOT / "wheels" / "matrix.json").read_text())["libraries"]
    assert shown == [" ".join(libraries["cu13"]["archs"])]


def test_variables_are_those_of_the_sources() -> None:
    """Each variable of ours that a file reads is in the document, and the other way round."""
    files = [
        ROOT / "setup.py",
        *(ROOT / "build_tools").glob("*.py"),
        *(ROOT / "wheels").glob("*.py"),
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        ROOT / "tests/conftest.py",
    ]
    read = {name for file in files for name in re.findall(r"\bFUSED_CONV_BN_[A-Z]+\b", file.read_text())}
    internal = {"FUSED_CONV_BN_GLIBC", "FUSED_CONV_BN_LIBRARIES"}  # from wheels/build.py to setup.py
    assert set(re.findall(r"\bFUSED_CONV_BN_[A-Z]+\b", DOCUMENT)) == read - internal
