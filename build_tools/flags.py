"""What the compilers and the linker are told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from build_tools import ROOT
from build_tools.environment import Cuda, Tools
from build_tools.libraries import archs, gencode, parse_arch

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # MIN_TORCH

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
    TORCH_TARGET,
]


def source_flags(library: str, source: str) -> list[str]:
    """nvcc's flags for one file: its architectures, and its name, which cuobjdump then prints of what it became."""
    listed = archs(library, source)
    # csrc/kernels/ptx/launch.cuh
    parsed = [parse_arch(arch) for arch in listed]
    old_ptx = any(major < 9 and ptx for major, _, _, ptx in parsed) and all(major != 9 for major, *_ in parsed)
    return [
        f"-Xfatbin=--ident={source}",
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
        TORCH_TARGET,
        "-DUSE_CUDA",
        f'-DFCB_CUDA_ARCHS="{" ".join(archs(name))}"',
        *[flag for arch in archs(name) for flag in gencode(arch)],  # extension.py: source_flags() replaces them
    ]


def maps(tools: Tools, directory: Path) -> list[str]:
    """Paths of this machine, which would get into messages of torch's headers, become the same everywhere."""
    return [
        f"-ffile-prefix-map={os.path.relpath(ROOT, directory)}=.",
        f"-ffile-prefix-map={tools.torch.include}=torch",
    ]


def compile_flags(library: str, tools: Tools, directory: Path) -> dict[str, list[str]]:
    """What all sources of a library have in common, as torch's extensions take it. ninja runs in ``directory``."""
    mapped = maps(tools, directory)
    # torch's as system headers: our warnings are errors, theirs are not.
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(tools.torch.include)]
    flags = {"cxx": [*CXX_FLAGS, *mapped, *include]}
    if library != "cpu":
        own = nvcc_flags(library, tools.cuda[int(library[2:])])
        flags["nvcc"] = ["-ccbin", tools.compiler, *own, f"-Xcompiler={','.join(mapped)}", *include]
    return flags


def linker(tools: Tools) -> list[str]:
    if not tools.glibc:
        return [*tools.cxx, "-shared"]
    # zig knows the symbols of each glibc. Its own C++ library, unwinder and arithmetic stay out: -nostdlib.
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"x86_64-linux-gnu.{tools.glibc}"]
    return [*zig, "-shared", "-nostdlib", "-Wl,--strip-all"]


def link_flags(library: str, tools: Tools) -> list[str]:
    libs = [] if library == "cpu" else [str(tools.cuda[int(library[2:])].cudart), "-ldl", "-lrt", "-lpthread"]
    if tools.glibc:
        libs += [tools.from_compiler(name) for name in ("libstdc++.so.6", "libgcc_s.so.1", "libgcc.a")]
        libs += ["-lm", "-lc"]
    return [
        # libtorch.so alone: it brings what each torch splits its symbols over.
        "-Wl,--no-as-needed",
        "-ltorch",
        "-Wl,--as-needed",
        f"-Wl,--version-script={ROOT / 'csrc' / 'exports.map'}",
        "-Wl,--no-undefined-version",
        "-Wl,--build-id=sha1",
        *libs,
    ]
