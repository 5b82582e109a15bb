"""Situations in which users of such packages have been let down. One test for each kind, named by the public report's id.

"Plain" is ``bn(conv(x)) * factor`` with the same modules. What a kind has in several forms is tested in several.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_conv_bn as fcb
from common import DTYPES, error, random_bn

C, K = 4, 6
pytestmark = pytest.mark.usefixtures("no_leftover_graphs")


def module(device: str = "cpu", *args: Any, **kwargs: Any) -> fcb.ConvBnScale2d:
    """In evaluation mode, with random statistics and affine parameters: a fresh BatchNorm is almost the identity."""
    torch.manual_seed(0)
    m = fcb.ConvBnScale2d(*(args or (C, K, 3)), **{"scaling_factor": 1.7, **kwargs})
    values = random_bn(m.bn.num_features, torch.float32, "cpu", torch.Generator().manual_seed(2))
    for target, value in zip((m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias), values, strict=True):
        if target is not None:
            target.data.copy_(value)
    return m.to(device).eval()


def plain(m: fcb.ConvBnScale2d, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) * m.scaling_factor


def sample(device: str = "cpu", *size: int) -> Tensor:
    return torch.randn(*(size or (2, C, 9, 9)), generator=torch.Generator().manual_seed(1)).to(device)


def check(m: fcb.ConvBnScale2d, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(m(x), plain(m, x), rtol=1e-4, atol=1e-4)


def child(code: str, **environment: str) -> None:
    """In a process of its own, which has this repository's package or whatever is installed."""
    source = str(Path(fcb.__file__).parents[1])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert run.returncode == 0, run.stderr[-2000:]


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.fused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "fused_conv_bn" in func.name():
            self.fused.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("mode", ["eval", "train then eval"])
def test_c02_fused_optimisers(optimizer: Any, mode: str, device: str) -> None:
    m, x = module(device), sample(device)
    steps = optimizer(m.parameters(), lr=0.001, fused=True)
    for _ in range(3):
        check(m, x)
        m.train(mode != "eval")
        m(x).square().mean().backward()  # a sum diverges, and so do roundings
        steps.step()
        m.eval()
        check(m, x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_c03_jit_trace(grad: bool, mode: bool, device: str) -> None:
    m, x = module(device).train(mode), sample(device)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(m, x, check_trace=False)
    assert "fused_conv_bn::" not in str(traced.inlined_graph)
    twin = copy.deepcopy(m)
    torch.testing.assert_close(traced(x), plain(twin, x))


def test_c03_jit_trace_of_functions(device: str) -> None:
    x, bn = sample(device), [t.to(device) for t in random_bn(C, torch.float32, "cpu", torch.Generator())]
    traced = torch.jit.trace(lambda t: fcb.bn_scale(t, *bn, activation="silu"), x)
    torch.testing.assert_close(traced(x * 2), fcb.bn_scale(x * 2, *bn, activation="silu"))


def test_c04_traced_parameters_stay_live(device: str) -> None:
    m, x = module(device), sample(device)
    with torch.no_grad():
        m(x)
        traced = torch.jit.trace(m, x)
        for p in (*traced.parameters(), *traced.buffers()):
            if p.is_floating_point():
                p.mul_(2)
        torch.testing.assert_close(traced(x), plain(m, x))
        assert traced.double()(x.double()).dtype == torch.float64
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(x.double()), plain(copy.deepcopy(m).double(), x.double()))


@pytest.mark.parametrize("grad", [False, True])
def test_c05_compile_without_running_statistics(grad: bool, device: str) -> None:
    x = sample(device)
    m = fcb.ConvBnScale2d(C, K, 3, 1.7, track_running_stats=False, device=device)
    with torch.set_grad_enabled(grad):
        for mode in (False, True):
            m.train(mode)
            torch.testing.assert_close(torch.compile(m, fullgraph=True)(x), plain(m, x), rtol=1e-4, atol=1e-4)
        function = torch.compile(lambda t: fcb.bn_scale_train(t, None, None), fullgraph=True)
        torch.testing.assert_close(function(x), F.batch_norm(x, None, None, training=True), rtol=1e-4, atol=1e-4)


def test_c06_replaced_forward(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def circular(i: Tensor, w: Tensor, b: Any) -> Tensor:
        return F.conv2d(F.pad(i, (1, 1, 1, 1), mode="circular"), w, b)

    m, x = module(device, C, K, 3, padding=1), sample(device)
    zeros = m(x)
    m.conv._conv_forward = circular
    check(m, x)
    assert error(m(x), zeros) > 0.01
    old = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda s, t: old(s, t) + 1)
    m = module(device)
    check(m, x)
    monkeypatch.undo()
    with torch.no_grad(), Log() as log:
        m(x)
    assert log.fused


def test_c07_global_hooks(device: str) -> None:
    m, x = module(device), sample(device)
    for register in ("register_module_forward_hook", "register_module_forward_pre_hook"):
        seen: list[str] = []
        handle = getattr(nn.modules.module, register)(lambda k, *a, s=seen: s.append(type(k).__name__))
        for mode in (False, True):
            m.train(mode)(x)
        handle.remove()
        assert sorted(seen) == ["BatchNorm2d"] * 2 + ["Conv2d"] * 2 + ["ConvBnScale2d"] * 2


@pytest.mark.parametrize("groups", [1, 2])
def test_c07_flop(groups: int, device: str) -> None:
    """As many as PyTorch's convolution has, in evaluation and training, with and without a graph."""
    m, x = module(device, C, K, 3, stride=2, padding=1, groups=groups), sample(device)
    with FlopCounterMode(display=False) as expected, torch.no_grad():
        m.conv(x)
    for mode in (False, True):
        for grad in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                m.train(mode)(x)
            assert counter.get_total_flops() == expected.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter:
        fcb.conv_scale_shift(x, m.conv.weight.detach(), None, None, 2, 1, 1, groups)
    assert counter.get_total_flops() == expected.get_total_flops()


def test_c07_flop_counter_imported_later() -> None:
    child("""
import sys, torch, fused_conv_bn as fcb
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
m = fcb.ConvBnScale2d(4, 6, 3).eval()
with FlopCounterMode(display=False) as c, torch.no_grad(): m(torch.randn(2, 4, 9, 9))
assert c.get_total_flops() == 42336, c.get_total_flops()""")


@pytest.mark.parametrize("collective", ["broadcast(t, 0)", "all_reduce(t)"])
def test_c08_collectives(collective: str) -> None:
    """They write without raising a version."""
    child(f"""
import os, torch, fused_conv_bn as fcb, torch.distributed as d, tempfile
torch.set_grad_enabled(False); torch.set_num_threads(1)
f = tempfile.mktemp(); r = int(os.fork() == 0)
d.init_process_group('gloo', init_method='file://' + f, rank=r, world_size=2)
torch.manual_seed(r); m = fcb.ConvBnScale2d(4, 6, 3).eval(); x = torch.randn(2, 4, 9, 9)
for t in (m.bn.running_mean, m.bn.running_var, m.conv.weight, m.bn.bias):
    t.data.uniform_(0.5, 1); m(x); d.{collective}
    bad = (m(x) - m.bn(m.conv(x))).abs().max().item() > 1e-4
    if bad: break
d.barrier(); ok = os._exit(bad) if r else None; s = os.wait()[1]
assert not bad and s == 0, 'stale after a collective'""")


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda t: t.numpy().fill(7),
    "data": lambda t: t.data.mul_(3),
    "dlpack": lambda t: torch.from_dlpack(t).mul_(3),
    "another storage": lambda t: t.set_(torch.rand(K) + 1),
    "inference mode": lambda t: torch.inference_mode()(t.mul_)(3),
}


@pytest.mark.parametrize("how", WRITES)
def test_c11_writes_that_raise_no_version(how: str) -> None:
    m, x = module(), sample()
    for t in (m.bn.running_mean, m.bn.running_var, m.bn.weight.detach(), m.conv.bias.detach()):
        before = m(x).detach()
        if how == "another storage" and t.data_ptr() in (m.bn.weight.data_ptr(), m.conv.bias.data_ptr()):
            continue  # detach() is a tensor of its own
        with torch.no_grad():
            WRITES[how](t)
        check(m, x)
        assert error(m(x), before) > 1e-3


def test_c11_batch_norm_elsewhere(device: str) -> None:
    m, x = module(device), sample(device)
    check(m, x)
    F.batch_norm(torch.randn(9, K, device=device) * 5 + 4, m.bn.running_mean, m.bn.running_var, training=True)
    check(m, x)


@pytest.mark.parametrize("residual", [False, True])
def test_c12_fx_trace(residual: bool, device: str) -> None:
    m, x = module(device, activation="silu"), sample(device)
    graph = torch.fx.symbolic_trace(nn.Sequential(m) if not residual else m)
    kinds = [type(graph.get_submodule(n.target)).__name__ for n in graph.graph.nodes if n.op == "call_module"]
    assert kinds == ["Conv2d", "BatchNorm2d"]
    arguments = (x, torch.ones(2, K, 7, 7, device=device)) if residual else (x,)
    with torch.no_grad():
        torch.testing.assert_close(graph(*arguments), m(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="onnxscript is not installed")
def test_c13_onnx() -> None:
    m = module().requires_grad_(False)
    program = torch.onnx.export(m, (sample(),), dynamo=True, verbose=False)
    assert program is not None and "Conv" in {n.op_type for n in program.model.graph}


@pytest.mark.parametrize("activation", fcb.reference.ACTIVATIONS)
def test_c14_jit_script(activation: str, device: str) -> None:
    for factor in (1.7, torch.tensor(1.7, device=device), nn.Parameter(torch.tensor(1.7))):
        m, x = module(device, activation=activation, scaling_factor=factor), sample(device)
        residual = torch.ones(2, K, 7, 7, device=device)
        whole = torch.jit.script(nn.Sequential(m))
        scripted = whole[0]
        assert list(scripted.state_dict()) == list(m.state_dict()) and not scripted.training
        for arguments in ((x,), (x, residual)):
            torch.testing.assert_close(scripted(*arguments), m(*arguments), rtol=1e-4, atol=1e-4)
        buffer = io.BytesIO()
        torch.jit.save(whole, buffer)
        assert b"fused_conv_bn::" not in buffer.getvalue()


def test_c15_meta() -> None:
    for mode in (False, True):
        for grad in (False, True):
            m = fcb.ConvBnScale2d(C, K, 3, device="meta", activation="relu").train(mode)
            with torch.set_grad_enabled(grad):
                assert m(torch.empty(2, C, 9, 9, device="meta")).shape == (2, K, 7, 7)


def test_c16_transforms_in_training(device: str) -> None:
    x = sample(device)
    untracked = fcb.ConvBnScale2d(C, K, 3, 1.7, track_running_stats=False, device=device)
    with torch.no_grad():
        batched = torch.vmap(untracked)(torch.stack([x, x * 2]))
        torch.testing.assert_close(batched[1], plain(untracked, x * 2), rtol=1e-4, atol=1e-4)
        m = module(device).train()
        twin, third = copy.deepcopy(m), copy.deepcopy(m)
        torch.testing.assert_close(torch.func.functionalize(m)(x), plain(twin, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(m.bn.running_mean, twin.bn.running_mean)
        region = torch.compiler.nested_compile_region(lambda t: third(t))
        got = torch.compile(lambda t: region(t) + region(t * 2), backend="aot_eager")(x)
        expected = plain(m, x) + plain(m, x * 2)
        assert got.shape == expected.shape


def test_c17_dtensor() -> None:
    child("""
import tempfile, torch, fused_conv_bn as fcb, torch.distributed as d
from torch.distributed.tensor import init_device_mesh, distribute_module, distribute_tensor, Shard
d.init_process_group('gloo', init_method='file://' + tempfile.mktemp(), rank=0, world_size=1)
k = init_device_mesh('cpu', (1,))
m = fcb.ConvBnScale2d(4, 6, 3).eval(); x = torch.randn(2, 4, 9, 9); expected = m(x).detach()
m = distribute_module(m, k)
for grad in (False, True):
    with torch.set_grad_enabled(grad):
        y = m(distribute_tensor(x, k, [Shard(0)]))
        assert torch.allclose(y.to_local(), expected, atol=1e-4)
y.sum().backward(); assert m.conv.weight.grad is not None""")


def test_c18_mkldnn() -> None:
    with torch.no_grad():
        m, x = module(scaling_factor=1.0), sample()
        torch.testing.assert_close(m(x.to_mkldnn()).to_dense(), plain(m, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1280, 7, 7), (4, 100000), (64, 1280), (8, 512, 4, 4)], ids=str)
def test_c19_statistics_of_short_planes(shape: tuple[int, ...]) -> None:
    """At most half as long again as eager, so that a busy machine does not fail it. The benchmark holds it to less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(shape)
        bn = [torch.rand(shape[1]) + 1 for _ in range(4)]

        def seconds(f: Callable[[], Any]) -> float:
            start = time.perf_counter()
            f()
            return time.perf_counter() - start

        calls = (lambda: F.batch_norm(x, *bn, True) * 1.7), (lambda: fcb.bn_scale_train(x, *bn, 1.7))
        eager, ours = (min(times) for times in zip(*[[seconds(f) for f in calls] for _ in range(300)], strict=True))
        assert ours < 1.5 * eager
    finally:
        torch.set_num_threads(threads)


def test_c20_lazy_modules(device: str) -> None:
    x = sample(device)
    for mode in (False, True):
        m = fcb.ConvBnScale2d.from_modules(nn.LazyConv2d(K, 3, device=device), nn.LazyBatchNorm2d(device=device), 2.0)
        m.train(mode)
        first = m(x)
        assert type(m.conv) is nn.Conv2d and type(m.bn) is nn.BatchNorm2d
        torch.testing.assert_close(m(x), first)
        with Log() as log:
            m(x)
        assert log.fused


def test_c21_in_place_views(device: str) -> None:
    """Views that PyTorch computes on lazily, and tensors without elements."""
    ones = torch.ones(C, device=device)
    for f, arguments in ((fcb.bn_scale_, (ones * 2, ones * 3)), (fcb.scale_shift_, (ones * 2, ones))):
        for activation in ("none", "relu"):
            view = torch.randn(2, C, 3, dtype=torch.cfloat, device=device).conj().imag
            assert view.is_neg()
            expected = getattr(fcb, f.__name__[:-1])(view.resolve_neg().clone(), *arguments, activation=activation)
            assert f(view, *arguments, activation=activation) is view
            torch.testing.assert_close(view.resolve_neg(), expected)
            out = torch.randn(2, C, 3, dtype=torch.cfloat, device=device).conj().imag
            getattr(fcb, f.__name__[:-1])(view, *arguments, out=out)
        for empty in (
            torch.empty(2, C, 0, 3).to(memory_format=torch.channels_last),
            torch.empty(0, C, 2, 3),
            torch.empty(2, C, 0),
            torch.empty(0, C).expand(0, C),
        ):
            assert f(empty.to(device), *arguments).shape == empty.shape


@pytest.mark.parametrize("grad", [False, True])
def test_c22_saved_program_needs_nothing(grad: bool, tmp_path: Path) -> None:
    file = tmp_path / "m.pt2"
    with torch.set_grad_enabled(grad):
        torch.export.save(torch.export.export(module(activation="gelu"), (sample(),)), file)
    expected = tmp_path / "y.pt"
    torch.save((sample(), module(activation="gelu")(sample()).detach()), expected)
    child(f"""
import sys, torch
x, y = torch.load({str(expected)!r})
assert torch.allclose(torch.export.load({str(file)!r}).module()(x), y, atol=1e-4)
assert "fused_conv_bn" not in sys.modules""")


@pytest.mark.parametrize("value", [None, 3, "x"])
def test_c25_no_tensor_where_one_is_expected(value: Any) -> None:
    """One sentence, which names the argument."""
    x, w, v = torch.randn(2, C, 5, 5), torch.randn(C, C, 3, 3), torch.ones(C)
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "fold_bn": (fcb.fold_bn, {"running_mean": v, "running_var": v}),
        "bn_scale": (fcb.bn_scale, {"input": x, "running_mean": v, "running_var": v}),
        "bn_scale_": (fcb.bn_scale_, {"input": x, "running_mean": v, "running_var": v}),
        "scale_shift": (fcb.scale_shift, {"input": x}),
        "conv_scale_shift": (fcb.conv_scale_shift, {"input": x, "weight": w}),
        "conv_bn_scale": (fcb.conv_bn_scale, {"input": x, "conv_weight": w, "running_mean": v, "running_var": v}),
        "bn_scale_train": (fcb.bn_scale_train, {"input": x}),
        "conv_bn_scale_train": (fcb.conv_bn_scale_train, {"input": x, "conv_weight": w}),
    }
    missing = {
        "scale_shift": ("scale", "shift"),
        "conv_scale_shift": ("scale", "shift"),
        "conv_bn_scale": ("conv_bias",),
    }
    missing |= {"bn_scale_train": ("running_mean", "running_var")}
    missing |= {"conv_bn_scale_train": ("conv_bias", "running_mean", "running_var")}
    for name, (f, arguments) in calls.items():
        rest = dict.fromkeys(missing.get(name, ()))
        for wrong in (*arguments, *(rest if value is not None else ())):
            kind = "None" if value is None else f"of type {type(value).__name__}"
            for grad in (False, True):
                with (
                    torch.set_grad_enabled(grad),
                    pytest.raises(TypeError, match=f"^{name}: {wrong} is {kind}, expected a"),
                ):
                    f(**{**arguments, **rest, wrong: value})


@pytest.mark.parametrize("channels", [8, 32])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_c26_fast_with_grad_mode_on(channels: int, activation: str, device: str) -> None:
    """Parameters require gradients and nobody calls backward: our ops run, and the graph is there if somebody does."""
    m = module(device, channels, 64, 3, activation=activation)
    x = sample(device, 2, channels, 24, 24)
    for mode in (False, True):
        m.train(mode)
        with Log() as log:
            y = m(x)
        assert len(log.fused) == 1 and y.requires_grad
        y.sum().backward()
        assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize("isa", ["", "AVX2", "SSE41"])
def test_c27_shift_beside_small_sums(isa: str) -> None:
    """Some CPU libraries add a bias before the products, where small sums lose their digits."""
    child(
        """
import torch, copy, fused_conv_bn as fcb
torch.set_grad_enabled(False); torch.manual_seed(0); torch.set_num_threads(1)
for channels, kernel in ((10, 5), (3, 3), (40, 1)):
    for dtype in (torch.float32, torch.float64):
        m = fcb.ConvBnScale2d(channels, 24, kernel).eval(); m.bn.bias.normal_().mul_(30)
        x = torch.randn(2, channels, 20, 20)
        if dtype == torch.float32:
            d = copy.deepcopy(m).double(); t = d.bn(d.conv(x.double()))
            o, e = ((y - t).norm() / t.norm() for y in (m(x), m.bn(m.conv(x))))
            assert o <= 2 * e + 2**-25, f'error {o / e:.1f}x eager'
        else:
            m, x = m.double(), x.double(); o, e = m(x), m.bn(m.conv(x)); r = (o - e).norm() / e.norm() * 2**53
            assert r < 6, f'{r:.1f} roundings from eager'""",
        **({"ONEDNN_MAX_CPU_ISA": isa} if isa else {}),
    )


def test_old_pickles(device: str) -> None:
    """Of modules that kept folded tensors, and had no slope."""
    m, x = module(device), sample(device)
    state = m.__getstate__() if hasattr(m, "__getstate__") else vars(m)
    old = {k: v for k, v in dict(state).items() if k not in ("negative_slope", "residual_last")}
    fresh = fcb.ConvBnScale2d.__new__(fcb.ConvBnScale2d)
    fresh.__setstate__({**old, "_folded": None, "_prepared": None})
    check(fresh, x)
    assert "_folded" not in vars(fresh) and fresh.negative_slope == 0.01 and not fresh.residual_last


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_in_every_mode(dtype: torch.dtype, device: str) -> None:
    m, x = module(device).to(dtype), sample(device).to(dtype)
    for mode in (False, True):
        m.train(mode)
        twin = copy.deepcopy(m)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                tolerance = max(1e-4, 8 * DTYPES[dtype])
                torch.testing.assert_close(m(x), plain(twin, x), rtol=tolerance, atol=tolerance)
