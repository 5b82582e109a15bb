"""docs/troubleshooting.md explains the messages that users get: all of them, and none that the sources no longer have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fused_conv_bn._fuse.words import REASONS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "troubleshooting.md").read_text()
PACKAGE = "src/fused_conv_bn"

EXPLAINED = {
    f"{PACKAGE}/_loader.py": {"ImportError"},
    f"{PACKAGE}/_dispatch.py": {"RuntimeError", "TypeError"},
    f"{PACKAGE}/_choices.py": {"warn"},
    f"{PACKAGE}/_block.py": {"TypeError", "ValueError"},
    f"{PACKAGE}/modules.py": {"TypeError"},
    f"{PACKAGE}/graphs.py": {"RuntimeError", "TypeError", "ValueError", "warn"},
    f"{PACKAGE}/_graphs/model.py": {"TypeError"},
    f"{PACKAGE}/_graphs/recording.py": {"RuntimeError"},
    f"{PACKAGE}/_graphs/with_backward.py": {"RuntimeError"},
    f"{PACKAGE}/_fuse/__init__.py": {"RuntimeError", "TypeError", "ValueError"},
    f"{PACKAGE}/_fuse/backend.py": {"ValueError"},
    f"{PACKAGE}/_fuse/capture.py": {"Refused"},
    f"{PACKAGE}/_fuse/entry.py": {"Refused"},
    f"{PACKAGE}/_fuse/root.py": {"Refused"},
    f"{PACKAGE}/_bench.py": {"ArgumentTypeError", "UsageError"},
    f"{PACKAGE}/_cli_model.py": {"UsageError"},
    f"{PACKAGE}/_demo.py": {"UsageError"},
    f"{PACKAGE}/_model_times.py": {"UsageError"},
    "build_tools/commands.py": {"fail"},
    "build_tools/environment.py": {"fail"},
    "build_tools/libraries.py": {"fail"},
    "csrc/torch/shim.h": {"fail"},
    "csrc/torch/operand.h": {"fail"},
    "csrc/torch/checks.h": {"fail"},
    "csrc/torch/conv_checks.h": {"fail"},
    "csrc/ops/bn_scale_cat.h": {"fail"},
    "csrc/ops/conv_choice.h": {"fail"},
    "csrc/ops/fold_bn.h": {"fail"},
    "csrc/ops/gate.h": {"fail"},
    "csrc/ops/max_pool2d.h": {"fail"},
    "csrc/ops/max_pool2d_train.h": {"fail"},
    "csrc/ops/spatial_mean.h": {"fail"},
    "csrc/ops/squeeze_excite.h": {"fail"},
}
"""Files, and what raises the messages that all of them are in the document: calls of these names."""

QUOTED = [
    *EXPLAINED,
    f"{PACKAGE}/_checks.py",  # the ops' messages, once more
    f"{PACKAGE}/_joined.py",
    f"{PACKAGE}/conditions.py",
    f"{PACKAGE}/ops.py",
    f"{PACKAGE}/reference.py",
    f"{PACKAGE}/_fuse/compare.py",
    f"{PACKAGE}/_fuse/frozen.py",
    f"{PACKAGE}/_fuse/report.py",
    f"{PACKAGE}/_fuse/tune.py",
    f"{PACKAGE}/_stopwatch.py",
    f"{PACKAGE}/_tune.py",
    "wheels/build.py",
]
"""The files that messages in the document come from."""

Parts = list[str | None]
"""A message: its words, and None for each thing that is filled in."""


def quotes_of(document: str) -> list[str]:
    """What it quotes: blocks of text, and the code that a row of a table begins with."""
    blocks = re.findall(r"^```text\n(.+?)^```$", document, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `([^`]+)` \|", document, re.MULTILINE)
    return [" ".join(quote.split()) for quote in [*blocks, *rows]]


def section(title: str) -> str:
    """What is below a heading, down to the next one."""
    (text,) = re.findall(rf"^##+ {re.escape(title)}\n(.+?)(?=^##|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    return text


ERRORS_OF_CUDA = [row for row in quotes_of(section("From the ops")) if row.startswith("cudaError")]
REASONS_OF_LOADING = [row for row in quotes_of(section("From `import fused_conv_bn`")) if row.startswith("<bytes>")]
KINDS = quotes_of(section("The reasons of a report"))
QUOTES = [q for q in quotes_of(DOCUMENT) if q not in [*ERRORS_OF_CUDA, *REASONS_OF_LOADING, *KINDS]]


# ---- the messages of the sources -------------------------------------------------------------------------------------


def parts_of(node: ast.expr) -> Parts:
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    return [str(value.value) if isinstance(value, ast.Constant) else None for value in values]


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def python_texts(source: str, raised_by: set[str]) -> tuple[list[Parts], list[Parts]]:
    """All texts, and those that are raised as errors."""
    nodes = list(ast.walk(ast.parse(source)))
    errors = [
        call.args[0]
        for call in nodes
        if isinstance(call, ast.Call) and call.args and ast.unparse(call.func).rpartition(".")[2] in raised_by
    ]
    texts = [node for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return [parts_of(node) for node in texts], [parts_of(node) for node in errors if is_text(node)]


def cpp_texts(source: str) -> tuple[list[Parts], list[Parts]]:
    calls = re.findall(r"(?<!void )\bfail\((.+?)\);", source, re.DOTALL)
    calls = [re.sub(r'[^,"]+\?\s*"[^"]*"\s*:\s*("[^"]*"|[^,]+)', " either", call) for call in calls]
    tokens = [re.findall(r'"([^"]*)"|[^\s",][^",]*', call) for call in calls]  # "" is what is no literal
    errors: list[Parts] = [[token or None for token in call] for call in tokens]
    return errors, errors


def texts(name: str) -> tuple[list[Parts], list[Parts]]:
    source = (ROOT / name).read_text()
    return python_texts(source, EXPLAINED.get(name, set())) if name.endswith(".py") else cpp_texts(source)


def returned_texts(file: str, *names: str) -> list[Parts]:
    """What functions return that give a reason."""
    tree = ast.walk(ast.parse((ROOT / PACKAGE / file).read_text()))
    functions = [f for f in tree if isinstance(f, ast.FunctionDef) and f.name in names]
    returned = [node.value for f in functions for node in ast.walk(f) if isinstance(node, ast.Return)]
    return [parts_of(value) for value in returned if value is not None and is_text(value)]


def is_quote(quote: str, parts: Parts) -> bool:
    """Whether a message of these parts can read so. One that has hardly any words of its own says nothing."""
    pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
    enough = sum(len(part or "") for part in parts) > 10
    # build_tools' fail() puts the package's name before the message.
    return enough and re.fullmatch(f"(fused_conv_bn: )?{pattern}", quote) is not None


ALL_TEXTS = [parts for name in QUOTED for parts in texts(name)[0]]


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_message_is_in_the_sources(quote: str) -> None:
    assert any(is_quote(quote, parts) for parts in ALL_TEXTS)


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_message_is_explained(name: str) -> None:
    errors = texts(name)[1]
    assert errors
    assert [parts for parts in errors if not any(is_quote(quote, parts) for quote in QUOTES)] == []


def test_the_reasons_of_a_report() -> None:
    rows = re.findall(r"^\| `([\w ]+)` \| (.+?) \| .*\|$", section("The reasons of a report"), re.MULTILINE)
    assert {kind: re.sub(r"`<[^>]*>`", "{}", text) for kind, text in rows} == REASONS
    assert KINDS == [kind for kind, _ in rows]


def test_the_reasons_of_why_not() -> None:
    reasons = returned_texts("conditions.py", "operands", "why_refused", "why_norm_refused")
    quotes = quotes_of(section("The reasons of why_not"))
    assert len(reasons) > 30
    assert [parts for parts in reasons if not any(is_quote(quote, parts) for quote in quotes)] == []
    assert [quote for quote in quotes if not any(is_quote(quote, parts) for parts in reasons)] == []


def test_what_disturbs_a_measurement() -> None:
    reasons = [parts for parts in returned_texts("_stopwatch.py", "why_disturbed") if parts != [""]]
    assert len(reasons) == 2
    assert [parts for parts in reasons if not any(is_quote(quote, parts) for quote in QUOTES)] == []


def test_a_message_that_is_nowhere_is_found() -> None:
    """These tests can fail."""
    assert not any(is_quote("conv is of kind <Conv>, not nn.Conv3d itself", parts) for parts in ALL_TEXTS)
    source = 'def f(x):\n    raise ValueError(f"f: x is {x}, expected a thing of another kind")\n'
    (error,) = python_texts(source, {"ValueError"})[1]
    assert not any(is_quote(quote, error) for quote in QUOTES)
