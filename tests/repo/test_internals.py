"""docs/internals.md: the files that it names exist, the glossary is in order, and folders know what it says they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "internals.md").read_text()
KERNELS = ROOT / "csrc" / "kernels"


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.+?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    table = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    return [re.split(r" *\| *", line) for line in table[2:]]


def test_the_files_that_it_names_exist() -> None:
    """Also names without a folder, such as those of the package's modules."""
    folders = "csrc", "src", "tests", "wheels", "docs", "benchmarks"
    code = re.findall(r"`([^`\n ]+)`", DOCUMENT)
    paths = {name for name in code if name.startswith(tuple(f"{folder}/" for folder in folders))}
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []
    alone = {name for name in code if re.fullmatch(r"[\w/]+\.(py|h|cuh|cpp|cu|json)", name)} - paths
    assert [name for name in alone if not any(ROOT.glob(f"{folder}/**/{name}") for folder in folders)] == []


def test_the_diagrams_name_files_of_the_tree() -> None:
    diagrams = "".join(re.findall(r"^```text\n(.+?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL))
    names = re.findall(r"[\w/*]+\.(?:py|h|cuh)\b", diagrams)
    assert len(names) > 12
    where = ROOT / "src" / "fused_conv_bn", ROOT, ROOT / "csrc" / "torch"
    assert [name for name in names if not any([*place.glob(name)] for place in where)] == []


def test_every_algorithm_s_folder_has_a_plan() -> None:
    """What the walk begins with."""
    includes = re.findall(r'"kernels/conv/(\w+)/plan\.h"', (KERNELS / "conv" / "registry.h").read_text())
    assert "pointwise" in includes and len(includes) > 4
    for name in includes:
        assert (KERNELS / "conv" / name / "plan.h").is_file()


def test_the_glossary_is_in_order() -> None:
    words = [row[0] for row in rows("Glossary")]
    assert len(words) > 40
    assert words == sorted(words, key=str.lower) and len(words) == len(set(words))


@pytest.mark.parametrize("folder", sorted(path.name for path in KERNELS.iterdir()))
def test_a_folder_knows_what_the_table_says(folder: str) -> None:
    """By its includes."""
    (knows,) = [cells[2] for cells in rows("What may know what") if cells[0] == f"`csrc/kernels/{folder}/`"]
    files = [path for path in (KERNELS / folder).rglob("*") if path.is_file()]
    included = {name for path in files for name in re.findall(r'#include "kernels/(\w+)/', path.read_text())}
    assert included - {folder} == set(re.findall(r"`(\w+)/`", knows))


def test_no_algorithm_knows_another() -> None:
    for path in (KERNELS / "conv").glob("*/*"):
        included = set(re.findall(r'#include "kernels/conv/(\w+)/', path.read_text()))
        assert included <= {path.parent.name, "epilogue"}, path
