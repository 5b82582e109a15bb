"""Programs with this package's ops in them as ONNX: standard operators alone, and ONNX Runtime computes what they do."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import RESIDUALS, SLOPE, random_bn
from fused_conv_bn import reference
from small_network import Network, random_statistics

pytestmark = pytest.mark.usefixtures("need_onnx")
C = 6


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def translated(model: nn.Module, tensors: tuple[Tensor, ...], **options: Any) -> Any:
    with torch.no_grad(), fcb.export_ops():
        program = torch.export.export(model, tensors, **options)
    assert "fused_conv_bn" in str(program.graph)
    translations = fcb.onnx_translations()
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=translations)
    assert onnx_program is not None
    assert {node.domain for node in onnx_program.model.graph} == {""} and not onnx_program.model.functions
    return onnx_program


def run(onnx_program: Any, tensors: tuple[Tensor, ...], folder: Path) -> list[Tensor]:
    import onnx
    import onnxruntime

    path = folder / "model.onnx"
    onnx_program.save(path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    inputs = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, inputs)]


def check(function: Callable[..., Any], tensors: tuple[Tensor, ...], folder: Path, **tolerance: float) -> None:
    """Against the twin of the op, which is PyTorch's own ops: the functions' result where gradients are needed."""
    got = run(translated(Call(function), tensors), tensors, folder)
    expected = function(*tensors)
    expected = expected if isinstance(expected, (tuple, list)) else [expected]
    for y, z in zip(got, expected, strict=True):
        torch.testing.assert_close(y, z, **tolerance)  # type: ignore[arg-type]


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_epilogues(residual: str, generator: torch.Generator, tmp_path: Path) -> None:
    bn = random_bn(C, torch.float32, "cpu", generator)
    x, other = (draw(generator, 2, C, 9, 8) for _ in range(2))

    def function(x: Tensor, other: Tensor, *bn: Tensor) -> list[Tensor]:
        named = {"residual": None if residual == "none" else other, "residual_last": residual == "last"}
        return [
            fcb.bn_scale(x, *bn, 1.7, **named, activation=activation, negative_slope=SLOPE)
            for activation in reference.ACTIVATIONS
        ]

    check(function, (x, other, *bn), tmp_path)


WINDOWS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((2, 4, 9), (C, 4, 3), {"padding": 1}),
    "2d": ((2, 4, 9, 8), (C, 4, 3, 3), {"stride": 2, "padding": (1, 2)}),
    "2d, groups": ((2, 4, 9, 8), (C, 2, 3, 2), {"dilation": (2, 1), "groups": 2}),
    "3d": ((2, 4, 9, 8, 7), (C, 4, 3, 3, 3), {"padding": 1, "stride": (2, 1, 1)}),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_convolutions(window: str, generator: torch.Generator, tmp_path: Path) -> None:
    shape, weight_shape, named = WINDOWS[window]
    x, weight, conv_bias = draw(generator, *shape), draw(generator, *weight_shape), draw(generator, C)
    bn = random_bn(C, torch.float32, "cpu", generator)

    def function(x: Tensor, weight: Tensor, conv_bias: Tensor, *bn: Tensor) -> list[Tensor]:
        mean, var, scale, shift = bn
        return [
            fcb.conv_bn_scale(x, weight, conv_bias, *bn, 1.7, 1e-3, **named, activation="silu"),
            fcb.conv_bn_scale(x, weight, None, mean, var, **named),
            fcb.conv_bn_scale(x, weight, None, mean, var, scale, None, 0.5, **named),
            fcb.conv_scale_shift(x, weight, scale, shift, **named, activation="leaky_relu", negative_slope=SLOPE),
            fcb.conv_scale_shift(x, weight, None, shift, **named),
            fcb.conv_scale_shift(x, weight, scale, None, **named),
            fcb.conv_scale_shift(x, weight, None, None, **named),
        ]

    check(function, (x, weight, conv_bias, *bn), tmp_path, rtol=1e-4, atol=1e-4)


OTHERS: dict[str, Callable[..., Any]] = {
    "bn_scale of no affine": lambda x, g, mean, var, *_: fcb.bn_scale(x, mean, var, None, None, 2.0),
    "bn_scale_cat": lambda x, g, *bn: fcb.bn_scale_cat([x[:, :2], x[:, 2:]], *bn, 2.0, activation="mish"),
    "conv_bn_scale_mean": lambda x, g, *bn: fcb.conv_bn_scale_mean(
        *(x, x.new_ones(C, C, 1, 1), bn[3], *bn, 1.5), residual=x, activation="silu"
    ),
    "fold_bn": lambda x, g, *bn: fcb.fold_bn(*bn, 1.5, 1e-3, bn[1]),
    "fold_bn of no affine": lambda x, g, mean, var, *_: fcb.fold_bn(mean, var),
    "gate": lambda x, g, *_: fcb.gate(x, g, activation="hardswish"),
    "gate with a residual": lambda x, g, *_: fcb.gate(x, g[:, :, 0, 0], residual=x, residual_last=True),
    "gate_conv_bn_scale": lambda x, g, *bn: fcb.gate_conv_bn_scale(
        *(x, g, x.new_ones(C, C, 1, 1), bn[3], *bn, 1.5), residual=x, activation="silu"
    ),
    "max_pool2d": lambda x, *_: fcb.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_pool2d of other windows": lambda x, *_: (fcb.max_pool2d(x, (2, 3)), fcb.max_pool2d(x, 2, 1, dilation=2)),
    "scale_shift": lambda x, g, scale, shift, *_: fcb.scale_shift(x, scale, shift, activation="gelu"),
    "scale_shift of nothing": lambda x, *_: fcb.scale_shift(x, None, None),
    "spatial_mean": lambda x, *_: (fcb.spatial_mean(x), fcb.spatial_mean(x, keepdim=True)),
    "squeeze_excite": lambda x, g, bias, *_: fcb.squeeze_excite(
        *(x, x.new_ones(3, C, 1, 1), None, g[0, :3].expand(3, C, 1).transpose(0, 1)[..., None], bias),
        activation="silu",
        gate="hardsigmoid",
    ),
}


def test_other_ops(generator: torch.Generator, tmp_path: Path) -> None:
    def function(*tensors: Tensor) -> list[Tensor]:
        results = [call(*tensors) for call in OTHERS.values()]
        return [y for result in results for y in (result if isinstance(result, tuple) else [result])]

    x, gate = draw(generator, 2, C, 9, 8), draw(generator, 2, C, 1, 1)
    check(function, (x, gate, *random_bn(C, torch.float32, "cpu", generator)), tmp_path)


def test_every_op_of_an_evaluation_graph_is_translated() -> None:
    """Those that return a tensor and neither train, nor are a backward, nor this package's own affair."""
    ops = torch.ops.fused_conv_bn
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fused_conv_bn::")
    }
    names = {n for n in names if not n.startswith("_") and "train" not in n and "backward" not in n}
    names -= {"bn_moments", "cuda_archs", "bn_scale_", "scale_shift_", "bn_scale.out", "scale_shift.out"}
    assert {getattr(ops, name).default for name in names} == set(fcb.onnx_translations())


@pytest.mark.parametrize("statistics", [torch.float16, torch.float32], ids=str)
def test_float16(statistics: torch.dtype, generator: torch.Generator, tmp_path: Path) -> None:
    """Scale and shift may have more bits than what they are for."""

    def function(x: Tensor, weight: Tensor, *bn: Tensor) -> list[Tensor]:
        y = fcb.conv_bn_scale(x, weight, None, *bn, activation="relu")
        return [y, fcb.scale_shift(x, *fcb.fold_bn(*bn, 0.5), activation="gelu_tanh")]

    x, weight = draw(generator, 2, C, 9, 8).half(), draw(generator, C, C, 3, 3).half()
    bn = tuple(t.to(statistics) for t in random_bn(C, torch.float32, "cpu", generator))
    check(function, (x, weight, *bn), tmp_path, rtol=2e-2, atol=2e-2)


def test_float64(generator: torch.Generator) -> None:
    """Numbers have as many bits as tensors, but for those of ONNX's own operators, such as BatchNorm's epsilon. (ONNX
    Runtime has no such convolution.)"""
    from onnx.reference import ReferenceEvaluator

    def function(x: Tensor, weight: Tensor, *bn: Tensor) -> Tensor:
        return fcb.conv_bn_scale(x, weight, None, *bn, 0.3, 2.0**-10, activation="gelu_tanh")

    tensors = (draw(generator, 2, C, 5, 4), draw(generator, C, C, 1, 1), *random_bn(C, torch.float32, "cpu", generator))
    double = tuple(t.double() for t in tensors)
    program = translated(Call(function), double).model_proto
    names = [i.name for i in program.graph.input]
    (y,) = ReferenceEvaluator(program).run(None, dict(zip(names, (t.numpy() for t in double), strict=True)))
    torch.testing.assert_close(torch.from_numpy(y), function(*double), rtol=1e-12, atol=1e-12)


def test_a_fused_network(generator: torch.Generator, tmp_path: Path) -> None:
    """Of any batch, and as without fuse() or export_ops()."""
    model = random_statistics(Network(), generator)
    plain, x = copy.deepcopy(model), draw(generator, 2, 3, 32, 32)
    with torch.no_grad():
        fcb.fuse(model)(x)
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    kept = translated(model, (x,), dynamic_shapes=shapes)
    own = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes)
    for batch in (2, 5):
        x = draw(generator, batch, 3, 32, 32)
        for program in (kept, own):
            assert {node.domain for node in program.model.graph} == {""}
            (y,) = run(program, (x,), tmp_path)
            torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)


def test_without_the_table_the_op_is_named(generator: torch.Generator) -> None:
    x = draw(generator, 2, C, 9, 8)
    with torch.no_grad(), fcb.export_ops():
        program = torch.export.export(Call(lambda x: fcb.gate(x, x[:, :, 0, 0])), (x,))
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        torch.onnx.export(program, dynamo=True, verbose=False)
    assert "fused_conv_bn.gate" in str(raised.value) + str(raised.value.__cause__)


def test_onnxscript_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "fused_conv_bn._register.onnx", raising=False)
    with pytest.raises(ImportError) as raised:
        fcb.onnx_translations()
    assert str(raised.value) == (
        "onnx_translations: onnxscript is not installed, and torch.onnx.export(dynamo=True) needs it: "
        "pip install onnx onnxscript"
    )
