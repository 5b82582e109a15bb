"""The schemas of torch.ops.fused_conv_bn, from csrc/bindings.cpp alone: no library has to be built for it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

BINDINGS = Path(__file__).resolve().parents[2] / "csrc" / "bindings.cpp"


def schemas(source: Path = BINDINGS) -> list[str]:
    """All of them in their order, as PyTorch writes them. Takes a C++ compiler, for the macros."""
    text = re.sub(r"^#include.*$", "", source.read_text(), flags=re.MULTILINE)
    command = [os.environ.get("CXX", "c++"), "-E", "-P", "-x", "c++", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    literals = re.findall(r'm\.def\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)\)', done.stdout)
    return ["".join(re.findall(r'"((?:[^"\\]|\\.)*)"', literal)) for literal in literals]


def name_of(schema: str) -> str:
    """``"bn_scale.out"``"""
    return schema.partition("(")[0]


def is_public(schema: str) -> bool:
    return not schema.startswith("_")
