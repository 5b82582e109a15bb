"""A folder as docs/deploy.md has it around its reader, with the C++ program of aoti/ built in it as it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy_document import ROOT, shell_blocks

# What is installed beside Python comes first, as in a shell where its environment is active.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    (folder / "aoti").symlink_to(ROOT / "aoti")
    return folder


@pytest.fixture(scope="session")
def shell(workplace: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs commands of the document."""

    def run(commands: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euc", commands],
            cwd=workplace,
            env=os.environ | {"PATH": PATH, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def program(workplace: Path, shell: Callable[[str], subprocess.CompletedProcess[str]]) -> Path:
    """run_package, built."""
    if shutil.which("cmake", path=PATH) is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs CMake and a C++ compiler: pip install cmake, apt install g++")
    (build,) = (block for block in shell_blocks() if block.startswith("cmake"))
    done = shell(build)
    assert done.returncode == 0, done.stdout + done.stderr
    return workplace / "build" / "aoti" / "run_package"


@pytest.fixture(scope="session")
def need_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
            pytest.importorskip(name)
