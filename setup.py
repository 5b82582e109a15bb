"""Builds the libraries of fused_conv_bn: _cpu.so always, and _cu12.so or _cu13.so where a CUDA compiler is found.

The libraries use only the LibTorch stable ABI of torch 2.10 and contain no Python symbol, so that one wheel serves
every later torch and every Python: they are plain shared libraries that ``torch.ops.load_library`` opens.

Environment:
    FUSED_CONV_BN_CUDA     "0": build without CUDA. "12", "13", "12 13": build for these.
                           "1": build for torch's CUDA, or, if it has none, for the compiler's.
                           Default: build for torch's CUDA, if it has one.
                           What is asked for and has no compiler is an error.
    CUDA_HOME              a CUDA toolkit to use instead of the one from PyPI, the one in PATH, and /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST   compute capabilities to compile for, as for any PyTorch extension ("9.0" or "8.0;9.0+PTX").
                           Kernels that not all of them can run are compiled for those that can.
                           Default: those in wheels/matrix.json.
    CXX                    the C++ compiler. Default: c++.
    MAX_JOBS               how many compilers run at a time. Default: ninja's.
    FUSED_CONV_BN_GLIBC    "2.28": as the wheels are: linked for this glibc, with PyPI's ziglang, and reproducible.
    FUSED_CONV_BN_LIBRARIES    paths of libraries, with colons between: take these and compile none (wheels/build.py).

This file is also the build backend that pyproject.toml names: setuptools', except that it asks for torch and the CUDA
compiler only where they are needed.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MATRIX = json.loads((ROOT / "wheels" / "matrix.json").read_text())
MIN_TORCH = (2, 10)
CUDA_REQUIREMENT = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-DNDEBUG",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-maybe-uninitialized",  # GCC 12 reports std::optional's payload
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def fail(message: str) -> NoReturn:
    raise SystemExit(f"fused_conv_bn: {message}")


# ---- what is installed -----------------------------------------------------------------------------------------------


def site_packages() -> list[Path]:
    """Where packages are, the environment that pip builds in first and the one that it installs into last.

    pip hides the second from a build. The torch in it is the one that the result has to work with, and its headers
    serve as well as those of another one, which would be a download of gigabytes.
    """
    return [Path(path) for path in dict.fromkeys([*sys.path, *map(sysconfig.get_path, ("purelib", "platlib"))])]


class Torch:
    """A torch to build against. It is not imported: only its headers and libtorch.so are used."""

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


def find_torch() -> Torch | str:
    """The torch to build against, or a sentence that says why there is none."""
    for path in site_packages():
        if (path / "torch" / "version.py").exists():
            torch = Torch(path / "torch")
            return torch.problem() or torch
    wanted = "{}.{}".format(*MIN_TORCH)
    return f"building needs torch {wanted} or newer, and {sys.executable} has none: pip install torch"


class Cuda:
    """A CUDA toolkit: the compiler, its version, and the runtime that is linked statically."""

    def __init__(self, home: Path):
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
        return None if self.cudart else f"{self.nvcc.parents[1]} has no libcudart_static.a"


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


# ---- the build backend -----------------------------------------------------------------------------------------------


def get_requires_for_build_wheel(config_settings=None):
    """What pip installs for a build in isolation, besides pyproject.toml's list: what the environment lacks."""
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    torch = find_torch()
    major: int | None = 13  # PyPI's torch is a build for CUDA 13
    if isinstance(torch, str):
        requires.append("torch>={}.{}".format(*MIN_TORCH))
    else:
        major = torch.cuda_major
    setting = os.environ.get("FUSED_CONV_BN_CUDA", "").strip()
    wants_13 = {"": major == 13, "0": False, "1": major in (13, None)}.get(setting, "13" in setting)
    if wants_13 and 13 not in find_cuda():
        requires.append(CUDA_REQUIREMENT)
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel


# ---- the libraries ---------------------------------------------------------------------------------------------------


def parse_arch(arch: str) -> tuple[int, int, str, bool]:
    """Major, minor, the letter behind them, and whether there is to be PTX."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
    if match is None:
        fail(f"TORCH_CUDA_ARCH_LIST has {arch!r}, expected compute capabilities such as 9.0 or 12.0+PTX")
    return int(match[1]), int(match[2]), match[3], match[4] is not None


def matrix_archs(library: str, source: str = "", matrix: dict = MATRIX) -> list[str]:
    """What the matrix says that a source file is compiled for; without a file, what the library as a whole is for."""
    for kernels in matrix["kernels"]:
        if any(fnmatch.fnmatch(Path(source).stem, pattern) for pattern in kernels["sources"]):
            return kernels[library]
    return matrix["libraries"][library]["archs"]


def archs(library: str, source: str = "") -> list[str]:
    """The same with $TORCH_CUDA_ARCH_LIST, of which a file with an entry of its own takes what its kernels can run on.

    That is what is not older than the oldest of the entry; if that has a letter, it alone (9.0a where the list has
    9.0). Where nothing is left, the file is compiled for the whole list, so that the library is complete; a kernel that
    cannot be has an empty body there. Not as PTX, which newer GPUs would run, and those do choose these kernels.
    """
    own = matrix_archs(library, source)
    setting = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not setting:
        return own
    listed = re.split(r"[ ;,]+", setting)
    if own == matrix_archs(library):
        return listed
    oldest = parse_arch(own[0])
    if oldest[2]:
        usable = own if any(parse_arch(arch)[:2] == oldest[:2] for arch in listed) else []
    else:
        usable = [arch for arch in listed if parse_arch(arch)[:2] >= oldest[:2]]
    return usable or [arch.removesuffix("+PTX") for arch in listed]


def gencode(arch: str) -> list[str]:
    major, minor, letter, ptx = parse_arch(arch)
    number = f"{major}{minor}{letter}"
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if ptx:
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def source_flags(library: str, source: str) -> list[str]:
    """nvcc's flags for one file: its architectures, and its name, which cuobjdump then prints of what it became."""
    listed = archs(library, source)
    old_ptx = any(major < 9 and ptx for major, _, _, ptx in map(parse_arch, listed))  # csrc/kernels/ptx/launch.cuh
    return [
        f"-Xfatbin=--ident={Path(source).name}",
        *(["-DFCB_HAS_9_0A"] if "9.0a" in listed else []),
        *(["-DFCB_OLD_PTX"] if old_ptx else []),
        *[flag for arch in listed for flag in gencode(arch)],
    ]


def nvcc_flags(name: str, cuda: Cuda) -> list[str]:
    return [
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        "--expt-extended-lambda",
        "--expt-relaxed-constexpr",
        # CUDA 12.8 knows the better mode too, but the drivers of CUDA 12.0 to 12.3 cannot read what it makes.
        *(["--compress-mode=size"] if cuda.version >= (13, 0) else ["-Xfatbin=-compress-all"]),
        "-Werror=all-warnings",
        "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror,-Wno-maybe-uninitialized,-g0,-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DUSE_CUDA",
        f'-DFCB_CUDA_ARCHS="{" ".join(archs(name))}"',
    ]


def extension(name: str) -> Extension:
    """A library's name and sources; what else it takes is looked for when it is built."""
    kinds = ["ops/*_cpu.cpp"] if name == "cpu" else ["ops/*_cuda.cu", "kernels/**/instantiate_*.cu"]
    found = (path for kind in kinds for path in (ROOT / "csrc").glob(kind))
    ops = sorted(str(path.relative_to(ROOT)) for path in found)
    schemas = ["csrc/bindings.cpp"] if name == "cpu" else []
    return Extension(f"fused_conv_bn._{name}", ["csrc/portable.cpp", *schemas, *ops])


def library_of(ext: Extension) -> str:
    """ "cpu" for fused_conv_bn._cpu."""
    return ext.name.rpartition("._")[2]


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
                f"apt install g++, or let CXX name it; the wheel (pip install fused_conv_bn) needs none"
            )
        ninja = shutil.which("ninja", path=os.pathsep.join([os.environ.get("PATH", ""), f"{sys.prefix}/bin"]))
        if ninja is None:
            fail("building needs ninja, and it is not in PATH: pip install ninja")
        self.ninja = ninja
        self.cuda = choose_cuda(torch.cuda_major)
        self.glibc = os.environ.get("FUSED_CONV_BN_GLIBC", "").strip()
        if self.glibc and importlib.util.find_spec("ziglang") is None:
            fail(f"linking for glibc {self.glibc} needs ziglang, and {sys.executable} has none: pip install ziglang")

    def from_compiler(self, name: str) -> str:
        """The path of a library that comes with the C++ compiler."""
        command = [*self.cxx, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return os.path.realpath(found)


class BuildExt(build_ext):
    """Compiles each library with ninja, which knows what is out of date: it compares command lines and headers too."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', os.sep)}.so"

    def run(self):
        files = os.environ.get("FUSED_CONV_BN_LIBRARIES")
        self.ready = {Path(file).name: file for file in files.split(os.pathsep)} if files else {}
        if self.ready:
            names = [Path(name).stem[1:] for name in self.ready]
        else:
            self.tools = Tools()
            names = ["cpu", *(f"cu{major}" for major in self.tools.cuda)]
        self.extensions = [ext for ext in self.extensions if library_of(ext) in names]
        # All that is in this folder gets into the wheel, also what an earlier build for something else left there.
        for old in Path(self.build_lib, "fused_conv_bn").glob("_*.so"):
            old.unlink()
        super().run()

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name))
        built = self.ready.get(output.name)
        if built is None:
            directory = Path(self.build_temp) / library_of(ext)
            directory.mkdir(parents=True, exist_ok=True)
            built = directory / output.name
            write_ninja(directory, library_of(ext), ext.sources, built, self.tools)
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            if subprocess.run([self.tools.ninja, "-f", directory / "build.ninja", *jobs], cwd=ROOT).returncode != 0:
                fail(f"{output.name} could not be compiled; the compiler's messages are above")
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not written in place: a process may have the old one open.
        new = output.with_suffix(".new")
        shutil.copyfile(built, new)
        new.chmod(0o755)
        new.replace(output)


def write_ninja(directory: Path, library: str, sources: list[str], output: Path, tools: Tools) -> None:
    """Writes directory/build.ninja, which runs in ROOT and makes ``output``."""
    torch = tools.torch
    # Paths of this machine, which would get into messages of torch's headers, become the same everywhere.
    maps = [f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={torch.include}=torch"]
    # As system headers: our warnings are errors, theirs are not.
    include = ["-Icsrc", "-isystem", str(torch.include)]
    cxx = str(shutil.which(tools.cxx[-1]))
    compilers = {"cxx": [*tools.cxx, *CXX_FLAGS, *maps, *include]}
    programs: dict[str, list[str | Path]] = {"cxx": [cxx]}
    libs: list[str] = []
    if library != "cpu":
        cuda = tools.cuda[int(library[2:])]
        reproducible = ROOT / "wheels" / "nvcc.py"
        flags = ["-ccbin", cxx, *nvcc_flags(library, cuda), f"-Xcompiler={','.join(maps)}", *include]
        compilers["nvcc"] = [*([sys.executable, str(reproducible)] if tools.glibc else []), str(cuda.nvcc), *flags]
        programs["nvcc"] = [cxx, cuda.nvcc, reproducible]
        libs = [str(cuda.cudart), "-ldl", "-lrt", "-lpthread"]

    linker = [*tools.cxx, "-shared"]
    if tools.glibc:
        # zig knows the symbols of each glibc. Its own C++ library, unwinder and arithmetic stay out: -nostdlib.
        linker = [sys.executable, "-m", "ziglang", "cc", "-target", f"x86_64-linux-gnu.{tools.glibc}"]
        linker += ["-shared", "-nostdlib", "-Wl,--strip-all"]
        libs += [tools.from_compiler(name) for name in ("libstdc++.so.6", "libgcc_s.so.1", "libgcc.a")]
        libs += ["-lm", "-lc"]
    link_flags = [
        f"-L{torch.lib}",
        # libtorch.so alone: it brings what each torch splits its symbols over.
        "-Wl,--no-as-needed",
        "-ltorch",
        "-Wl,--as-needed",
        "-Wl,--version-script=csrc/exports.map",
        "-Wl,--no-undefined-version",
        "-Wl,--build-id=sha1",
        *libs,
    ]

    def quote(arguments: list[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    def path(text: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", os.path.relpath(text, ROOT))

    lines = [f"builddir = {path(directory)}"]
    for rule, command in compilers.items():
        lines += [
            f"rule {rule}",
            f"  command = {quote(command)} $flags -MD -MF $out.d -c $in -o $out",
            f"  description = {rule} $in",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines += [
        "rule link",
        f"  command = {quote(linker)} $in {quote(link_flags)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        objects.append(path(directory / f"{Path(source).stem}.o"))
        # With the compilers among the inputs, a newer one at the same path compiles again.
        lines.append(f"build {objects[-1]}: {rule} {path(ROOT / source)} | {' '.join(map(path, programs[rule]))}")
        if rule == "nvcc":
            lines.append(f"  flags = {quote(source_flags(library, source))}")
    lines.append(f"build {path(output)}: link {' '.join(objects)} | csrc/exports.map")
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")


# ---- the wheel -------------------------------------------------------------------------------------------------------


class BdistWheel(bdist_wheel):
    """No Python API is used, so the wheel is for every Python on the platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])

    def write_wheelfile(self, *args, **kwargs):
        super().write_wheelfile(*args, **kwargs)
        # The last thing before the archive is made: what the user's umask gave the files is not part of a wheel.
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


if __name__ == "__main__":
    # BuildExt chooses from the list.
    setup(
        ext_modules=[extension(name) for name in MATRIX["libraries"]],
        cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    )
