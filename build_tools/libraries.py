"""The libraries: their names, their sources, and what compute capabilities each source is compiled for.

A source has the path from csrc on for a name: ``ops/scale_shift_cuda.cu``. Without its suffix it is what the patterns
of wheels/matrix.json are for, so that they can name folders (``kernels/conv/*``).
"""

from __future__ import annotations

import fnmatch
import os
import re

from build_tools import MATRIX, ROOT, fail

CSRC = ROOT / "csrc"
CUDA_SOURCES = ("*_cuda.cu", "instantiate_*.cu")


def found(*patterns: str) -> list[str]:
    return sorted(path.relative_to(CSRC).as_posix() for pattern in patterns for path in CSRC.rglob(pattern))


def cuda_sources() -> list[str]:
    """The files of CUDA code that a CUDA library is made of."""
    return found(*CUDA_SOURCES)


def sources(library: str) -> list[str]:
    own = ["bindings.cpp", *found("*_cpu.cpp")] if library == "cpu" else cuda_sources()
    return ["portable.cpp", *own]


def parse_arch(arch: str) -> tuple[int, int, str, bool]:
    """Major, minor, the letter behind them, and whether there is to be PTX."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
    if match is None:
        fail(f"TORCH_CUDA_ARCH_LIST has {arch!r}, expected compute capabilities such as 9.0 or 12.0+PTX")
    return int(match[1]), int(match[2]), match[3], match[4] is not None


def matrix_archs(library: str, source: str = "", matrix: dict = MATRIX) -> list[str]:
    """What the matrix says that a source file is compiled for; without a file, what the library as a whole is for."""
    for kernels in matrix["kernels"]:
        if any(fnmatch.fnmatch(source.removesuffix(".cu"), pattern) for pattern in kernels["sources"]):
            return kernels[library]
    return matrix["libraries"][library]["archs"]


def archs(library: str, source: str = "") -> list[str]:
    """The same with $TORCH_CUDA_ARCH_LIST, of which a file with an entry of its own takes what its kernels can run on.

    That is what is not older than the oldest of the entry, with the letter that the entry has (9.0a where the list has
    9.0); if the oldest has one, it alone. Where nothing is left, the file is compiled for the whole list, so that the
    library is complete; a kernel that cannot be has an empty body there. Not as PTX, which newer GPUs would run, and
    those do choose these kernels.
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
        lettered = {parse_arch(arch)[:2]: arch for arch in own if parse_arch(arch)[2]}
        usable = [lettered.get(parse_arch(arch)[:2], arch) for arch in listed if parse_arch(arch)[:2] >= oldest[:2]]
    return usable or [arch.removesuffix("+PTX") for arch in listed]


def gencode(arch: str) -> list[str]:
    major, minor, letter, ptx = parse_arch(arch)
    number = f"{major}{minor}{letter}"
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if ptx:
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
