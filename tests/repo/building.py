"""The matrix of wheels, modules that a test imports anew, and fakes of what a build looks for."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
MATRIX = json.loads((ROOT / "wheels" / "matrix.json").read_text())
CUDA_LIBRARIES = [name for name in MATRIX["libraries"] if name != "cpu"]
CSRC = ROOT / "csrc"
CUDA_SOURCES = sorted(
    str(path.relative_to(CSRC).with_suffix(""))
    for path in CSRC.rglob("*.cu")
    if path.name.endswith("_cuda.cu") or path.name.startswith("instantiate_")
)
KERNELS = [(kernels, name) for kernels in MATRIX["kernels"] for name in CUDA_LIBRARIES]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable in [*filter(re.compile("FUSED_CONV_BN_").match, os.environ), "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(ROOT / "wheels")
    monkeypatch.syspath_prepend(ROOT)
    for module in [*sys.modules]:  # each test has its own
        if module.partition(".")[0] in ("build_tools", "build", "toolchain", "nvcc"):
            monkeypatch.delitem(sys.modules, module)
    return importlib.import_module(name)


def sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of an error, which has to be one sentence."""
    message = str(error.value)
    assert "\n" not in message and not message.endswith(".") and ". " not in message, message
    return message


# ---- what is installed -----------------------------------------------------------------------------------------------


def install_torch(directory: Path, version: str, cuda: str | None, *, headers: bool = True) -> Path:
    """Fakes as much of a torch as a build looks at."""
    package = directory / "torch"
    include = package / "include" / "torch" / "csrc" / "stable"
    include.mkdir(parents=True)
    if headers:
        (include / "library.h").touch()
    (package / "version.py").write_text(f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n")
    return directory


def install_nvcc(home: Path, release: str) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    nvcc.chmod(0o755)
    (home / "lib").mkdir()
    (home / "lib" / "libcudart_static.a").touch()
    return home


def use(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    """Lets a build see these packages only, and no compiler of the machine."""
    monkeypatch.setattr(environment, "site_packages", lambda: list(directories))
    which = environment.shutil.which
    monkeypatch.setattr(environment.shutil, "which", lambda name, **kw: None if name == "nvcc" else which(name, **kw))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not path.is_relative_to("/usr/local/cuda") and exists(path))
