"""Two processes that train one network, by DDP and FSDP2, against plain PyTorch: gloo on the CPU, NCCL on two GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distributed_steps
from distributed_steps import CUDA_RUNS, IN_16_BITS, RUNS
from training_pairs import assert_same

WORLD = 2
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What each process found on a kind of device. They are started once: that takes as long as all runs."""
    found: dict[str, Found] = {}

    def of(device: str) -> Found:
        if device not in found:
            folder: Path = tmp_path_factory.mktemp(device)
            found[device] = []
            with pytest.MonkeyPatch.context() as patch:
                if device == "cpu":  # where there are GPUs, FSDP2 takes their streams for a mesh of CPUs (torch 2.11)
                    patch.setenv("CUDA_VISIBLE_DEVICES", "")
                mp.spawn(distributed_steps.run, (WORLD, device, str(folder)), WORLD)
            found[device] = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
        assert found[device], "the processes failed, as the first of these tests says"
        return found[device]

    return of


@pytest.fixture
def found(request: pytest.FixtureRequest, device: str, need_gpus: Callable[[int], None], found_of: Any) -> Found:
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    if device == "cuda":
        need_gpus(WORLD)
    return found_of(device)


@pytest.mark.parametrize("form", [1, 2], ids=["ConvBnScale2d", "fuse"])
@pytest.mark.parametrize("name", [*RUNS, *CUDA_RUNS])
def test_as_plain_pytorch(name: str, form: int, device: str, found: Found) -> None:
    """State and gradients of each process, and the same parameters in both."""
    if name in CUDA_RUNS and device == "cpu":
        pytest.skip("PyTorch's SyncBatchNorm has no CPU kernels")
    for of_process in found:
        plain, ours = of_process[name][0], of_process[name][form]
        assert any(t.abs().max() > 0 for key, t in plain.items() if key.startswith("gradient"))
        if name in IN_16_BITS:
            for key in plain:
                largest = plain[key].abs().max().clamp(min=1)
                assert (ours[key] - plain[key]).abs().max() <= 0.1 * largest, key
        else:
            assert_same(ours, plain)
    mine, others = (of_process[name][form] for of_process in found)
    for key in mine:
        if "running" not in key:
            torch.testing.assert_close(mine[key], others[key], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", distributed_steps.SYNC_CASES)
def test_statistics_of_all_batches(name: str, dtype: torch.dtype, device: str, found: Found) -> None:
    """As one process with all of them, and its gradients of weight and bias are the sums over the processes'."""
    unit = torch.finfo(dtype).eps
    for of_process in found:
        want, got, terms = of_process[f"sync, {name}, {dtype}"]
        for key in want:
            largest = want[key].abs().max() if want[key].numel() else 0.0
            most = 64 * unit * max(largest, terms.get(key, 0.0))
            torch.testing.assert_close(
                got[key], want[key], rtol=16 * unit, atol=float(most), msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("form", [1, 2], ids=["ConvBnScale2d", "fuse"])
def test_as_one_process_with_the_whole_batch(form: int, device: str, found: Found) -> None:
    """By SyncBatchNorms, in state and gradients."""
    if device == "cpu":
        pytest.skip("PyTorch's SyncBatchNorm has no CPU kernels")
    for of_process in found:
        expected = of_process["the whole batch"][0]
        assert expected["stem.bn.num_batches_tracked"] == distributed_steps.STEPS
        assert_same(of_process["the whole batch"][form], expected)


def test_the_fused_op_runs_in_a_sharded_block(found: Found) -> None:
    assert all(of_process["fused"] == [True, True] for of_process in found)
