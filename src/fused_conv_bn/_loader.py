"""Loads the compiled libraries that belong to the running torch.

``_cpu.so`` defines the ops and has their CPU kernels; ``_cu<major>.so`` adds the CUDA kernels and is chosen by the CUDA
version that torch was built for. None of them is a Python module: they register their kernels when they are loaded.

The environment variable FUSED_CONV_BN_LIBRARY names another one to use: ``cu12`` or ``cu13``, or ``cpu`` to leave CUDA
out. Each brings its own CUDA runtime, so any of them works with any torch that is built for CUDA and a driver that is
new enough for both.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
MIN_TORCH = (2, 10)
FORCE = "FUSED_CONV_BN_LIBRARY"
NAMED = "FUSED_CONV_BN_CONV", "FUSED_CONV_BN_STATISTICS"
# By file: the name alone may find nothing, or another build. Without --no-deps pip would exchange torch as well.
REINSTALL = "reinstall it (pip install --force-reinstall --no-deps WHEEL, the wheel's file)"

loaded: dict[str, Path] = {}
"""The libraries in use, by name (``"cpu"``, ``"cu13"``)."""


def check_torch(version: str) -> None:
    """Raises ImportError unless ``version`` (``torch.__version__``) has the ABI that the libraries are built for."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MIN_TORCH:
        raise ImportError(
            f"fused_conv_bn needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer, and torch {version} is installed: "
            f"pip install --upgrade torch"
        )


def shipped(directory: Path = PACKAGE) -> dict[str, Path]:
    """The libraries that are installed, by name."""
    return {path.stem[1:]: path for path in sorted(directory.glob("_c*.so"))}


def library_names(cuda: str | None, directory: Path = PACKAGE, forced: str | None = None) -> list[str]:
    """The names of the libraries for a torch built for CUDA version ``cuda`` (``torch.version.cuda``; None: no CUDA).

    ``forced`` is the value of FUSED_CONV_BN_LIBRARY: the name to use in place of the one that ``cuda`` asks for.
    Raises ImportError if a library is not installed, or is forced and cannot work.
    """
    have = shipped(directory)
    if "cpu" not in have:
        raise ImportError(
            f"fused_conv_bn: its library _cpu.so is missing from {directory}: "
            f"{REINSTALL}, or, in a source tree, run make build"
        )
    if forced:
        if forced not in have:
            raise ImportError(
                f"fused_conv_bn: {FORCE}={forced}, expected one of the libraries in {directory}: {', '.join(have)}"
            )
        if forced != "cpu" and cuda is None:
            raise ImportError(
                f"fused_conv_bn: {FORCE}={forced}, and the installed torch is built without CUDA: "
                f"unset {FORCE}, or install a torch that is built for CUDA"
            )
        return list(dict.fromkeys(["cpu", forced]))
    if cuda is None:
        return ["cpu"]
    name = f"cu{cuda.split('.')[0]}"
    if name not in have:
        built = ", ".join(f"CUDA {n[2:]}" for n in have if n != "cpu") or "no CUDA"
        raise ImportError(
            f"fused_conv_bn: torch is built for CUDA {cuda}, and this installation of fused_conv_bn has libraries for "
            f"{built}: install a torch for one of these, or a fused_conv_bn that has _{name}.so, or set {FORCE} to "
            f"one of {', '.join(have)} to use that"
        )
    return ["cpu", name]


def check_complete(path: Path) -> None:
    """Raises OSError for a file that ends before its ELF section headers do: opening it would kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        raise OSError("not an ELF file")
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    if path.stat().st_size < offset + size * count:
        raise OSError(f"{path.stat().st_size} bytes, expected {offset + size * count}")


def load_library(name: str, path: Path) -> None:
    """Opens one library. Raises ImportError if the file is not what it should be."""
    try:
        check_complete(path)
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = error.__cause__ or error  # PyTorch puts its own error around the linker's
        raise ImportError(
            f"fused_conv_bn: {path} could not be loaded ({reason}): the file is damaged or for another platform, "
            f"{REINSTALL}"
        ) from None
    loaded[name] = path


def load() -> None:
    """Loads what the running torch needs. Does not initialise CUDA."""
    check_torch(torch.__version__)
    have = shipped()
    for name in library_names(torch.version.cuda, forced=os.environ.get(FORCE)):
        load_library(name, have[name])
    check_environment()


def check_environment() -> None:
    """Raises ImportError for a name in FUSED_CONV_BN_CONV or FUSED_CONV_BN_STATISTICS that nothing has."""
    for name in NAMED:
        value = os.environ.get(name, "")
        if not (value.isascii() and value.isprintable()):  # which the library would quote as it is
            raise ImportError(f"fused_conv_bn: {name} is {value!r}, expected a name of ASCII characters")
    try:
        torch.ops.fused_conv_bn._check_environment()
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        raise ImportError(message) from None


def cuda_archs() -> str | None:
    """The compute capabilities that the CUDA library has code for (``"8.0 9.0 12.0+PTX"``); None without one."""
    if all(name == "cpu" for name in loaded):
        return None
    return torch.ops.fused_conv_bn.cuda_archs()


def covers(capability: tuple[int, int], archs: str) -> bool:
    """Whether code for ``archs`` runs on a GPU of the given compute capability.

    Machine code runs on the same major and an equal or higher minor version, PTX on everything newer.
    """
    for arch in archs.split():
        number, _, ptx = arch.partition("+")
        major, minor = (int(part.rstrip("af")) for part in number.split("."))
        if major == capability[0] and minor <= capability[1]:
            return True
        if ptx and (major, minor) <= capability:
            return True
    return False
