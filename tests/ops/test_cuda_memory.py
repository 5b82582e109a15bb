"""A GPU's memory runs out in a call, at each of its allocations: PyTorch's error, nothing leaks, and the next call is right.

memory_steps.py limits what PyTorch may take, in a process of its own. What the package does about it is also tested without a
GPU (tests/fuse/test_out_of_memory.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fused_conv_bn as fcb
import memory_steps

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)


@pytest.fixture(scope="module")
def found_of() -> Callable[[], dict[str, dict[str, Any]]]:
    """What the process found of each scenario. It is started once."""
    found: dict[str, dict[str, Any]] = {}

    def of() -> dict[str, dict[str, Any]]:
        if not found:
            path = [str(Path(fcb.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
            environment.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)  # whose allocator knows no limit
            done = subprocess.run(
                [sys.executable, memory_steps.__file__], env=environment, capture_output=True, text=True, timeout=600
            )
            for line in filter(lambda line: line.startswith("{"), done.stdout.splitlines()):
                found.update(json.loads(line))
            if done.returncode:
                found.setdefault("", {"problem": f"it ended with {done.returncode}: {done.stderr[-2000:]}"})
        return found

    return of


@pytest.mark.parametrize("name", memory_steps.SCENARIOS)
def test_a_call(name: str, device: str, found_of: Callable[[], dict[str, dict[str, Any]]]) -> None:
    found = found_of()
    counts = found.get(name, found.get("", {"problem": "it did not come so far"}))
    assert "problem" not in counts, counts["problem"]
    assert counts["failed"] > 0  # a limit is one
    assert counts["out of memory"] > 0
