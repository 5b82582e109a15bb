"""What setup.py and wheels/ share: the tools that are there, the libraries to build, and how they are compiled.

environment    torch, the CUDA toolkits, the C++ compiler, ninja
libraries      the libraries, their sources, and the compute capabilities of each source
flags          what the compilers and the linker are told
extension      the libraries as torch's extensions, built by torch's BuildExtension; the only module that imports it
commands       setuptools' commands
backend        what pip calls
readme         README.md, as a package index shows it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
MATRIX = json.loads((ROOT / "wheels" / "matrix.json").read_text())


def fail(message: str) -> NoReturn:
    raise SystemExit(f"fused_conv_bn: {message}")
