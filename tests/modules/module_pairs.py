"""Each module beside the model that it replaces, with the same random state, and the ops that they run."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_conv_bn as fcb
from common import DTYPES, assert_no_worse_than_eager, random_bn
from fused_conv_bn.reference import ACTIVATIONS

BN_ARGUMENTS = ("eps", "momentum", "affine", "track_running_stats")
FUSED = "fused_conv_bn::conv_bn_scale"
TRAIN = "fused_conv_bn::conv_bn_scale_train"
BN, BN_TRAIN = "fused_conv_bn::bn_scale", "fused_conv_bn::bn_scale_train"


class Row(NamedTuple):
    """A class: what it stands for, the first arguments of its constructor, an input, its result, and its ops."""

    of: type[nn.Module]
    layer: type[nn.Module]
    norm: type[nn.Module]
    arguments: dict[str, int]
    size: tuple[int, ...]
    result: tuple[int, ...]
    fused: str
    train: str
    name: str = "conv"


def _rows() -> dict[str, Row]:
    conv = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    sizes = [(33,), (9, 8), (5, 4, 6)], [(33,), (5, 4), (3, 2, 4)]
    rows = {}
    for space in (1, 2, 3):
        norm = getattr(nn, f"BatchNorm{space}d")
        for name, grows, inputs in (("Conv", -2, sizes[0]), ("ConvTranspose", 2, sizes[1])):
            of, layer = getattr(fcb, f"{name}BnScale{space}d"), getattr(nn, f"{name}{space}d")
            size = inputs[space - 1]
            result = 3, 6, *(s + grows for s in size)
            ops = (FUSED, TRAIN) if name == "Conv" else (BN, BN_TRAIN)
            rows[f"{name.lower()}{space}d"] = Row(of, layer, norm, conv, (3, 4, *size), result, *ops)
    linear = fcb.LinearBnScale, nn.Linear, nn.BatchNorm1d, {"in_features": 4, "out_features": 6}
    rows["linear"] = Row(*linear, (40, 4), (40, 6), BN, BN_TRAIN, "linear")
    # BatchNorm takes the 6 of dimension 1 for its features.
    rows["linear of 3 dimensions"] = Row(*linear, (3, 6, 4), (3, 6, 6), BN, BN_TRAIN, "linear")
    return rows


ROWS = _rows()
CONV2D = ROWS["conv2d"]
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


class Plain(nn.Module):
    """The model that a user replaces."""

    def __init__(self, *args: Any, row: Row = CONV2D, **kwargs: Any) -> None:
        super().__init__()
        kwargs |= dict(zip((*row.arguments, "scaling_factor"), args, strict=False))
        self.scaling_factor = kwargs.pop("scaling_factor", 1.0)
        bn = {name: kwargs.pop(name) for name in BN_ARGUMENTS if name in kwargs}
        self.name = row.name
        setattr(self, row.name, row.layer(**kwargs))
        self.bn = row.norm(kwargs[list(row.arguments)[1]], **bn)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str = "none", output_size: Any = None
    ) -> Tensor:
        layer = getattr(self, self.name)
        y = self.bn(layer(x) if output_size is None else layer(x, output_size)) * self.scaling_factor
        return ACTIVATIONS[activation](y if residual is None else y + residual)


class Ops(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part == name if "::" in part else part in name for name in self.names)


def ops_of(module: nn.Module, *args: Any) -> Ops:
    with torch.no_grad(), Ops() as ops:
        module(*args)
    return ops


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Random statistics and affine parameters: a fresh BatchNorm would hide a module that leaves BN out."""
    for bn in module.modules():
        if isinstance(bn, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            targets = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
            for target, value in zip(targets, random_bn(bn.num_features, torch.float64, "cpu", generator), strict=True):
                if target is not None:
                    target.data.copy_(value)


def models(
    generator: torch.Generator,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    row: Row = CONV2D,
    **kwargs: Any,
) -> tuple[Plain, Any]:
    """Both modules with the same random state, in evaluation mode."""
    arguments: dict[str, Any] = {**row.arguments, "scaling_factor": 1.7, **kwargs}
    plain, ours = Plain(**arguments, row=row), row.of(**arguments, activation=activation)
    randomize(plain, generator)
    ours.load_state_dict(plain.state_dict())
    return plain.to(device, dtype).eval(), ours.to(device, dtype).eval()


def sample(
    generator: torch.Generator, device: str = "cpu", dtype: torch.dtype = torch.float32, row: Row = CONV2D
) -> Tensor:
    return torch.randn(row.size, generator=generator).to(device, dtype)


def residual_of(
    row: Row, generator: torch.Generator, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(row.result, generator=generator).to(device, dtype)


def assert_fused(ops: Ops, op: str) -> None:
    """One op of this package, and nothing that it stands for."""
    assert ops.count(op) == ops.count("fused_conv_bn") == 1 and ops.count("batch_norm") == 0
    assert op in (BN, BN_TRAIN) or ops.count("convolution") == 0


def check(y: Tensor, plain: nn.Module, *args: Any) -> Tensor:
    """Holds ``y`` to the accuracy, dtype and strides of ``plain(*args)``, which is returned."""

    def run(dtype: torch.dtype) -> Tensor:
        """On the CPU: CUDA's hardswish multiplies float64 by a float32 1/6."""
        cast = [a.to("cpu", dtype) if isinstance(a, Tensor) else a for a in args]
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            return copy.deepcopy(plain).to("cpu", dtype)(*cast).to(y.device)

    with torch.no_grad():
        eager = plain(*args)
    assert (y.dtype, y.stride()) == (eager.dtype, eager.stride())
    assert_no_worse_than_eager(y, run(torch.float32) if y.dtype == torch.float64 else eager, run(torch.float64))
    return eager


_NORM_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_scaling": {"scaling_factor": 1.0},
    "int_scaling": {"scaling_factor": -2},
    "tensor_scaling": {"scaling_factor": torch.tensor(0.37)},
    "no_bias": {"bias": False},
    "no_affine": {"affine": False},
    "no_bias_no_affine": {"bias": False, "affine": False},
    "no_stats": {"track_running_stats": False},
    "no_momentum": {"momentum": None},
    "eps": {"eps": 0.1},
}
CASES: dict[str, dict[str, Any]] = {
    **_NORM_CASES,
    "stride": {"stride": (2, 1), "padding": (1, 2)},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise_1x1": {"groups": 2, "kernel_size": 1},
    "same": {"padding": "same", "kernel_size": (3, 2)},
    **{mode: {"padding_mode": mode, "padding": (1, 2)} for mode in ("zeros", "reflect", "replicate", "circular")},
}
"""Of ConvBnScale2d."""

_TRANSPOSED_CASES: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2, "stride": 3},
}
WITH_LAYOUTS = {name: row for name, row in ROWS.items() if len(row.size) > 3}
ROW_CASES: list[tuple[str, str, dict[str, Any]]] = []
"""(row, case, arguments) of all classes."""
for _row, _of in ROWS.items():
    _space = len(_of.size) - 2
    _cases = CASES if _of.fused == FUSED else _NORM_CASES
    if "transpose" in _row:
        _cases = _NORM_CASES | _TRANSPOSED_CASES
    for _case, _arguments in _cases.items():
        _of_space = {k: (v * 2)[:_space] if isinstance(v, tuple) else v for k, v in _arguments.items()}
        if not (_case == "dilation" and _space == 3):  # its input is too small
            ROW_CASES.append((_row, _case, _of_space))
cases = pytest.mark.parametrize("case", CASES)


def _marked(leave_out: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    found = [row for row in ROW_CASES if row[1] not in leave_out]
    ids = [f"{row}-{case}" for row, case, _ in found]
    return pytest.mark.parametrize(("row", "case", "arguments"), [(ROWS[r], c, a) for r, c, a in found], ids=ids)


row_cases = _marked()
trained_row_cases = _marked(("reflect", "replicate"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
