"""docs/deploy.md: its sessions and its commands, in their order."""

from __future__ import annotations

import doctest
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy_document import DOCUMENT, shell_blocks


def test_the_document_s_sessions_and_commands(
    workplace: Path,
    program: Path,
    need_onnx: None,
    shell: Callable[[str], subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert [text for kind, text in blocks if kind == "bash"] == shell_blocks()
    assert {kind for kind, _ in blocks} == {"bash", "python"}
    names: dict[str, object] = {}
    runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
    for i, (kind, text) in enumerate(blocks):
        if kind == "bash":
            done = shell(text)
            assert done.returncode == 0, done.stdout + done.stderr
            continue
        session = parser.get_doctest(text, names, f"block {i}", str(DOCUMENT), 0)
        assert session.examples
        assert runner.run(session, clear_globs=False).failed == 0
        names = session.globs
