"""The modules in training mode against the models that they replace: outputs, buffers, and which op runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import DTYPES, assert_no_worse_than_eager
from fused_conv_bn import reference
from module_pairs import TRAIN, WITH_LAYOUTS, Plain, models, ops_of, randomize, residual_of, row_cases, rows, sample


def train_models(device: str, generator: torch.Generator, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    plain, ours = models(generator, device, dtype, **kwargs)
    return plain.train(), ours.train()


def check_module(
    y: Tensor, eager: Tensor, plain_before: nn.Module, x: Tensor, ours: nn.Module, plain: nn.Module
) -> None:
    """The output and all buffers, against float64 and what eager made of the same."""
    exact = copy.deepcopy(plain_before).double()
    if isinstance(exact.scaling_factor, Tensor):
        exact.scaling_factor = exact.scaling_factor.double()
    with torch.no_grad():
        truth = exact(x.double())
    assert y.dtype == eager.dtype and y.stride() == eager.stride()
    assert_no_worse_than_eager(y, eager, truth)
    mine, theirs, exacts = ours.state_dict(), plain.state_dict(), exact.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        if name.startswith("bn.running"):
            assert_no_worse_than_eager(mine[name], theirs[name], exacts[name])
        else:
            assert torch.equal(mine[name], theirs[name]), name


@row_cases
def test_module_in_training_without_grad(row, case, arguments, device, generator):
    """One op, and the same results and buffers as eager's, over several batches."""
    plain, ours = train_models(device, generator, row=row, **arguments)
    assert ops_of(copy.deepcopy(ours), sample(generator, device, row=row)).count(row.train) == 1
    for step in range(3):
        x = sample(generator, device, row=row) * (step + 1) + step
        before = copy.deepcopy(plain)
        ours.load_state_dict(plain.state_dict())
        with torch.no_grad():
            check_module(ours(x), plain(x), before, x, ours, plain)
    if arguments.get("track_running_stats", True):
        assert ours.bn.num_batches_tracked == 3


def test_module_runs_one_op(device, generator):
    _, ours = train_models(device, generator)
    ops = ops_of(ours, sample(generator, device))
    assert ops.count(TRAIN) == 1 and ops.count("aten::convolution") == ops.count("batch_norm") == ops.count("mul") == 0


@rows
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("affine", [False, True])
def test_module_without_running_statistics(row, device, mode, affine, generator):
    """Batch statistics in either mode."""
    plain, ours = models(generator, device, track_running_stats=False, affine=affine, row=row)
    for module in (plain, ours):
        module.train(mode == "train")
    x = sample(generator, device, row=row)
    assert ops_of(ours, x).count(row.train) == 1
    with torch.no_grad():
        check_module(ours(x), plain(x), copy.deepcopy(plain), x, ours, plain)


@rows
def test_module_with_buffers_that_are_not_tracked(row, device, generator):
    """track_running_stats switched off afterwards: the buffers stay, and training leaves them alone."""
    plain, ours = train_models(device, generator, row=row)
    for module in (plain, ours):
        module.bn.track_running_stats = False
    x = sample(generator, device, row=row)
    with torch.no_grad():
        check_module(ours(x), plain(x), copy.deepcopy(plain), x, ours, plain)
    assert ours.bn.num_batches_tracked == 0
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@rows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_module_dtypes_and_formats(row, device, dtype, channels_last, generator):
    plain, ours = train_models(device, generator, dtype, row=row)
    x = sample(generator, device, dtype, row)
    if channels_last and row in WITH_LAYOUTS.values():
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x = x.to(memory_format=last)
        plain, ours = (module.to(memory_format=last) for module in (plain, ours))
    assert ops_of(copy.deepcopy(ours), x).count(row.train) == 1
    before = copy.deepcopy(plain)
    with torch.no_grad():
        y, eager = ours(x), plain(x)
    if dtype == torch.float64:
        torch.testing.assert_close(y, eager, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.bn.running_var, plain.bn.running_var, rtol=1e-12, atol=1e-12)
        assert y.stride() == eager.stride()
    else:
        check_module(y, eager, before, x, ours, plain)


@rows
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_module_with_residual_and_activation(row, device, activation, with_residual, generator):
    plain, ours = train_models(device, generator, activation=activation, row=row)
    x = sample(generator, device, row=row)
    residual = residual_of(row, generator, device) if with_residual else None
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        y, eager = ours(x, residual), plain(x, residual, activation)
        truth = exact(x.double(), None if residual is None else residual.double(), activation)
    assert_no_worse_than_eager(y, eager, truth)


@rows
def test_module_under_autocast(row, device, generator):
    plain, ours = train_models(device, generator, row=row)
    x = sample(generator, device, row=row)
    before = copy.deepcopy(plain)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        assert ops_of(copy.deepcopy(ours), x).count(row.train) == 1
        y, eager = ours(x), plain(x)
    check_module(y, eager, before, x, ours, plain)


@rows
def test_module_with_grad(row, device, generator):
    """The same op, and the same bits as without, but for the CPU: there it keeps PyTorch's convolution for backward."""
    plain, ours = train_models(device, generator, row=row)
    x = sample(generator, device, row=row)
    other, before = copy.deepcopy(ours), copy.deepcopy(plain)
    y = ours(x)
    assert y.requires_grad
    with torch.no_grad():
        expected = other(x)
        check_module(y, plain(x), before, x, ours, plain)
    if device == "cuda":
        assert torch.equal(y, expected)
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), other.buffers(), strict=True))
    with torch.no_grad():
        expected = copy.deepcopy(ours)(x)
    ours.requires_grad_(False)
    assert torch.equal(ours(x), expected)  # grad mode is on, and nothing needs a gradient


@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (0, 4, 9, 8)], ids=str)
def test_module_leaves_odd_inputs_to_pytorch(device, shape, generator):
    """Its own errors and its own answers, and the same buffers afterwards."""
    plain, ours = train_models(device, generator)
    outcomes = []
    for module in (plain, ours):
        try:
            with torch.no_grad():
                outcomes.append(module(torch.ones(shape, device=device)).shape)
        except (ValueError, RuntimeError) as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert all(torch.equal(a, b) for a, b in zip(ours.bn.buffers(), plain.bn.buffers(), strict=True))


@rows
def test_synchronised_batchnorm_of_one_process(row, device, generator):
    """It is a plain BatchNorm then. (Of several: integrations/test_distributed.py.)"""
    _, ours = models(generator, device, row=row)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours).train()
    assert type(ours.bn) is nn.SyncBatchNorm
    assert ops_of(ours, sample(generator, device, row=row)).count("fused_conv_bn") == 1
    assert ops_of(ours.eval(), sample(generator, device, row=row)).count(row.fused) == 1


def test_subclasses_of_batchnorm_are_not_replaced(device, generator):
    class Loud(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 100

    _, ours = train_models(device, generator)
    loud = Loud(6).to(device).train()
    ours.bn = loud
    with torch.no_grad():
        assert ours(sample(generator, device)).mean() > 90


def test_eval_after_training_uses_the_new_statistics(device, generator):
    """Also where neither train() nor eval() of the module is called between."""
    plain, ours = models(generator, device)
    x = sample(generator, device)
    with torch.no_grad():
        stale = ours(x)
        for module in (plain, ours):
            module.bn.train()
            module(x * 3 + 1)
            module.bn.eval()
        torch.testing.assert_close(ours(x), plain(x))
        assert not torch.equal(ours(x), stale)


@rows
def test_update_bn(row, device, generator):
    """torch.optim.swa_utils.update_bn: cumulative averages, momentum being None inside."""
    plain, ours = train_models(device, generator, row=row)
    before = copy.deepcopy(plain).double()
    batches = [sample(generator, device, row=row) * s for s in (1.0, 2.0, 0.5)]
    for module, cast in ((plain, torch.float32), (ours, torch.float32), (before, torch.float64)):
        torch.optim.swa_utils.update_bn([b.to(cast) for b in batches], module)
    assert ours.bn.num_batches_tracked == 3 and ours.bn.momentum == 0.1
    for name in ("running_mean", "running_var"):
        assert_no_worse_than_eager(*(getattr(m.bn, name) for m in (ours, plain, before)))


def test_compiled_module(device, generator):
    torch._dynamo.reset()
    plain, ours = train_models(device, generator)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            x = sample(generator, device)
            torch.testing.assert_close(compiled(x), plain(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(compiled.bn, name), getattr(plain.bn, name))
    torch._dynamo.reset()


def test_a_model_of_several(device, generator):
    class Net(nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.first, self.second = block(4, 6, 3, 1.5), block(6, 5, 3, 0.5, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    plain, ours = Net(Plain).to(device), Net(fcb.ConvBnScale2d).to(device)
    for module in (plain.first, plain.second):
        randomize(module, generator)
    ours.load_state_dict(plain.state_dict())
    x = sample(generator, device)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
