"""The documents: every block of code is run, or is in a table with the reason why not, and every link leads somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import documents
import fused_conv_bn as fcb
from documents import DOCUMENTS, ROOT, Block, Command
from fused_conv_bn.__main__ import main
from fused_conv_bn._fuse import tune
from fused_conv_bn._fuse.backend import compile_backend
from fused_conv_bn._stopwatch import Processors

ELSEWHERE = {
    "docs/deploy.md": "tests/deploy/test_deploy_document.py",
    "docs/distributed.md": "tests/repo/test_distributed_document.py",
    "docs/ecosystem.md": "tests/models/test_ecosystem.py",
}
"""Documents whose sessions and programs another test runs, with what they take."""

BLOCKS = [block for path in DOCUMENTS for block in documents.blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python" and block.document not in ELSEWHERE]
TYPED = [
    command
    for block in BLOCKS
    if block.language in ("bash", "console", "indented") and block.document != "docs/deploy.md"  # ELSEWHERE, with them
    for command in documents.commands(block)
]

NOT_RUN = {
    "installs, over a network or from a wheel: wheels/compat.py does it in CI": [
        "pip install .",
        "pip install -e .",
        "pip install --no-index --find-links packages fused_conv_bn",
        "pip install --no-index --no-build-isolation .",
        "pip install -r requirements/dev.txt",
        "pip install fused_conv_bn --index-url https://your.host/path/cu130",
        "pip install fused_conv_bn-0.1.0-py3-none-manylinux_2_28_x86_64.whl",
        "pip install fused_conv_bn-0.1.0.tar.gz",
        "pip install pypi-attestations",
        "pip download --dest packages fused_conv_bn-0.1.0-py3-none-manylinux_2_28_x86_64.whl",
        "CUDA_HOME=/usr/local/cuda-12.8 pip install .",
        "FUSED_CONV_BN_CUDA=0 pip install .",
        "TORCH_CUDA_ARCH_LIST=9.0 pip install .",
    ],
    "takes a wheel that is built or published: .ci/run and the workflows do it": [
        ".venv/bin/python wheels/audit.py wheels/dist/*.whl",
        ".venv/bin/python wheels/index.py wheels/dist OUT",
        "python wheels/audit.py fused_conv_bn-0.1.0-py3-none-manylinux_2_28_x86_64.whl",
        "pypi-attestations verify pypi --repository https://github.com/OWNER/fused_conv_bn "
        "pypi:fused_conv_bn-0.1.0-py3-none-manylinux_2_28_x86_64.whl",
        "git clone https://github.com/OWNER/fused_conv_bn && cd fused_conv_bn && git checkout v0.1.0",
        "sha256sum wheels/dist/*.whl",
    ],
    "is all that CI is": [".ci/run"],
    "tests/repo/test_distributed_document.py types it": ["torchrun --nproc-per-node 2 program.py"],
    "takes pictures, and downloads weights; tests/models/test_batch_inference.py runs it without": [
        "torchrun --nproc-per-node 8 examples/batch_inference.py IMAGES --out results.jsonl --weights DEFAULT"
    ],
    "takes a library for CUDA": [
        'export PATH="$PWD/.venv/bin:$(echo $PWD/.venv/lib/python3*/site-packages/nvidia/cu13/bin):$PATH"',
        "cuobjdump -sass src/fused_conv_bn/_cu13.so | c++filt | less",
        "cuobjdump -res-usage src/fused_conv_bn/_cu13.so | c++filt",
    ],
    "takes a GPU and a CUDA toolkit": [
        "export FUSED_CONV_BN_REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        "compute-sanitizer --tool memcheck --error-exitcode 1 .venv/bin/python -m pytest -x tests",
        "compute-sanitizer --tool racecheck --error-exitcode 1 .venv/bin/python -m pytest -x tests",
        "compute-sanitizer --tool synccheck --error-exitcode 1 .venv/bin/python -m pytest -x tests",
        "PYTHONPATH=tests .venv/bin/python -m fuzz.many --count 100000 --record benchmarks/results/h200_fuzz.jsonl",
        "PYTHONPATH=tests .venv/bin/python -m fuzz.many --count 1000 --sanitizer memcheck "
        "--record benchmarks/results/h200_memcheck.jsonl",
    ],
    "measures for minutes without a GPU; the next line of that document is run": [
        "python -m fused_conv_bn tune torchvision.models:resnet50 --batch 32 --dtype float16 --channels-last",
    ],
}
"""What no test types, and why."""

LISTED = [command for commands in NOT_RUN.values() for command in commands]

OURS = "python -m fused_conv_bn "
REQUIRED = int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0)

ADDED = {"bench": "--rounds 2 --device cpu", "demo": "--device cpu", "tune": "--device cpu", "info": ""}
"""So that each command takes seconds, and prints what the documents show: what a CPU does."""

FILES = {
    "file.py": "from torch import nn\n\n\ndef make_model():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))"
}
"""Files that commands name, and no block shows."""

QUOTED_FROM = [
    *("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cu", "csrc/**/*.cpp", "wheels/*.json", "examples/**/*.*"),
    *("aoti/**/*.*", "requirements/*.txt", "mkdocs.yml", "pyproject.toml"),
]
"""Where a block may come from that is neither Python nor a command."""


# ---- sessions and programs -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _torchvision_and_the_backend() -> None:
    """What an installation has: torchvision's ops, and the entry point."""
    spec = importlib.util.spec_from_file_location("vision_ops", ROOT / "tests" / "models" / "vision_ops.py")
    assert spec is not None and spec.loader is not None
    if "vision_ops" not in sys.modules:
        sys.modules["vision_ops"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["vision_ops"])
    sys.modules["vision_ops"].provide()
    if "fused_conv_bn" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(compile_backend, name="fused_conv_bn")


WITH_SESSIONS = list(dict.fromkeys(block.document for block in PYTHON if block.is_session))


@pytest.mark.parametrize("document", ELSEWHERE)
def test_what_another_test_runs(document: str) -> None:
    assert (ROOT / document).exists() and document in (ROOT / ELSEWHERE[document]).read_text().partition("\n")[0]


@pytest.mark.parametrize("name", WITH_SESSIONS)
def test_sessions_print_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    monkeypatch.setattr(tune, "_UNDECIDED", float("inf"))  # on a busy machine as on others
    monkeypatch.setattr(Processors, "look", lambda self: None)
    failed, attempted = doctest.testfile(str(ROOT / name), module_relative=False)
    assert attempted > 3 and not failed


@pytest.mark.parametrize(
    "block",
    [block for block in PYTHON if not block.is_session],
    ids=lambda block: f"{block.document}:{block.line}",
)
def test_programs_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, f"{block.document}:{block.line}", "exec"), {"__name__": "program"})


ON_AN_H200 = {"fused_conv_bn.algorithms.explain"}
"""Docstrings whose sessions say what an H200 runs."""


def docstrings() -> Iterator[tuple[str, str]]:
    """(name, text) of what the package documents."""
    package = ROOT / "src" / "fused_conv_bn"
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield f"{module}.{node.name}", text


def test_examples_in_docstrings_run() -> None:
    """The reference has them: sessions, and programs with a model and its input."""
    is_h200 = torch.cuda.is_available() and torch.cuda.get_device_name().startswith("NVIDIA H200")
    ran = []
    for name, text in docstrings():
        given = {"fcb": fcb, "torch": torch, "nn": torch.nn}
        if ">>>" in text:
            assert is_h200 or name in ON_AN_H200, f"{name} has a session: run it here"
            if is_h200:
                test = doctest.DocTestParser().get_doctest(text, given, name, None, None)
                assert doctest.DocTestRunner().run(test).failed == 0, name
            ran.append(name)
            continue
        for block in re.findall(r"^Example::\n\n((?:    .*\n|\n)+)", text, re.MULTILINE):
            given |= {"model": torch.nn.Conv2d(3, 4, 3).eval(), "x": torch.randn(1, 3, 8, 8)}
            exec(compile(textwrap.dedent(block), name, "exec"), given)
            ran.append(name)
    assert ON_AN_H200 <= set(ran) and len(ran) >= 3


def test_every_block_is_of_a_known_kind() -> None:
    """Text is what is printed, and diagrams. The first page has output without a language."""
    kinds = {"python", "bash", "console", "text", "cpp", "json", "cmake", "toml", "yaml"}
    unknown = [block for block in BLOCKS if block.language not in kinds and block.document != "README.md"]
    assert [f"{block.document}:{block.line} is {block.language or 'without a language'}" for block in unknown] == []


def test_quoted_sources_are_what_they_were() -> None:
    sources = [
        [line.strip() for line in path.read_text().splitlines()]
        for pattern in QUOTED_FROM
        for path in ROOT.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    ]
    quotes = [block for block in BLOCKS if block.language in ("cpp", "json", "cmake", "toml", "yaml")]
    assert quotes
    for block in quotes:
        lines = [line.strip() for line in block.text.splitlines()]
        found = any(
            source[i : i + len(lines)] == lines
            for source in sources
            for i in range(len(source))
            if source[i] == lines[0]
        )
        assert found, f"{block.document}:{block.line} is in none of the sources"


# ---- commands --------------------------------------------------------------------------------------------------------


def each(commands: Iterator[Command]) -> Callable[..., pytest.MarkDecorator]:
    unique = {(command.document, command.text): command for command in commands}
    return pytest.mark.parametrize("command", unique.values(), ids=[text for _, text in unique])


def shape(output: str) -> list[str]:
    """What a command prints, without its numbers; of a table of groups, whose order is that of their times, the head."""
    lines = re.sub(r"^(group .*\n)(.*\n)*", r"\1", output, flags=re.MULTILINE).splitlines()
    return [re.sub(r"\d[\d.,]*(e[+-]\d+)?|threads?", "#", " ".join(line.split())) for line in lines]


def labels(output: str) -> set[str]:
    return {re.split(r"  +| \d", line)[0] for line in output.splitlines()}


@each(command for command in TYPED if command.text.startswith(OURS) and command.text not in LISTED)
def test_commands_of_the_package(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command.text.removeprefix(OURS)
    needs = re.findall(r"(\w+)\.(?!py:)\w+:", arguments)
    if any(importlib.util.find_spec(name) is None for name in needs) and not REQUIRED:
        pytest.skip(f"needs {', '.join(needs)} (requirements/models.txt)")
    monkeypatch.chdir(tmp_path)
    shown = {block.title: block.text for block in BLOCKS if block.title and block.document == command.document}
    for name, text in (FILES | shown).items():
        Path(name).write_text(text)
    assert main(shlex.split(f"{arguments} {ADDED[arguments.split()[0]]}")) == 0
    printed = capsys.readouterr().out
    if not command.output:
        assert printed
    elif arguments == "info":  # a line for each library and GPU
        assert labels(printed) <= labels(command.output) | {"CUDA code for"}
    else:
        assert shape(printed) == shape(command.output)


@each(command for command in TYPED if re.match(r"([A-Z_0-9]+=\S+ )*make ", command.text))
def test_commands_of_make(command: Command) -> None:
    """That there are such targets. With -n nothing is done; what they do is what CI does."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    dry = command.text.replace("make ", "make -n VENV= PYTHON=python3 ", 1)
    done = subprocess.run(["bash", "-c", dry], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tests = re.search(r'ARGS="([^"]*tests/[^"]*)"', command.text)
    if tests:
        named = [word for word in shlex.split(tests[1]) if word.startswith("tests/")]
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_is_run_or_listed() -> None:
    assert len(LISTED) == len(set(LISTED))
    typed = {command.text for command in TYPED}
    assert [command for command in LISTED if command not in typed] == []
    run = re.compile(rf"{re.escape(OURS)}({'|'.join(ADDED)})\b.*|([A-Z_0-9]+=\S+ )*make .*")
    assert [text for text in typed if text not in LISTED and not run.fullmatch(text)] == []


def test_an_unlisted_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail."""
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text(
        "Text.\n\n    rm -r x\n\n- a list\n\n  ```bash\n  ls  # all\n  ```\n\n```\nx = 1\n```\n"
    )
    found = list(documents.blocks(tmp_path / "a.md"))
    assert [(block.language, block.line) for block in found] == [("bash", 7), ("", 11), ("indented", 3)]
    assert [c.text for block in found for c in documents.commands(block)] == ["ls", "x = 1", "rm -r x"]


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """To files of the tree and headings in them. What is elsewhere is looked at, and not asked for: CI may be offline."""
    for target, anchor in documents.links(path):
        if "://" in target:
            address = urllib.parse.urlsplit(target)
            assert address.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), target
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists() and file.is_relative_to(ROOT), f"{path.name} links to {target}"
        if anchor:
            assert anchor in documents.anchors(file), f"{path.name} links to {target}#{anchor}"


def test_a_link_to_no_heading_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A `b_c`, d\n\n[x](b.md#e) ![y](c.png) `[z](code)`\n\n## A `b_c`, d\n")
    assert documents.anchors(tmp_path / "a.md") == {"a-b_c-d", "a-b_c-d-1"}
    assert documents.links(tmp_path / "a.md") == [("b.md", "e"), ("c.png", "")]
