"""The ops under torch.compile, torch.export, fake and meta tensors, and what autograd makes of them."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fused_conv_bn as fcb
from common import DTYPES, assert_no_worse_than_eager, random_bn

OPS = torch.ops.fused_conv_bn
C = 5
pytestmark = pytest.mark.usefixtures("no_leftover_graphs")


# ---- samples ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "2d": lambda: torch.randn(4, C),
    "3d": lambda: torch.randn(2, C, 7),
    "4d": lambda: torch.randn(2, C, 4, 3),
    "5d": lambda: torch.randn(2, C, 2, 4, 3),
    "channels_last": lambda: torch.randn(2, C, 4, 3).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, C, 2, 4, 3).contiguous(memory_format=torch.channels_last_3d),
    "every second column": lambda: torch.randn(2, C, 4, 6)[..., ::2],
    "sliced channels": lambda: torch.randn(2, 2 * C, 4, 3)[:, :C],
    "sliced channels_last": lambda: torch.randn(2, 2 * C, 4, 3).contiguous(memory_format=torch.channels_last)[:, :C],
    "sliced height of channels_last": lambda: torch.randn(2, C, 8, 3).contiguous(memory_format=torch.channels_last)[
        :, :, 1:5
    ],
    "transposed": lambda: torch.randn(2, C, 4, 3).transpose(2, 3),
    "transposed 2d": lambda: torch.randn(C, 4).t(),
    "permuted 3d": lambda: torch.randn(2, 7, C).permute(0, 2, 1),
    "permuted batch": lambda: torch.randn(4, C, 2, 3).permute(2, 1, 0, 3),
    "no batch": lambda: torch.randn(0, C, 4, 3),
    "no batch, channels_last": lambda: torch.randn(0, C, 4, 3).contiguous(memory_format=torch.channels_last),
    "no width": lambda: torch.randn(2, C, 4, 0),
    "batch of 1": lambda: torch.randn(1, C, 4, 3),
    "batch of 1, channels_last": lambda: torch.randn(1, C, 4, 3).contiguous(memory_format=torch.channels_last),
    "1x1 pixels": lambda: torch.randn(2, C, 1, 1),
    "1x1 pixels, channels_last": lambda: torch.randn(2, C, 1, 1).contiguous(memory_format=torch.channels_last),
    "1 column": lambda: torch.randn(2, C, 4, 1),
    "1 column, channels_last": lambda: torch.randn(2, C, 4, 1).contiguous(memory_format=torch.channels_last),
    "batch of 1 and 1x1 pixels": lambda: torch.randn(1, C, 1, 1).contiguous(memory_format=torch.channels_last),
    "1 channel": lambda: torch.randn(2, 1, 4, 3),
    "1 channel, channels_last": lambda: torch.randn(2, 1, 4, 3).to(memory_format=torch.channels_last),
    "1 channel, channels_last by strides": lambda: torch.randn(2, 4, 3, 1).permute(0, 3, 1, 2),
    "all 1": lambda: torch.randn(1, 1, 1, 1),
    "odd strides of 1s": lambda: torch.randn(99).as_strided((1, C, 1, 3), (7, 3, 50, 1)),
    "expanded batch": lambda: torch.randn(1, C, 4, 3).expand(2, -1, -1, -1),
    "expanded channels": lambda: torch.randn(2, 1, 4, 3).expand(-1, C, -1, -1),
    "expanded pixels": lambda: torch.randn(2, C, 1, 1).expand(-1, -1, 4, 3),
    "expanded channels_last": lambda: (
        torch.randn(2, C, 1, 3).contiguous(memory_format=torch.channels_last).expand(-1, -1, 4, -1)
    ),
    "5d transposed": lambda: torch.randn(2, C, 2, 4, 3).transpose(2, 4),
}
WRITABLE = [name for name in LAYOUTS if not name.startswith("expanded")]
OPCHECKED = ("2d", "4d", "5d", "channels_last", "every second column", "sliced channels_last")


def bn_of(x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    return random_bn(x.size(1), x.dtype, x.device, generator)


def scale_shift_of(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    scale, shift = OPS.fold_bn(*bn_of(x, generator))
    return scale, shift


# op -> (args, kwargs) for an input. Each overload of the package, with and without its optional arguments.
CALLS: dict[str, tuple[Any, Callable[[Tensor, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "bn_scale": (OPS.bn_scale.default, lambda x, g: ((x, *bn_of(x, g), 1.7, 1e-3), {})),
    "bn_scale without affine": (OPS.bn_scale.default, lambda x, g: ((x, *bn_of(x, g)[:2]), {})),
    "bn_scale.out": (OPS.bn_scale.out, lambda x, g: ((x, *bn_of(x, g), 1.7), {"out": torch.empty_like(x)})),
    "bn_scale_": (OPS.bn_scale_.default, lambda x, g: ((x, *bn_of(x, g), 1.7), {})),
    "scale_shift": (OPS.scale_shift.default, lambda x, g: ((x, *scale_shift_of(x, g)), {"activation": "silu"})),
    "scale_shift with residual": (
        OPS.scale_shift.default,
        lambda x, g: ((x, *scale_shift_of(x, g)), {"residual": torch.randn_like(x), "activation": "relu"}),
    ),
    "scale_shift.out": (
        OPS.scale_shift.out,
        lambda x, g: ((x, *scale_shift_of(x, g)), {"residual": torch.randn_like(x), "out": torch.empty_like(x)}),
    ),
    "scale_shift_": (OPS.scale_shift_.default, lambda x, g: ((x, *scale_shift_of(x, g)), {"activation": "relu6"})),
    "bn_scale_cat": (
        OPS.bn_scale_cat.default,
        lambda x, g: (([x, x * 2], *random_bn(2 * x.size(1), x.dtype, x.device, g), 1.7), {"activation": "silu"}),
    ),
    "gate": (
        OPS.gate.default,
        lambda x, g: ((x, torch.rand(x.shape[:2]).to(x)), {}),
    ),
    "gate with residual": (
        OPS.gate.default,
        lambda x, g: ((x, torch.rand(x.shape[:2]).to(x)), {"residual": torch.randn_like(x), "activation": "relu"}),
    ),
}


def layout(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """The sample on another device and in another dtype, with the strides that it has."""
    x = LAYOUTS[name]()
    y = torch.empty(x.untyped_storage().nbytes() // 4 + 1, device=device, dtype=dtype).normal_()
    return y.as_strided(x.size(), x.stride(), x.storage_offset())


# ---- schemas, fakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str, name: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    op, arguments = CALLS[call]
    torch.library.opcheck(op, *arguments(layout(name, device, dtype), generator))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optional", [0, 2])
def test_opcheck_fold_bn(optional: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    bn = random_bn(C, dtype, device, generator)
    conv_bias = torch.randn(C, generator=generator).to(device, dtype) if optional else None
    arguments = (*bn[: 2 + optional], *[None] * (2 - optional), 1.7, 1e-3, conv_bias)
    torch.library.opcheck(OPS.fold_bn.default, arguments)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.float64 if t.dtype == torch.float64 else torch.float32) for t in tensors]


# Ops of two results and more, and convolutions: op -> arguments for an input of (2, C, 4, 3) and a weight; and keyword arguments
# where they are others than an epilogue, or None.
MORE_CALLS: dict[str, tuple[Any, ...]] = {
    "bn_scale_train_stats": (OPS.bn_scale_train_stats.default, lambda x, w, bn: (x, *bn)),
    "bn_scale_train_functional": (OPS.bn_scale_train_functional.default, lambda x, w, bn: (x, *bn)),
    "bn_scale_train_functional without statistics": (
        OPS.bn_scale_train_functional.default,
        lambda x, w, bn: (x, None, None),
    ),
    "bn_scale_backward in evaluation": (
        OPS.bn_scale_backward.default,
        lambda x, w, bn: (x, x + 1, None, x - 1, *bn[:2], None, *bn[2:], bn[3] + 1, 1.7, 1e-3),
        dict.fromkeys(("needs_input", "needs_weight", "needs_bias", "needs_conv_bias", "needs_residual"), True),
    ),
    "bn_scale_backward in training": (
        OPS.bn_scale_backward.default,
        lambda x, w, bn: (x, x + 1, None, None, *wide(bn[0]), None, *wide(bn[1]), *bn[2:], None, 1.7, 1e-3),
        {"needs_input": True, "needs_bias": True},
    ),
    "bn_scale_backward of a pair": (
        OPS.bn_scale_backward.default,
        lambda x, w, bn: (x, x + 1, None, None, None, None, None, *wide(bn[2], bn[3]), None, 1.0, 0.0),
        {"needs_weight": True},
    ),
    "bn_scale_backward_sums": (
        OPS.bn_scale_backward_sums.default,
        lambda x, w, bn: (x, x + 1, None, x - 1, *wide(*bn[:2]), *bn[2:], 1.7),
        {"needs_weight": True},
    ),
    "bn_scale_backward_apply": (
        OPS.bn_scale_backward_apply.default,
        lambda x, w, bn: (
            *(x, x + 1, None, x - 1, *wide(*bn[:2]), *bn[2:]),
            *(torch.stack(bn[:2]).double(), bn[1].double() + 9, 1.7),
        ),
        {"needs_residual": True},
    ),
    "bn_moments": (OPS.bn_moments.default, lambda x, w, bn: (x,), None),
    "conv_bn_scale": (OPS.conv_bn_scale.default, lambda x, w, bn: (x, w, bn[3] + 1, *bn, 1.7, 1e-3, [2, 1], [1, 1])),
    "conv_bn_scale without optional tensors": (OPS.conv_bn_scale.default, lambda x, w, bn: (x, w, None, *bn[:2])),
    "conv_bn_scale_train_stats": (
        OPS.conv_bn_scale_train_stats.default,
        lambda x, w, bn: (x, w, bn[3] + 1, *bn, 1.7, 0.1, 1e-3, [2, 1], [1, 1]),
    ),
    "conv_bn_scale_train_functional": (
        OPS.conv_bn_scale_train_functional.default,
        lambda x, w, bn: (x, w, bn[3] + 1, *bn, 1.7, 0.1, 1e-3, [2, 1], [1, 1]),
    ),
    "conv_bn_scale_train_functional without statistics": (
        OPS.conv_bn_scale_train_functional.default,
        lambda x, w, bn: (x, w, None, None, None),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("call", MORE_CALLS)
def test_opcheck_of_more(
    call: str, channels_last: bool, dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    op, arguments, *named = MORE_CALLS[call]
    x, w = (torch.randn(n, C, 6, 3, generator=generator).to(device, dtype) for n in (2, C))
    w = w[:, :, :3]
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    bn = random_bn(C, dtype, device, generator)
    for epilogue in ({}, {"activation": "leaky_relu", "negative_slope": 0.2}):
        keywords = epilogue if not named else {} if named[0] is None else epilogue | named[0]
        torch.library.opcheck(op, arguments(x, w, bn), keywords)


def test_every_overload_is_opchecked() -> None:
    """Guards the lists above: a new op needs samples."""
    checked = {op for op, *_ in (*CALLS.values(), *MORE_CALLS.values())} | {OPS.fold_bn.default, OPS.cuda_archs.default}
    checked |= {OPS.conv_scale_shift.default}  # in ops/test_conv_integration.py
    checked |= {OPS.conv_bn_scale_mean.default}  # in ops/test_conv_mean.py
    checked |= {OPS.gate_conv_bn_scale.default}  # in ops/test_gated_conv.py
    checked |= {OPS.bn_scale_train.default, OPS.conv_bn_scale_train.default}  # in ops/test_train_integration.py
    checked |= {OPS.max_pool2d.default, OPS.spatial_mean.default}  # in ops/test_pooling.py
    checked |= {OPS.max_pool2d_train.default, OPS.max_pool2d_backward.default}  # in ops/test_pooling_train.py
    checked |= {OPS.squeeze_excite.default}  # in ops/test_squeeze.py
    # CUDA alone, and not for torch.compile: in ops/test_wgrad.py
    checked |= {OPS._conv_bn_wgrad.default, OPS._conv_bn_scale_train_sums.default}
    # On the CPU alone, and not for torch.compile: in fuse/test_freeze.py and ops/test_packed_chain.py
    checked |= {OPS._conv_packed.default, OPS._conv_packed_chain.default}
    # What takes no tensor or returns none.
    names = "_explain", "_explain_problem", "_candidates", "_use_algorithm", "_check_algorithm", "_packed_channels"
    checked |= {getattr(OPS, name).default for name in (*names, "_check_environment")}
    checked |= {OPS._set_choices.cpu, OPS._set_choices.cuda}
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fused_conv_bn::")}
    assert {op.name() for op in checked} == defined


@pytest.mark.parametrize("call", ["bn_scale", "scale_shift with residual"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fake_is_like_real(name: str, call: str, device: str, generator: torch.Generator) -> None:
    """And both have the strides of F.batch_norm's result (empty results have no addresses to agree on)."""
    op, arguments = CALLS[call]
    x = layout(name, device)
    args, kwargs = arguments(x, generator)
    real = op(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = op(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args),
            **{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()},
        )
    eager = torch.nn.functional.batch_norm(x, *bn_of(x, generator), False, 0.0)
    described = [(y.size(), y.stride(), y.dtype, y.device.type) for y in (real, fake, eager)]
    assert described[0] == described[1]
    # In two dimensions PyTorch's CUDA kernels keep a permutation; cuDNN and the CPU put out a memory format, as we do.
    kept = x.is_cuda and name == "transposed 2d"
    assert described[0] == described[2] or x.numel() == 0 or kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bn_dtype", [None, torch.float32])
def test_fake_dtypes(dtype: torch.dtype, bn_dtype: torch.dtype | None, generator: torch.Generator) -> None:
    if dtype == torch.float64 and bn_dtype is not None:
        bn_dtype = None  # float64 goes with float64 only
    x, bn = torch.randn(2, C, 3).to(dtype), random_bn(C, bn_dtype or dtype, "cpu", generator)
    meta = [t.to("meta") for t in (x, *bn)]
    for real, fake in zip(OPS.fold_bn(*bn), OPS.fold_bn(*meta[1:]), strict=True):
        assert (real.dtype, real.shape) == (fake.dtype, fake.shape)
    assert OPS.bn_scale(x, *bn).dtype == OPS.bn_scale(*meta).dtype == dtype


@pytest.mark.parametrize("call", CALLS)
def test_meta_tensors(call: str, generator: torch.Generator) -> None:
    op, arguments = CALLS[call]
    args, kwargs = arguments(layout("channels_last"), generator)
    expected = op(*args, **kwargs)
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    y = op(*args, **kwargs)
    if y is not None:
        assert y.is_meta and y.shape == expected.shape and y.stride() == expected.stride()


def test_module_on_meta_tensors_under_a_fake_mode() -> None:
    with FakeTensorMode(), torch.no_grad():
        module = fcb.ConvBnScale2d(4, 6, 3, 2.0).eval()
        assert module(torch.randn(2, 4, 9, 8)).shape == module(torch.randn(2, 4, 9, 8)).shape == (2, 6, 7, 6)


# ---- torch.compile ---------------------------------------------------------------------------------------------------

SHAPES = [(2, 9, 8), (3, 10, 12), (5, 7, 20), (4, 16, 16), (8, 30, 5)]


def module(generator: torch.Generator, device: str = "cpu", **kwargs: Any) -> fcb.ConvBnScale2d:
    m = fcb.ConvBnScale2d(4, 6, 3, 1.7, activation="silu", **kwargs)
    for target, value in zip(
        (m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias),
        random_bn(6, torch.float32, "cpu", generator),
        strict=True,
    ):
        target.data.copy_(value)
    return m.to(device).eval()


def check(y: Tensor, m: fcb.ConvBnScale2d, *args: Tensor) -> None:
    """Holds ``y`` to the accuracy of the module's ops run one by one."""
    args = (*args, None)[:2]
    double = [None if a is None else a.double() for a in args]
    truth = copy.deepcopy(m).double()._forward_plain(*double)
    assert_no_worse_than_eager(y, m._forward_plain(*args), truth)


def test_one_graph_for_all_shapes(device: str, generator: torch.Generator) -> None:
    m, counter = module(generator, device), CompileCounter()
    compiled = torch.compile(m, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for n, h, w in SHAPES:
            x = torch.randn(n, 4, h, w, device=device)
            assert torch.equal(compiled(x), m(x))
    assert counter.frame_count == 1


def test_shapes_become_dynamic_by_themselves(device: str, generator: torch.Generator) -> None:
    """torch.compile's default: the first shape is compiled as it is, the second as any shape."""
    m, counter = module(generator, device), CompileCounter()
    compiled = torch.compile(m, fullgraph=True, backend=counter)
    with torch.no_grad():
        for n, h, w in SHAPES:
            compiled(torch.randn(n, 4, h, w, device=device))
    assert counter.frame_count == 2


def test_inductor(device: str, generator: torch.Generator) -> None:
    m = module(generator, device)
    compiled = torch.compile(m, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n, h, w in SHAPES:
            x, residual = (torch.randn(n, c, h - d, w - d, device=device) for c, d in ((4, 0), (6, 2)))
            check(compiled(x, residual), m, x, residual)
        m.bn.running_mean.add_(1)  # a compiled module folds on every call: it cannot be stale
        check(compiled(x, residual), m, x, residual)


def test_compiled_functions(device: str, generator: torch.Generator) -> None:
    """Each op through its Python function, with writes to an input of the graph, functionalised by AOTAutograd."""

    def f(x: Tensor, bn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale, shift = fcb.fold_bn(*bn, 1.7)
        y = fcb.bn_scale(x, *bn)
        out = torch.empty_like(x)
        fcb.bn_scale(y, *bn, out=out)
        fcb.scale_shift(out * 2, scale, shift, residual=y, activation="relu", out=out)
        fcb.bn_scale_(y, *bn)
        return fcb.scale_shift_(x, scale, shift, residual=y), out, fcb.scale_shift(x, scale, shift), y

    x = torch.randn(3, C, 4, 6, device=device)
    bn = random_bn(C, torch.float32, device, generator)
    x1, x2 = x.clone(), x.clone()
    expected = f(x1, bn)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x2, bn)
    for a, b in zip((*expected, x1), (*got, x2), strict=True):
        assert torch.equal(a, b)


def test_compiled_training_has_gradients(device: str, generator: torch.Generator) -> None:
    """In float64: what is compared is formulas (AOTAutograd decomposes BatchNorm), not roundings."""
    m = module(generator, device).double()
    x = torch.randn(3, 4, 9, 8, device=device, dtype=torch.float64)
    results = []
    for f in (m, torch.compile(m, fullgraph=True, backend="aot_eager")):
        m.zero_grad()
        f(x).square().sum().backward()
        results.append([p.grad for p in m.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export(grad: bool, keeps: bool, strict: bool, device: str, generator: torch.Generator) -> None:
    """What is exported has PyTorch's ops alone, unless export_ops() says otherwise; both survive saving. (Without a
    largest batch PyTorch's own BatchNorm would not export: cuDNN's has a limit.)"""
    m = module(generator, device)
    with torch.set_grad_enabled(grad), fcb.export_ops() if keeps else contextlib.nullcontext():
        program = torch.export.export(
            m,
            (torch.randn(2, 4, 9, 8, device=device),),
            dynamic_shapes={"x": {0: torch.export.Dim("n", min=1, max=1024)}},
            strict=strict,
        )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ("fused_conv_bn.conv_bn_scale.default" in targets) == keeps
    assert any("fused_conv_bn" in target for target in targets) == keeps
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for loaded in (program, torch.export.load(buffer)):
        for batch in (1, 7):
            x = torch.randn(batch, 4, 9, 8, device=device)
            with torch.no_grad():
                check(loaded.module()(x), m, x)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_functions(strict: bool, generator: torch.Generator) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(C, C, 3, 3))

        def forward(self, x: Tensor, *bn: Tensor) -> Tensor:
            scale, shift = fcb.fold_bn(*bn)
            y = fcb.conv_bn_scale(x, self.weight, None, *bn, activation="gelu")
            return fcb.scale_shift(fcb.bn_scale(y, *bn), scale, shift)

    m, arguments = Model(), (torch.randn(2, C, 6, 5), *random_bn(C, torch.float32, "cpu", generator))
    for keeps in (False, True):
        with fcb.export_ops() if keeps else contextlib.nullcontext():
            program = torch.export.export(m, arguments, strict=strict)
        kept = {str(node.target) for node in program.graph.nodes if "fused_conv_bn" in str(node.target)}
        assert len(kept) == (4 if keeps else 0)
        torch.testing.assert_close(program.module()(*arguments), m(*arguments))


@pytest.mark.parametrize("where", ["in torch.compile", "in a nested region"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_compiled_training(statistics: bool, grad: bool, where: str, device: str, generator: torch.Generator) -> None:
    """The running statistics move as in eager, twice if it is called twice, and where there are none it compiles too."""
    if grad and where == "in a nested region":
        pytest.skip("a node of the graph in a nested region: PyTorch's own BatchNorm does not compile there either")
    m = fcb.ConvBnScale2d(4, 6, 3, 1.7, activation="silu", track_running_stats=statistics, device=device)
    twin = copy.deepcopy(m)
    inner = torch.compiler.nested_compile_region(lambda t: m(t)) if "nested" in where else m
    x = torch.randn(2, 4, 9, 8, device=device)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            got = torch.compile(lambda t: inner(t) + inner(t * 2), backend="aot_eager")(x)
            torch.testing.assert_close(got, twin(x) + twin(x * 2))
    for a, b in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(list(m.buffers())) == (3 if statistics else 0)


@pytest.mark.parametrize("op", ["bn_scale_train", "conv_bn_scale_train"])
def test_compiled_training_functions(op: str, device: str, generator: torch.Generator) -> None:
    x, w = torch.randn(3, C, 6, 5, device=device), torch.randn(C, C, 3, 3, device=device)
    bn = random_bn(C, torch.float32, device, generator)
    arguments = (x,) if op == "bn_scale_train" else (x, w, None)
    for running in ((None, None), bn[:2]):
        mine, theirs = ([None if t is None else t.clone() for t in running] for _ in range(2))
        f = getattr(fcb, op)
        got = torch.compile(lambda *a: f(*a), fullgraph=True, backend="aot_eager")(*arguments, *mine, *bn[2:])  # noqa: B023
        torch.testing.assert_close(got, f(*arguments, *theirs, *bn[2:]))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


# ---- autograd --------------------------------------------------------------------------------------------------------

# How many tensors each takes.
FUNCTIONS = {
    "fold_bn": 5,
    "bn_scale": 5,
    "bn_scale_cat": 6,
    "gate": 3,
    "max_pool2d": 1,
    "spatial_mean": 1,
    "squeeze_excite": 5,
    "scale_shift": 4,
    "conv_scale_shift": 5,
    "conv_bn_scale": 7,
    "bn_scale_train": 5,
    "conv_bn_scale_train": 7,
}
IN_PLACE = {"bn_scale_": 5, "scale_shift_": 4}
REQUIRES = [(name, i) for name, count in IN_PLACE.items() for i in range(count)]


def function_arguments(name: str, device: str, generator: torch.Generator) -> tuple[list[Tensor], Callable[..., Any]]:
    """Its tensors, and the call with them."""
    x = torch.randn(2, C, 4, 3, device=device)
    mean, var, weight, bias = random_bn(C, torch.float32, device, generator)
    f = getattr(fcb, name)
    if name == "fold_bn":
        return [mean, var, weight, bias, mean + 1], lambda m, v, w, b, cb: f(m, v, w, b, conv_bias=cb)
    if name == "gate":
        return [x, mean.expand(2, C).clone(), x + 1], lambda x, g, r: f(x, g, residual=r, activation="silu")
    if name in ("max_pool2d", "spatial_mean"):
        return [x], lambda x: f(x, 3, 2, 1) if name == "max_pool2d" else f(x)
    if name == "squeeze_excite":
        layers = [t.to(device) for t in (torch.randn(3, C, 1, 1), torch.randn(3), torch.randn(C, 3, 1, 1), bias.cpu())]
        return [x, *layers], lambda *tensors: f(*tensors, activation="silu")
    if name == "bn_scale_cat":
        bn = random_bn(2 * C, torch.float32, device, generator)
        return [x, x + 1, *bn], lambda x, y, *bn: f([x, y], *bn)
    if name.startswith("bn_scale"):
        return [x, mean, var, weight, bias], f
    w = torch.randn(C, C, 3, 3, device=device)
    if name.startswith("conv_bn_scale"):
        return [x, w, mean + 1, mean, var, weight, bias], lambda *tensors: f(*tensors, padding=1)
    if name == "conv_scale_shift":
        return [x, w, mean, var, torch.randn_like(x)], lambda x, w, scale, shift, r: f(
            x, w, scale, shift, padding=1, residual=r
        )
    return [x, mean, var, torch.randn_like(x)], lambda x, scale, shift, r: f(x, scale, shift, residual=r)


@pytest.mark.parametrize(("name", "which"), REQUIRES)
def test_functions_refuse_to_lose_a_gradient(name: str, which: int, device: str, generator: torch.Generator) -> None:
    tensors, call = function_arguments(name, device, generator)
    tensors[which].requires_grad_()
    before = [t.detach().clone() for t in tensors]
    message = rf"^{name}: \w+ requires grad, and {name} keeps no autograd graph: call it under torch.no_grad\(\) or"
    with pytest.raises(RuntimeError, match=message):
        call(*tensors)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True)), "something was written"
    with torch.no_grad():
        call(*tensors)


@pytest.mark.parametrize(("name", "which"), REQUIRES)
def test_functions_refuse_to_lose_a_tangent(name: str, which: int, device: str, generator: torch.Generator) -> None:
    tensors, call = function_arguments(name, device, generator)

    def of_one(t: Tensor) -> Any:
        return call(*tensors[:which], t, *tensors[which + 1 :])

    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"^{name}: \w+ has a forward-mode tangent"):
        torch.func.jvp(of_one, (tensors[which],), (torch.ones_like(tensors[which]),))


@pytest.mark.parametrize(("name", "which"), [(name, i) for name, count in FUNCTIONS.items() for i in range(count)])
def test_forward_mode(name: str, which: int, device: str, generator: torch.Generator) -> None:
    """The plain formula runs, or PyTorch says that it has no derivative either."""
    tensors, call = function_arguments(name, device, generator)
    tensors = [t.double() for t in tensors]
    if (
        which in (1, 2)
        and name == "bn_scale"
        or which in (2, 3)
        and name == "bn_scale_cat"
        or which in (3, 4)
        and name == "conv_bn_scale"
        or "train" in name
    ):
        pytest.skip("of running statistics PyTorch's BatchNorm has no derivative")

    def of_one(t: Tensor) -> Any:
        return call(*tensors[:which], t, *tensors[which + 1 :])

    direction = torch.randn_like(tensors[which])
    value, tangent = torch.func.jvp(of_one, (tensors[which],), (direction,))
    step = 1e-6
    ahead, behind = of_one(tensors[which] + step * direction), of_one(tensors[which] - step * direction)
    if name == "fold_bn":
        ahead, behind, tangent = torch.cat(ahead), torch.cat(behind), torch.cat(tangent)
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bn_scale", "scale_shift"])
def test_out_that_requires_grad_is_refused(name: str, device: str, generator: torch.Generator) -> None:
    tensors, _ = function_arguments(name, device, generator)
    out = torch.zeros_like(tensors[0], requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name}: out requires grad"):
        getattr(fcb, name)(*tensors[:3], out=out)
    assert not out.any()


@pytest.mark.parametrize("write", ["scale_shift_", "bn_scale_", "scale_shift.out", "bn_scale.out"])
def test_writes_count_as_modifications(write: str, device: str, generator: torch.Generator) -> None:
    """As with PyTorch's in-place ops: autograd raises where it saved what was overwritten, also under no_grad."""
    name, _, out = write.partition(".")
    tensors, _ = function_arguments(name, device, generator)
    saved = tensors[0].requires_grad_().sigmoid()
    with torch.no_grad():
        if out:
            getattr(fcb, name)(saved.clone(), *tensors[1:3], out=saved)
        else:
            getattr(fcb, name)(saved, *tensors[1:3])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize(
    "name",
    [
        "fold_bn",
        "bn_scale",
        "scale_shift",
        "conv_scale_shift",
        "conv_bn_scale",
        "bn_scale_train",
        "conv_bn_scale_train",
    ],
)
def test_raw_ops_warn_in_backward(name: str, device: str, generator: torch.Generator) -> None:
    """PyTorch's fallback for ops without a derivative: the gradient is missing, and a warning says so."""
    tensors, _ = function_arguments(name, device, generator)
    tensors[0].requires_grad_()
    window = ([1], [1], [1], 1) if name.startswith("conv") else ()
    numbers = (1.7, 0.1, 1e-5) if name.endswith("train") else (1.7, 1e-5) if name == "conv_bn_scale" else ()
    count = {"scale_shift": 3, "bn_scale_train": 5, "conv_bn_scale": 7, "conv_bn_scale_train": 7}.get(name, 4)
    y = getattr(OPS, name)(*tensors[:count], *numbers, *window)
    y = y[0] if isinstance(y, tuple) else y
    assert y.requires_grad
    with pytest.warns(UserWarning, match=f"fused_conv_bn::{name}: an autograd kernel was not registered"):
        y.sum().backward()
    assert tensors[0].grad is None


@pytest.mark.parametrize("write", ["scale_shift_", "bn_scale_", "scale_shift.out", "bn_scale.out"])
def test_raw_ops_that_write_are_invisible_to_autograd(write: str, device: str, generator: torch.Generator) -> None:
    """Ops that return nothing pass PyTorch's fallback by: no warning, no graph, no new version. Hence the functions."""
    name, _, out = write.partition(".")
    tensors, _ = function_arguments(name, device, generator)
    x, per_channel = tensors[0], [t.requires_grad_() for t in tensors[1:3]]
    version = x._version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if out:
            getattr(OPS, name).out(x.clone(), *per_channel, out=x)
        else:
            getattr(OPS, name)(x, *per_channel)
    assert not x.requires_grad and x._version == version
