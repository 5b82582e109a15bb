"""Two processes that share tensors, as DTensors: every op, the module and a model, against the whole tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import dtensor_steps
from dtensor_steps import CASES, GRADIENTS

WORLD = 2
Found = list[dict[str, Any]]
OTHERS = (
    *(
        "model",
        "second derivatives",
        "two dimensions",
        "three images",
        "one image",
        "other calls of an op",
        "groups",
        "in place",
    ),
    *("functional", "compiled", "implicit"),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process found. They are started once: that takes as long as all cases."""
    folder: Path = tmp_path_factory.mktemp("dtensor")
    mp.spawn(dtensor_steps.run, (WORLD, str(folder)), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_right(found: Found, name: str) -> None:
    for of_process in found:
        case = of_process.get(name, f"not run: {list(of_process)[-1]} failed")
        assert not isinstance(case, str), case
        assert case["got"]
        for got, want in zip(case["got"], case["want"], strict=True):
            torch.testing.assert_close(got, want)
        for of in ("placements", "strides"):
            if f"expected {of}" in case:
                assert case[of] == case[f"expected {of}"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["function", "op"])
def test_each_process_computes_its_part(form: str, name: str, found: Found) -> None:
    """In evaluation and of training ops: values, running statistics, and how results are distributed and laid out."""
    assert_right(found, f"{form}, {name}")


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str, found: Found) -> None:
    assert_right(found, f"gradients, {name}")


@pytest.mark.parametrize("grad", ["grad", "no grad"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("placements", ["S(0) R", "R S(0)", "R R"], ids=["images", "channels", "whole"])
def test_module(placements: str, mode: str, grad: str, found: Found) -> None:
    name = f"module, {placements} {mode} {grad}"
    assert_right(found, name)
    expected = {"S(0) R": 0 if mode == "eval" else None, "R S(0)": 1, "R R": None}[placements]
    for of_process in found:
        (placement,) = of_process[name]["placements"][0]
        assert getattr(placement, "dim", None) == expected
        assert "each process computes its part" in of_process[name]["why"]


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str, found: Found) -> None:
    assert_right(found, name)


def test_messages(found: Found) -> None:
    for of_process in found:
        said = of_process["messages"]
        assert said["plain"].startswith("RuntimeError: bn_scale: weight is a plain tensor next to DTensors, expected")
        assert said["mesh"].startswith("RuntimeError: bn_scale: weight is on DeviceMesh")
        assert said["in place"].startswith("RuntimeError: bn_scale_: input has the placements [Partial(sum)], expected")
        assert said["statistics"].startswith("RuntimeError: bn_scale_train: running_mean has the placements")
        assert "sharding strategy" in said["backward"], "PyTorch's own"


@pytest.mark.parametrize("names", [(0, 1), (1, 0)], ids=["package first", "DTensors first"])
def test_importing_the_package_does_not_import_dtensors(names: tuple[int, int]) -> None:
    """And the rules are there whichever is imported first."""
    first, second = (("fused_conv_bn", "torch.distributed.tensor")[i] for i in names)
    program = f"""
import sys, torch
def seen(name): return name in sys.modules
of_torch = seen("torch.distributed.tensor")
import {first}
if {names[0] == 0}:
    assert seen("fused_conv_bn._register.sharding") == seen("torch.distributed.tensor") == of_torch
import {second}
assert seen("fused_conv_bn._register.sharding")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
