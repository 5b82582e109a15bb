"""docs/installing.md explains the messages that users get: all of them, and none that the sources no longer have."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "installing.md").read_text()

EXPLAINED = [
    "src/fused_conv_bn/_loader.py",
    "build_tools/commands.py",
    "build_tools/environment.py",
    "build_tools/libraries.py",
    "csrc/torch/shim.h",
]
"""The files whose every error message is in the document."""

QUOTED = [*EXPLAINED, "csrc/ops/conv_choice.h", "wheels/build.py"]
"""The files that messages in the document come from."""

# The document quotes messages, and nothing else, in blocks of this kind.
QUOTES = [" ".join(block.split()) for block in re.findall(r"^```text\n(.+?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)]

Parts = list[str | None]
"""A message: its words, and None for each thing that is filled in."""


def python_texts(source: str) -> tuple[list[Parts], list[Parts]]:
    """All texts, and those that are raised as errors."""

    def parts(node: ast.expr) -> Parts:
        values = node.values if isinstance(node, ast.JoinedStr) else [node]
        return [str(value.value) if isinstance(value, ast.Constant) else None for value in values]

    nodes = list(ast.walk(ast.parse(source)))
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    errors = [call.args[0] for call in calls if call.func.id in ("ImportError", "fail")]  # type: ignore[attr-defined]
    texts = [node for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return [parts(node) for node in texts], [parts(node) for node in errors if not isinstance(node, ast.Name)]


def cpp_texts(source: str) -> tuple[list[Parts], list[Parts]]:
    calls = re.findall(r"(?<!void )\bfail\((.+?)\);", source, re.DOTALL)
    tokens = [re.findall(r'"([^"]*)"|[^\s",][^",]*', call) for call in calls]  # "" is what is no literal
    errors: list[Parts] = [[token or None for token in call] for call in tokens]
    return errors, errors


def texts(name: str) -> tuple[list[Parts], list[Parts]]:
    source = (ROOT / name).read_text()
    return python_texts(source) if name.endswith(".py") else cpp_texts(source)


def is_quote(quote: str, parts: Parts) -> bool:
    """Whether a message of these parts can read so. One that has hardly any words of its own says nothing."""
    pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
    enough = sum(len(part or "") for part in parts) > 20
    # build_tools' fail() puts the package's name before the message.
    return enough and re.fullmatch(f"(fused_conv_bn: )?{pattern}", quote) is not None


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_message_is_in_the_sources(quote: str) -> None:
    assert any(is_quote(quote, parts) for name in QUOTED for parts in texts(name)[0])


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_message_is_explained(name: str) -> None:
    errors = texts(name)[1]
    assert errors
    assert [parts for parts in errors if not any(is_quote(quote, parts) for quote in QUOTES)] == []


def test_compute_capabilities_are_those_of_the_wheel() -> None:
    """In what `info` is said to print."""
    shown = re.findall(r"^    CUDA code for +(.+)$", DOCUMENT, re.MULTILINE)
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
