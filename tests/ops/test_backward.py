"""bn_scale_backward in one op and in two, and bn_moments, against float64 and eager.

Truth is the twin in float64. Sums are held to twice eager's error, or to 2^-20 of the sum of their terms' magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES, SLOPE, error, long, random_bn
from elementwise_problems import EPS, FACTOR, LAYOUTS, SHAPES, arrange
from fused_conv_bn import reference
from train_problems import LONG_SHAPES, adds_in_float32, long_moments, values_per_channel

OPS = torch.ops.fused_conv_bn
KINDS = ("evaluation", "training", "pair")
"""bn_scale's affine, bn_scale_train's, and scale_shift's."""
FROM_RESULT = tuple(reference.FROM_RESULT)
TENSORS = ("input", "result", "residual", "mean", "var", "invstd", "weight", "bias", "conv_bias")
NEEDS = ("needs_input", "needs_weight", "needs_bias", "needs_conv_bias", "needs_residual")
EXACT_SIXTH = 1 / (6 * float(torch.tensor(1 / 6, dtype=torch.float32)))
"""PyTorch's hardsigmoid_backward has a float's sixth in it, also for float64."""
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS)

run: Callable[..., Any] = lambda *args, **named: OPS.bn_scale_backward(*args, **named)  # noqa: E731
"""What the tests call; the emulator's tests have another."""


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    activation: str,
    generator: torch.Generator,
    *,
    residual: bool = False,
    from_result: bool = False,
    device: str = "cpu",
    layout: str = "contiguous",
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """dy, and the tensors of TENSORS."""

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    channels = shape[1]
    wide = reference.wide(dtype)
    z, dy = draw() * 1.5 + 0.5, draw()
    added = draw() if residual else None
    mean, var, weight, bias = random_bn(channels, torch.float32, "cpu", generator)
    var = var + 0.1
    t: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
    t |= {"input": z, "residual": added}
    if kind == "evaluation":
        conv_bias = torch.randn(channels, generator=generator)
        t |= {"mean": mean, "var": var, "weight": weight, "bias": bias, "conv_bias": conv_bias}
        t = {k: v.to(dtype) if v is not None and v.dim() == 1 else v for k, v in t.items()}
    elif kind == "training":
        batch, invstd = reference.batch_statistics(z.double(), EPS)
        t |= {"mean": batch.to(wide), "invstd": invstd.to(wide), "weight": weight.to(dtype), "bias": bias.to(dtype)}
    else:
        t |= {"weight": weight.to(wide), "bias": bias.to(wide)}
    if from_result:
        y = forward(t, kind, activation)
        t |= {"result": y.to(dtype), "residual": None}
    arranged = {k: arrange(v.to(device), layout) if v is not None and v.dim() > 1 else v for k, v in t.items()}
    return arrange(dy.to(device), layout), {k: None if v is None else v.to(device) for k, v in arranged.items()}


def numbers(kind: str) -> tuple[float, float]:
    return (1.0, 0.0) if kind == "pair" else (FACTOR, EPS)


def forward(t: dict[str, Tensor | None], kind: str, activation: str) -> Tensor:
    d = {k: None if v is None else v.double() for k, v in t.items()}
    z = d["input"]
    assert z is not None
    factor, eps = numbers(kind)
    if kind == "pair":
        v = reference.scale_shift(z, d["weight"], d["bias"])
    else:
        if d["conv_bias"] is not None:
            z = z + reference.per_channel(d["conv_bias"], z.dim())
        training = kind == "training"
        bn = (None, None) if training else (d["mean"], d["var"])
        v = torch.nn.functional.batch_norm(z, *bn, d["weight"], d["bias"], training, 0.0, eps) * factor
    return reference.epilogue(v, d["residual"], activation, SLOPE)


def needs_of(kind: str, residual: bool) -> dict[str, bool]:
    return dict.fromkeys(NEEDS, True) | {"needs_conv_bias": kind == "evaluation", "needs_residual": residual}


def call(f: Callable[..., Any], dy: Tensor, t: dict[str, Tensor | None], kind: str, **named: Any) -> list[Any]:
    return list(f(dy, *(t[name] for name in TENSORS), *numbers(kind), negative_slope=SLOPE, **named))


def double(t: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: None if v is None else v.double().cpu() for k, v in t.items()}


def sizes_of_terms(dy: Tensor, t: dict[str, Tensor | None], kind: str, **named: Any) -> list[Tensor]:
    """Of the sums that dweight, dbias and dconv_bias are: the sums of their terms' magnitudes, as these are scaled."""
    d = double(t)
    named = named | dict.fromkeys(NEEDS, False) | {"needs_residual": True}
    dv = call(reference.bn_scale_backward, dy.double().cpu(), d, kind, **named)[4].abs()
    dv = dv.maximum(dy.double().cpu().abs())  # a derivative near 0 may be the difference of numbers near 1
    dims = [i for i in range(dv.dim()) if i != 1]
    factor, eps = numbers(kind)
    invstd = d["invstd"] if d["var"] is None else torch.rsqrt(d["var"] + eps)
    invstd = torch.ones(dv.size(1)).double() if invstd is None else invstd
    center = torch.zeros(dv.size(1)).double() if d["mean"] is None else d["mean"]
    if d["conv_bias"] is not None:
        center = center - d["conv_bias"]
    s1 = dv.sum(dims)
    z = d["input"]
    s2 = s1 if z is None else (dv * (z - reference.per_channel(center, dv.dim())).abs()).sum(dims)
    assert d["weight"] is not None
    return [s2 * invstd * factor, s1 * factor, s1 * invstd * factor * d["weight"].abs()]


def check(dy: Tensor, t: dict[str, Tensor | None], kind: str, got: list[Any], **named: Any) -> None:
    """Against the twin in float64, with the twin in the tensors' own dtypes as the yardstick."""
    truth = call(reference.bn_scale_backward, dy.double().cpu(), double(t), kind, **named)
    if named["activation"] == "hardsigmoid":
        truth = [None if g is None else g * EXACT_SIXTH for g in truth]
    narrow = (
        (dy.float(), {k: None if v is None else v.float() for k, v in t.items()})
        if dy.dtype == torch.float64
        else (dy, t)
    )
    eager = call(reference.bn_scale_backward, *narrow, kind, **named)
    sizes = sizes_of_terms(dy, t, kind, **named)
    u, wide = DTYPES[dy.dtype], DTYPES[reference.wide(dy.dtype)]
    for i, (ours, theirs, exact) in enumerate(zip(got, eager, truth, strict=True)):
        assert (ours is None) == (exact is None), NEEDS[i]
        if ours is None:
            continue
        if i in (0, 4):
            assert ours.dtype == dy.dtype
            eagers = error(theirs.cpu(), exact) / DTYPES[theirs.dtype]
            got_error = error(ours.cpu(), exact) / u
            few = 8 if dy.numel() < 100 or dy.dtype == torch.float64 else 4
            assert got_error <= (3 if dy.dtype == torch.float64 else 2) * eagers + few, (NEEDS[i], got_error, eagers)
            continue
        parameter = t[("weight", "bias", "conv_bias")[i - 1]]
        assert parameter is None or ours.dtype == parameter.dtype
        off = (ours.double().cpu() - exact).abs()
        allowed = 2 * (theirs.double().cpu() - exact).abs() + 2 * DTYPES[ours.dtype] * exact.abs()
        allowed += 16 * wide * sizes[i - 1]
        if u > wide and not dy.is_cuda:  # as eager the CPU keeps dv in 16 bits between its passes
            allowed += 4 * u * sizes[i - 1] / values_per_channel(dy.shape) ** 0.5
        assert (off <= allowed).all(), (NEEDS[i], (off / allowed).max())


@dtypes
@kinds
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(device, dtype, kind, activation, generator):
    """From the input with and without a residual, and from the result where that tells."""
    ways = [(False, False), (True, False)]
    if activation in FROM_RESULT:
        ways += [(False, True), (True, True)]
    for shape, layout in (((3, 8, 16, 16), "contiguous"), ((2, 16, 5, 6), "channels_last"), ((5, 7, 3, 3), "sliced")):
        for residual, from_result in ways:
            made = problem(
                *(shape, dtype, kind, activation, generator),
                residual=residual,
                from_result=from_result,
                device=device,
                layout=layout,
            )
            named = {"activation": activation, **needs_of(kind, residual)}
            check(*made, kind, call(run, *made, kind, **named), **named)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, dtype, layout, shape, generator):
    turn = SHAPES.index(shape) + LAYOUTS.index(layout)
    for i, (activation, residual, from_result) in enumerate(
        (("none", False, False), ("relu", True, True), ("silu", True, False), ("leaky_relu", False, False))
    ):
        kind = KINDS[(turn + i) % 3]
        if values_per_channel(shape) <= 2:  # where training leaves nothing of dz but eps
            kind = "evaluation" if kind == "training" else kind
        made = problem(
            *(shape, dtype, kind, activation, generator),
            residual=residual,
            from_result=from_result,
            device=device,
            layout=layout,
        )
        named = {"activation": activation, **needs_of(kind, residual)}
        saved = {k: None if v is None else v.clone() for k, v in made[1].items()}
        got = call(run, *made, kind, **named)
        check(*made, kind, got, **named)
        assert all(v is None or torch.equal(v, saved[k]) for k, v in made[1].items())
        # dz lies as what it is the gradient of, as eager's does.
        assert got[0].is_contiguous() or got[0].is_contiguous(memory_format=_last(got[0]))


def _last(x: Tensor) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_large_tensors(device, dtype, layout, shape, generator):
    made = problem(shape, dtype, "training", "gelu", generator, residual=True, device=device, layout=layout)
    named = {"activation": "gelu", **needs_of("training", True)}
    check(*made, "training", call(run, *made, "training", **named), **named)


@kinds
@pytest.mark.parametrize("activation", ["none", "relu", "mish"])
def test_each_gradient_alone(device, kind, activation, generator):
    made = problem((4, 6, 9, 10), torch.float32, kind, activation, generator, residual=True, device=device)
    everything = needs_of(kind, True)
    together = call(run, *made, kind, activation=activation, **everything)
    for i, name in enumerate(NEEDS):
        if not everything[name]:
            continue
        alone = call(run, *made, kind, activation=activation, **(dict.fromkeys(NEEDS, False) | {name: True}))
        assert [g is not None for g in alone] == [i == j for j in range(5)]
        torch.testing.assert_close(alone[i], together[i], rtol=1e-5, atol=1e-5)
    assert call(run, *made, kind, activation=activation) == [None] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@kinds
def test_16_bit_tensors_with_float32_parameters(device, dtype, kind, generator):
    dy, t = problem((4, 6, 9, 10), dtype, kind, "silu", generator, device=device)
    named = {"activation": "silu", **needs_of(kind, False)}
    mixed = {k: v.float() if v is not None and v.dim() == 1 and k in ("weight", "mean") else v for k, v in t.items()}
    for params in (mixed, {k: v.float() if v is not None and v.dim() == 1 else v for k, v in t.items()}):
        check(dy, params, kind, call(run, dy, params, kind, **named), **named)


@dtypes
@pytest.mark.parametrize("shape", [(5, 6, 9, 11), (40, 6, 2, 2), (3, 8, 40, 40), (33, 20), (33, 16)], ids=str)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_misaligned_memory(device, dtype, shape, offset, generator):
    """Views into buffers of NaN, which any read beyond them would bring into the sums; each at another offset."""
    for same in (True, False):
        dy, t = problem(shape, dtype, "training", "silu", generator, residual=True, device=device)

        def misaligned(x: Tensor, by: int) -> Tensor:
            buffer = torch.full((x.numel() + 64,), math.nan, device=device, dtype=dtype)
            view = buffer[by : by + x.numel()].view(x.shape)
            view.copy_(x)
            return view

        named = {"activation": "silu", **needs_of("training", True)}
        moved = {
            k: misaligned(v, offset if same else offset + 1 + i) if v is not None and v.dim() > 1 else v
            for i, (k, v) in enumerate(t.items())
        }
        dy = misaligned(dy, offset)
        check(dy, moved, "training", call(run, dy, moved, "training", **named), **named)


def test_expanded_gradients(device, generator):
    """As a sum's backward makes them."""
    _, t = problem((4, 6, 9, 10), torch.float32, "training", "silu", generator, device=device)
    dy = torch.full((1, 1, 1, 1), 0.5, device=device).expand(4, 6, 9, 10)
    named = {"activation": "silu", **needs_of("training", False)}
    check(dy, t, "training", call(run, dy, t, "training", **named), **named)


@kinds
@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3), (0, 5), (2, 0, 4)], ids=str)
def test_empty_tensors(device, kind, shape, generator):
    dy, t = problem(shape, torch.float32, "pair", "relu", generator, device=device)
    if kind == "training":
        t |= {"mean": torch.zeros(shape[1], device=device), "invstd": torch.ones(shape[1], device=device)}
    got = call(run, dy, t, kind, activation="relu", needs_input=True, needs_weight=True, needs_bias=True)
    assert got[0].shape == shape
    assert all(torch.equal(g, torch.zeros(shape[1], device=device)) for g in got[1:3])


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_values_that_are_not_finite(device, activation, generator):
    """NaN and infinities of dv are where eager has them."""
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 3.0, -3.0, 6.0, 1e30, -1e30]
    z = torch.tensor(values * 8, device=device).view(2, 1, 40)
    dy = torch.full_like(z, 0.5)
    ones = torch.ones(1, device=device)
    t: dict[str, Tensor | None] = dict.fromkeys(TENSORS) | {"input": z, "weight": ones}
    ours = call(run, dy, t, "pair", activation=activation, needs_input=True)[0]
    eager = reference.activation_backward(dy, z, activation, SLOPE) if activation != "none" else dy
    if activation in ("relu6", "hardswish"):  # NaN: PyTorch's vectorised CPU kernels and its others differ
        ours, eager = ours[~z.isnan()], eager[~z.isnan()]
    torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (-3e5, 1.0), (1.0, 1e-4)])
def test_a_mean_far_from_zero(device, layout, mean, deviation, generator):
    for shape in ((8, 5, 31, 33), (200, 40, 2, 2)):
        z = arrange((torch.randn(shape, generator=generator) * deviation + mean).to(device), layout)
        dy = arrange(torch.randn(shape, generator=generator).to(device), layout)
        batch, invstd = (s.float() for s in reference.batch_statistics(z.double(), EPS))
        _, _, weight, bias = random_bn(shape[1], torch.float32, device, generator)
        t = dict.fromkeys(TENSORS) | {"input": z, "mean": batch, "invstd": invstd, "weight": weight, "bias": bias}
        named = {"activation": "none", **needs_of("training", False)}
        check(dy, t, "training", call(run, dy, t, "training", **named), **named)


@pytest.mark.parametrize("shape", [(16, 30, 33, 35), (150, 48, 3, 3), (64, 512, 7, 7)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_the_same_bits_every_time(device, shape, layout, generator):
    made = problem(shape, torch.float32, "training", "silu", generator, device=device, layout=layout)
    named = {"activation": "silu", **needs_of("training", False)}
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            results.append(call(run, *made, "training", **named))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a is None or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- several processes -----------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments(device, dtype, layout, generator):
    for shape in [s for s in SHAPES if values_per_channel(s) > 1] + LONG_SHAPES[:3]:
        x = arrange((torch.randn(shape, generator=generator) * 2 + 3).to(device, dtype), layout)
        count, mean, m2 = OPS.bn_moments(x)
        exact, var, values = long_moments(long(x))
        u = 2.0**-50 if dtype == torch.float64 or not adds_in_float32(x) else 2.0**-22
        assert (count == values).all() and count.dtype == torch.float64
        assert (abs(long(mean) - exact) <= 64 * u * (abs(exact) + var**0.5)).all()
        assert (abs(long(m2) - var * values) <= 64 * u * var * values + 1e-30).all()
    assert torch.equal(OPS.bn_moments(torch.empty(0, 3, 4, device=device)), torch.zeros(3, 3, device=device).double())


@dtypes
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_a_batch_in_parts(device, dtype, activation, generator):
    """Each part has its sums; with those of all of them dz is what the op makes of the whole batch."""
    from_result = activation == "relu"
    dy, t = problem(
        *((9, 6, 7, 10), dtype, "training", activation, generator),
        residual=not from_result,
        from_result=from_result,
        device=device,
    )
    whole = call(run, dy, t, "training", activation=activation, **needs_of("training", not from_result))
    named = {"activation": activation, "negative_slope": SLOPE}
    parts = [
        (dy[a:b], *(None if t[k] is None else t[k][a:b] for k in ("input", "result", "residual")))
        for a, b in ((0, 2), (2, 9))
    ]
    bn = t["mean"], t["invstd"], t["weight"], t["bias"]
    gathered = [
        OPS.bn_scale_backward_sums(*part, *bn, FACTOR, **named, needs_weight=True, needs_bias=True) for part in parts
    ]
    for i in (1, 2):
        u = 8 * DTYPES[gathered[0][i].dtype]
        torch.testing.assert_close(sum(g[i] for g in gathered), whole[i], rtol=u, atol=64 * u)
    sums = gathered[0][0] + gathered[1][0]
    count = torch.full((1,), 9 * 70, device=device, dtype=torch.float64).expand(6)
    results = [
        OPS.bn_scale_backward_apply(*part, *bn, sums, count, FACTOR, **named, needs_residual=not from_result)
        for part in parts
    ]
    u = 8 * DTYPES[dtype]
    torch.testing.assert_close(torch.cat([r[0] for r in results]), whole[0], rtol=u, atol=u)
    if from_result:
        assert all(r[1] is None for r in results)
    else:
        torch.testing.assert_close(torch.cat([r[1] for r in results]), whole[4], rtol=u, atol=u)
    twin = [
        reference.bn_scale_backward_sums(*part, *bn, FACTOR, **named, needs_weight=True, needs_bias=True)
        for part in parts
    ]
    for a, b in zip(gathered, twin, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=64 * u, atol=64 * u)
    got = reference.bn_scale_backward_apply(*parts[1], *bn, sums, count, FACTOR, **named)[0]
    torch.testing.assert_close(got, results[1][0], rtol=4 * u, atol=4 * u)


# ---- errors ----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "input's shape": (
        r"input has shape \[2, 3, 4\], expected \[2, 3, 4, 5\], the shape of dy",
        {"input": torch.ones(2, 3, 4)},
    ),
    "residual's dtype": (
        "residual has dtype float16, expected float32, the dtype of dy",
        {"residual": torch.ones(2, 3, 4, 5).half()},
    ),
    "weight's shape": (
        r"weight has shape \[4\], expected \[3\], one element for each channel of dy",
        {"weight": torch.ones(4)},
    ),
    "activation": ("activation is 'elu', expected one of 'none', 'relu'", {"activation": "elu"}),
    "result of silu": (
        "result is given with activation 'silu', expected it with 'relu', 'sigmoid' or 'tanh' alone",
        {"result": torch.ones(2, 3, 4, 5), "activation": "silu"},
    ),
    "result and residual": (
        "residual is given beside result, expected one of them",
        {"result": torch.ones(2, 3, 4, 5), "residual": torch.ones(2, 3, 4, 5), "activation": "relu"},
    ),
    "both deviations": ("var is given beside invstd, expected one of them", {"invstd": torch.ones(3)}),
    "no mean": ("mean is missing, expected one beside invstd", {"invstd": torch.ones(3), "var": None, "mean": None}),
    "no deviation": ("invstd is missing, expected one beside mean", {"var": None}),
    "no input for weight": ("input is missing, expected it for the gradient of weight", {"input": None}),
    "no input for silu": (
        "input is missing, expected it for the derivative of the activation",
        {"input": None, "activation": "silu", "needs_weight": False},
    ),
    "eps": ("eps is -1, expected 0 or more", {"eps": -1.0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    message, spoil = BAD[case]
    c = torch.ones(3)
    t = dict.fromkeys(TENSORS) | {"input": torch.ones(2, 3, 4, 5), "mean": c, "var": c, "weight": c}
    arguments: dict[str, Any] = {"dy": torch.ones(2, 3, 4, 5), **t, "scaling_factor": 1.0, "eps": 1e-5}
    arguments |= {"needs_input": True, "needs_weight": True} | spoil
    with pytest.raises(RuntimeError, match=f"^bn_scale_backward: {message}"):
        OPS.bn_scale_backward(**arguments)


def test_bad_sums_are_named():
    x, c = torch.ones(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"^bn_scale_backward_apply: sums has shape \[3, 2\] and dtype float64"):
        OPS.bn_scale_backward_apply(x, x, None, None, c, c, c, c, torch.ones(3, 2).double(), c.double(), 1.0)
    with pytest.raises(RuntimeError, match="^bn_scale_backward_apply: count has dtype float32, expected float64"):
        OPS.bn_scale_backward_apply(x, x, None, None, c, c, c, c, torch.ones(2, 3).double(), c, 1.0)
    with pytest.raises(RuntimeError, match=r"^bn_moments: input has shape \[3\], expected 2 to 5 dimensions"):
        OPS.bn_moments(c)
