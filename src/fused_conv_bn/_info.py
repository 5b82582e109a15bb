"""``python -m fused_conv_bn info``: what is installed, loaded and usable."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from . import __version__, _loader
from ._table import table


def library_rows() -> list[tuple[str, str]]:
    if os.environ.get(_loader.FORCE):
        why = f"not loaded: {_loader.FORCE}={os.environ[_loader.FORCE]}"
    elif torch.version.cuda is None:
        why = "not loaded: torch is built without CUDA"
    else:
        why = "not loaded: it is for another CUDA version than torch's"
    rows = [
        (f"library {name}", f"{path} ({'loaded' if name in _loader.loaded else why})")
        for name, path in _loader.shipped().items()
    ]
    archs = _loader.cuda_archs()
    if archs is not None:
        rows.append(("CUDA code for", archs))
    return rows


def gpu_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none that torch can use")]
    archs = _loader.cuda_archs() or ""
    rows = []
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        state = "covered" if _loader.covers(capability, archs) else "NOT covered"
        name = torch.cuda.get_device_name(i)
        rows.append((f"GPU {i}", f"{name}, compute capability {capability[0]}.{capability[1]} ({state} by this build)"))
    return rows


def info(args: argparse.Namespace) -> int:
    rows = [
        ("fused_conv_bn", f"{__version__} ({_loader.PACKAGE})"),
        ("Python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("torch", torch.__version__),
        ("torch's CUDA", torch.version.cuda or "none"),
        *library_rows(),
        *gpu_rows(),
        ("CPU threads", str(torch.get_num_threads())),
    ]
    print(table(rows))
    return 0
