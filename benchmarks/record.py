"""The record of a run: a file of JSON, a line each.

The first line says what was measured, where and how: commit, date, device, versions, flags, settings, the device's
rates, the notes, and of the validation how many checks there were and which came nearest to its limit. Each line after
it is a row: the part of the benchmark that it is of, and its numbers.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fused_conv_bn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
# What has rows, in their order in a record.
PARTS = (
    "host",
    "conv",
    "layers",
    "train",
    "activations",
    "cat_gate",
    "pools",
    "grad_mode",
    "steps",
    "models",
    "kernelbench",
    "short_planes",
    "bn_scale",
    "bn_scale_train",
)

cudnn: Any = torch.backends.cudnn  # which has types only in part

Report = dict[str, Any]  # the first line's, and by part a list of rows
Row = dict[str, Any]


def lines(report: Report) -> list[str]:
    header = {name: value for name, value in report.items() if name not in PARTS}
    rows = [{"part": part, **row} for part in PARTS for row in report.get(part, [])]
    return [json.dumps(line) for line in (header, *rows)]


def write(report: Report, path: Path) -> None:
    path.write_text("".join(f"{line}\n" for line in lines(report)))


def read(path: Path) -> Report:
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    report: Report = header
    for row in rows:
        report.setdefault(row.pop("part"), []).append(row)
    return report


def summary(checks: Sequence[Row]) -> Row:
    """How many there were, and the one that came nearest to its limit."""
    nearest = max(checks, key=lambda check: float(check["ours"] / check["limit"]), default=None)
    return {"count": len(checks), "nearest": nearest}


# ---- the machine -----------------------------------------------------------------------------------------------------


def describe(device: str, commit: str | None) -> Report:
    """The code and the machine that the numbers belong to."""
    dirty = None
    if commit is None:
        commit, dirty = git_state()
    hardware: dict[str, Any] = {"kind": device, "name": cpu_name(), "threads": torch.get_num_threads()}
    versions = {
        "fused_conv_bn": fused_conv_bn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        hardware.update(name=gpu.name, multiprocessors=gpu.multi_processor_count, cpu=cpu_name())
        hardware["l2_bytes"] = getattr(gpu, "L2_cache_size", None)
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
        versions.update(cuda=str(torch.version.cuda), cudnn=str(cudnn.version()), driver=driver or "unknown")
    return {
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": hardware,
        "versions": versions,
        "flags": {
            "cudnn.allow_tf32": cudnn.allow_tf32,
            "cudnn.benchmark": cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
    }


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def git_state() -> tuple[str | None, bool | None]:
    """HEAD, and whether what is measured differs from it. (None, None) where the package is not that of this tree."""
    if Path(fused_conv_bn.__file__).parent != ROOT / "src" / "fused_conv_bn" or not (ROOT / ".git").exists():
        return None, None
    git = ["git", "-C", str(ROOT)]
    status = output_of([*git, "status", "--porcelain", "--", "src", "csrc", "setup.py", "build_tools"])
    return output_of([*git, "rev-parse", "HEAD"]), None if status is None else bool(status)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
