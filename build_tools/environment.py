"""What is installed: torch, the CUDA toolkits, the C++ compiler and ninja. Nothing here imports torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_tools import MATRIX, fail

MIN_TORCH = (2, 10)
MIN_SETUPTOOLS = 77  # what pyproject.toml asks for, where pip installs it
CUDA_REQUIREMENT = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"


def site_packages() -> list[Path]:
    """Where packages are, the environment that pip builds in first and the one that it installs into last.

    pip hides the second from a build. The torch in it is the one that the result has to work with, and its headers
    serve as well as those of another one, which would be a download of gigabytes.
    """
    return [Path(path) for path in dict.fromkeys([*sys.path, *map(sysconfig.get_path, ("purelib", "platlib"))])]


class Torch:
    """A torch to build against. Its headers and libtorch.so are used, and, to build, torch.utils.cpp_extension."""

    def __init__(self, directory: Path):
        directory = directory.resolve()  # as compilers name it in messages, whatever links lead there
        self.include = directory / "include"
        self.lib = directory / "lib"
        text = (directory / "version.py").read_text()
        version = re.search(r"^__version__ *= *'([^']+)'", text, re.MULTILINE)
        cuda = re.search(r"^cuda *(?::.*)?= *'(\d+)\.", text, re.MULTILINE)
        self.version = version[1] if version else "unknown"
        self.cuda_major = int(cuda[1]) if cuda else None

    def problem(self) -> str | None:
        wanted = "{}.{}".format(*MIN_TORCH)
        number = re.match(r"(\d+)\.(\d+)", self.version)
        if number is None or (int(number[1]), int(number[2])) < MIN_TORCH:
            return f"torch {self.version} is installed, and building needs {wanted} or newer: pip install -U torch"
        if not (self.include / "torch" / "csrc" / "stable" / "library.h").exists():
            return f"torch {self.version} has no C++ headers in {self.include}: reinstall it (pip install -U torch)"
        return None


def import_torch(torch: Torch) -> None:
    """Imports it, wherever it is: what pip hides from a build comes last, so that it replaces nothing."""
    sys.path += [path for path in map(str, site_packages()) if path not in sys.path]
    try:
        importlib.import_module("torch.utils.cpp_extension")
    except Exception as error:  # a library that is missing, another Python's torch, a dependency of it
        fail(f"torch {torch.version} is installed, and importing it fails ({error}): pip install -U torch")


def check_setuptools() -> None:
    """Without isolation pip takes the setuptools that is there."""
    import setuptools  # which not everybody has who uses this module

    if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
        fail(
            f"building needs setuptools {MIN_SETUPTOOLS} or newer, and {setuptools.__version__} is installed: "
            f"pip install -U setuptools"
        )


def installed_torch() -> Torch | None:
    """The first that there is, new enough or not."""
    found = (path / "torch" for path in site_packages())
    return next((Torch(path) for path in found if (path / "version.py").exists()), None)


def find_torch() -> Torch | str:
    """The torch to build against, or a sentence that says why there is none."""
    if torch := installed_torch():
        return torch.problem() or torch
    wanted = "{}.{}".format(*MIN_TORCH)
    return f"building needs torch {wanted} or newer, and {sys.executable} has none: pip install torch"


class Cuda:
    """A CUDA toolkit: the compiler, its version, and the runtime that is linked statically."""

    def __init__(self, home: Path):
        self.home = home
        self.nvcc = home / "bin" / "nvcc"
        output = ""
        if os.access(self.nvcc, os.X_OK):
            output = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\d+)\.(\d+)", output)
        self.version = (int(version[1]), int(version[2])) if version else (0, 0)
        folders = ("lib", "lib64", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu")
        archives = (home / folder / "libcudart_static.a" for folder in folders)
        self.cudart = next((archive for archive in archives if archive.exists()), None)

    def problem(self) -> str | None:
        if self.version == (0, 0):
            return f"{self.nvcc} is missing or does not run"
        return None if self.cudart else f"{self.home} has no libcudart_static.a"


def find_cuda() -> dict[int, Cuda]:
    """The CUDA toolkits, by major version: of each the one that takes precedence."""
    found: dict[int, Cuda] = {}
    if home := os.environ.get("CUDA_HOME"):
        cuda = Cuda(Path(home))
        if problem := cuda.problem():
            fail(f"CUDA_HOME is {home}, which is no CUDA toolkit: {problem}")
        found[cuda.version[0]] = cuda
    homes = [home for path in site_packages() for home in sorted((path / "nvidia").glob("cu[0-9]*"))]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parents[1])
    for folder in [*homes, Path("/usr/local/cuda")]:
        cuda = Cuda(folder)
        if cuda.problem() is None:
            found.setdefault(cuda.version[0], cuda)
    return found


def choose_cuda(torch_major: int | None) -> dict[int, Cuda]:
    """The CUDA versions to build for, by $FUSED_CONV_BN_CUDA, and their toolkits."""
    setting = os.environ.get("FUSED_CONV_BN_CUDA", "").strip()
    if setting == "0" or (not setting and torch_major is None):
        return {}
    found = find_cuda()
    if setting in ("", "1"):
        # Another CUDA's library is of no use to this torch.
        wanted = [torch_major or next(iter(found), 13)]
    elif re.fullmatch(r"\d{2}([ ,;]+\d{2})*", setting):
        wanted = [int(major) for major in re.split(r"[ ,;]+", setting)]
    else:
        fail(f"FUSED_CONV_BN_CUDA is {setting!r}, expected 0, 1, or CUDA versions such as 13 or '12 13'")
    for major in wanted:
        if f"cu{major}" not in MATRIX["libraries"]:
            fail(f"CUDA {major} is not supported, only {', '.join(MATRIX['libraries'])} are: choose another torch")
        if major not in found:
            install = f"install one with pip install '{CUDA_REQUIREMENT}', or " if major == 13 else ""
            fail(
                f"no CUDA {major} compiler was found: {install}let CUDA_HOME name a CUDA {major} toolkit, "
                f"or build without CUDA with FUSED_CONV_BN_CUDA=0"
            )
    return {major: found[major] for major in wanted}


class Tools:
    """What compiling takes, each looked for once; ends with a sentence that names what is missing."""

    def __init__(self) -> None:
        torch = find_torch()
        if isinstance(torch, str):
            fail(torch)
        self.torch = torch
        self.cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        if shutil.which(self.cxx[-1]) is None:
            fail(
                f"building needs a C++ compiler, and {self.cxx[-1]} is not in PATH: install one, for example with "
                f"apt install g++, or let CXX name it; a wheel needs none"
            )
        self.compiler = str(shutil.which(self.cxx[-1]))
        self.path = os.pathsep.join([os.environ.get("PATH", ""), f"{sys.prefix}/bin"])
        if shutil.which("ninja", path=self.path) is None:
            fail("building needs ninja, and it is not in PATH: pip install ninja")
        self.cuda = choose_cuda(torch.cuda_major)
        self.glibc = os.environ.get("FUSED_CONV_BN_GLIBC", "").strip()
        if self.glibc and importlib.util.find_spec("ziglang") is None:
            fail(f"linking for glibc {self.glibc} needs ziglang, and {sys.executable} has none: pip install ziglang")

    def from_compiler(self, name: str) -> str:
        """The path of a library that comes with the C++ compiler."""
        command = [*self.cxx, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return os.path.realpath(found)
