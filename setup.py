"""Builds the libraries of fused_conv_bn: _cpu always, _cu13 where a CUDA 13 compiler is found.

The libraries use only the LibTorch stable ABI of torch 2.10 and contain no Python symbol, so that one wheel serves
every later torch and every Python: they are plain shared libraries that ``torch.ops.load_library`` opens.

Environment:
    TORCH_CUDA_ARCH_LIST   compute capabilities to compile for, as for any PyTorch extension ("9.0" or "8.0;9.0+PTX").
                           Default: 7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX.
    FUSED_CONV_BN_CUDA     "0": build without CUDA; "1": fail if there is no CUDA compiler.
                           Default: build _cu13 if there is one.
    CUDA_HOME              a CUDA 13 toolkit to use instead of the one from PyPI.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
CUDA_MAJOR = 13

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
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


def find_cuda_home() -> Path | None:
    """The CUDA 13 toolkit: $CUDA_HOME, else the one that PyPI's cuda-toolkit put next to torch's own CUDA packages."""
    candidates = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        candidates.append(Path(location) / f"cu{CUDA_MAJOR}")
    for candidate in candidates:
        nvcc = candidate / "bin" / "nvcc"
        if nvcc.exists():
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            if re.search(rf"release {CUDA_MAJOR}\.", text):
                return candidate
    return None


def archs() -> list[str]:
    return re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).strip())


def gencode(arch: str) -> list[str]:
    match = re.fullmatch(r"(\d+)\.(\d+a?)(\+PTX)?", arch)
    if match is None:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {arch!r}, expected compute capabilities such as 9.0 or 12.0+PTX")
    number = match[1] + match[2]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if match[3]:
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def library(name: str, sources: list[str], nvcc: list[str], link: list[str], cuda_home: Path | None):
    """One library. Only libtorch.so is linked by name: it brings what each torch splits its symbols over."""
    # As system headers: our warnings are errors, theirs are not.
    torch_include = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    lib_dir = str(Path(torch.__file__).parent / "lib")
    extension_class = cpp_extension.CUDAExtension if cuda_home else cpp_extension.CppExtension
    extension = extension_class(
        name=f"fused_conv_bn.{name}",
        sources=sources,
        extra_compile_args={"cxx": CXX_FLAGS + torch_include, "nvcc": nvcc + torch_include},
        extra_link_args=[
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            f"-Wl,--version-script={ROOT / 'csrc' / 'exports.map'}",
            "-Wl,--no-undefined-version",
            *link,
        ],
        py_limited_api=True,
    )
    extension.libraries = []
    extension.library_dirs = [lib_dir]
    extension.runtime_library_dirs = []
    return extension


def extensions():
    ops = ROOT / "csrc" / "ops"
    cpu_sources = ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in ops.glob("*_cpu.cpp"))]
    result = [library("_cpu", cpu_sources, [], [], None)]
    want_cuda = os.environ.get("FUSED_CONV_BN_CUDA", "")
    cuda_home = None if want_cuda == "0" else find_cuda_home()
    if cuda_home is None:
        if want_cuda == "1":
            raise SystemExit(
                "fused_conv_bn: no CUDA 13 compiler was found; install one with "
                "pip install 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*', or point CUDA_HOME to a toolkit"
            )
        return result
    cpp_extension.CUDA_HOME = str(cuda_home)  # with a CPU build of torch, torch itself ignores $CUDA_HOME
    names = " ".join(archs())
    nvcc = [
        "-std=c++20",
        "-O3",
        "--expt-extended-lambda",
        "--compress-mode=size",
        "-Werror=all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror,-Wno-maybe-uninitialized,-g0,-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DUSE_CUDA",
        f'-DFCB_CUDA_ARCHS=\\"{names}\\"',
        *[flag for arch in archs() for flag in gencode(arch)],
    ]
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ops.glob("*_cuda.cu"))
    link = [f"-L{cuda_home / 'lib'}", f"-L{cuda_home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    result.append(library(f"_cu{CUDA_MAJOR}", cuda_sources, nvcc, link, cuda_home))
    return result


class BuildExtension(cpp_extension.BuildExtension):
    """Names the libraries _cpu.so and _cu13.so, and leaves the choice of CUDA to find_cuda_home()."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, use_ninja=True, no_python_abi_suffix=True, **kwargs)

    def finalize_options(self):
        super().finalize_options()
        # Else setuptools keeps a library that is newer than its sources, also one for other compute capabilities. What
        # has to be compiled again, ninja decides: it compares command lines too.
        self.force = True

    def build_extension(self, extension):
        # A directory for each library: two ninja files in one would drop each other's records.
        whole = self.build_temp
        self.build_temp = str(Path(whole) / extension.name)
        # torch's ninja rule for .cu files does not look at the headers they include.
        newest_header = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*h"))
        for built in Path(self.build_temp).rglob("*.o"):
            if built.stat().st_mtime < newest_header:
                built.unlink()
        super().build_extension(extension)
        self.build_temp = whole


class BdistWheel(bdist_wheel):
    """No Python API is used, so the wheel is for every Python on the platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": BdistWheel},
)
