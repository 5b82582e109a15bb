"""The emulator's copies of boxes of tensors, and products of swizzled operands: what they do, and what they find."""

import ctypes
import math

import pytest
import torch
from torch.nn import functional as F

import emulated


def numbers(*values):
    return (ctypes.c_int * len(values))(*values)


def pointer(x):
    return ctypes.c_void_p(None if x is None else x.data_ptr())


# ---- products --------------------------------------------------------------------------------------------------------


def box_product(a, b, row_bytes, mistake="none"):
    y = torch.full((a.size(0), b.size(0)), math.nan, dtype=torch.float16)
    sizes = (a.size(0), b.size(0), a.size(1), row_bytes)
    emulated._call(90, "emulated_box_product", *map(pointer, (a, b, y)), *map(ctypes.c_int, sizes), mistake.encode())
    return y


def operands(m, n, k):
    return torch.randn(m, k).half(), torch.randn(n, k).half()


# Whole tiles; and rows, columns and values of k that end within one.
@pytest.mark.parametrize("sizes", [(64, 64, 64), (128, 192, 320), (70, 136, 200), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("row_bytes", [128, 64, 32])
def test_products_of_boxes(sizes, row_bytes):
    torch.manual_seed(row_bytes)
    a, b = operands(*sizes)
    for _ in range(4):  # orders of events
        expected = (a.double() @ b.double().T).half()
        torch.testing.assert_close(box_product(a, b, row_bytes), expected, rtol=2**-10, atol=1e-3)


RACE = "nothing orders it behind the|which a copy or product under way is to|which a copy under way is to"
MISTAKES = {
    "read_before_barrier": f"(read|write) of byte .*({RACE})|nobody has waited for the one before",
    "stage_released_early": f"write of byte .*({RACE})",
    "products_not_awaited": f"write of byte .*({RACE})",
    "stage_not_awaited": f"write of byte .*({RACE})|nobody has waited for the one before|more arrivals",
    "no_fence": "asynchronous read of byte .* which thread .* has written without a fence.proxy.async behind it",
    "store_overwritten": "write of byte .*, which a copy or product under way is to read",
    "store_not_awaited": "thread 0 has ended while its bulk copies may still read shared memory",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_with_boxes_are_found(mistake):
    torch.manual_seed(0)
    a, b = operands(64, 128, 512)
    for _ in range(10):
        with pytest.raises(emulated.RuleBroken, match=MISTAKES[mistake]):
            box_product(a, b, 128, mistake)


def test_sums_of_products_under_way_are_not_there_yet():
    torch.manual_seed(0)
    a, b = operands(64, 64, 512)
    expected = (a.double() @ b.double().T).half()
    differ = [not torch.allclose(box_product(a, b, 128, "sums_read_early"), expected, rtol=0.01) for _ in range(10)]
    assert any(differ)


# ---- boxes -----------------------------------------------------------------------------------------------------------


def box_copy(x, y, box, at, to, row_bytes, offset=0):
    """Of the last dimensions of x, the fastest first; what came to shared memory."""
    raw = torch.full(tuple(reversed(box)), math.nan, dtype=x.dtype)
    sizes, box, at = ([*values, 1][:3] for values in (reversed(x.shape), box, at))
    emulated._call(
        *(90, "emulated_box_copy", *map(pointer, (x, y, raw)), x.dim(), numbers(*sizes)),
        *(x.stride(-2) * 2, numbers(*box), numbers(*at, *to, offset), row_bytes),
    )
    return raw


def padded(shape, pitch):
    return torch.randn(*shape[:-1], pitch).bfloat16()[..., : shape[-1]]


def cut(x, box, at):
    """A box of x, and zeros outside of it."""
    wide = F.pad(x, [n for n in box for _ in range(2)])
    for dimension, (n, first) in enumerate(zip(box, at, strict=True), 1):
        wide = wide.narrow(x.dim() - dimension, max(0, min(first + n, x.size(-dimension) + n)), n)
    return wide


PLACES = [(0, 0, 0), (3, 1, 1), (-5, -2, -1), (30, 15, 4), (-64, 0, 0), (16, 100, 0), (1, 0, -1)]


@pytest.mark.parametrize("row_bytes", [128, 64, 32, 0])
@pytest.mark.parametrize("at", PLACES, ids=str)
def test_boxes_reach_over_the_edges(at, row_bytes):
    torch.manual_seed(1)
    row = (row_bytes or 48) // 2
    x = padded((21, 43), 48)
    y = padded((21, 43), 48)
    box, to = (row, 9), (at[1] - 2, at[0] - 3)
    before = y.clone()
    raw = box_copy(x, y, box, at[:2], to, row_bytes)
    assert torch.equal(raw, cut(x, box, at[:2]))
    expected = before.clone()
    for i in range(box[1]):
        for j in range(box[0]):
            if 0 <= to[1] + i < y.size(0) and 0 <= to[0] + j < y.size(1):
                expected[to[1] + i, to[0] + j] = raw[i, j]
    assert torch.equal(y, expected)

    x = padded((5, 17, 43), 56)
    box = (row, 4, 3)
    assert torch.equal(box_copy(x, None, box, at, (0, 0), row_bytes), cut(x, box, at))


@pytest.mark.parametrize("row_bytes", [128, 64, 32, 0])
def test_boxes_lie_at_the_alignment_of_their_swizzle(row_bytes):
    x, row, alignment = torch.zeros(8, 64).bfloat16(), (row_bytes or 64) // 2, max(8 * row_bytes, 128)
    with pytest.raises(emulated.RuleBroken, match=f"shared memory, which is no multiple of {alignment}"):
        box_copy(x, x, (row, 8), (0, 0), (0, 0), row_bytes, alignment // 2)


def test_a_box_narrower_than_its_swizzle_is_not_emulated():
    with pytest.raises(emulated.RuleBroken, match="rows of 32 bytes, swizzled over 64: not emulated"):
        box_copy(torch.zeros(8, 64).bfloat16(), torch.zeros(8, 64).bfloat16(), (16, 8), (0, 0), (0, 0), 64)


# ---- im2col ----------------------------------------------------------------------------------------------------------


def im2col(x, kernel, stride, front, behind, dilation, tile, off=0):
    N, C, H, W = x.shape
    P, Q = (
        (size + f + b - (k - 1) * d - 1) // s + 1
        for size, f, b, k, d, s in zip((H, W), front, behind, kernel, dilation, stride, strict=True)
    )
    tiles, channels = -(-N * P * Q // tile), -(-C // 32) * 32
    y = torch.full((tiles * tile, *kernel, channels), math.nan, dtype=torch.float16)
    nhwc = x.permute(0, 2, 3, 1).contiguous()
    arguments = numbers(N, H, W, C, *kernel, *stride, *front, *behind, *dilation, tile, off)
    emulated._call(90, "emulated_im2col", pointer(nhwc), pointer(y), arguments)
    wide = F.pad(x.float(), (front[1], behind[1], front[0], behind[0]))
    patches = F.unfold(wide, kernel, dilation, 0, stride).view(N, C, *kernel, P * Q)
    expected = torch.zeros_like(y)
    expected[: N * P * Q, :, :, :C] = patches.permute(0, 4, 2, 3, 1).reshape(N * P * Q, *kernel, C).half()
    return y, expected


# Input; kernel, stride, padding in front and behind, dilation; pixels of a tile.
WINDOWS = {
    "1x1": ((2, 8, 5, 6), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 16),
    "3x3": ((2, 40, 6, 7), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 32),
    "no padding": ((3, 32, 6, 5), (3, 2), (1, 1), (0, 0), (0, 0), (1, 1), 13),
    "unequal padding": ((2, 8, 7, 6), (3, 4), (1, 1), (2, 0), (0, 3), (1, 1), 24),
    "stride 2": ((2, 8, 9, 8), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 16),
    "stride 2, odd": ((2, 8, 8, 9), (3, 3), (2, 2), (1, 0), (0, 1), (1, 1), 16),
    "1x1, stride 2": ((3, 8, 5, 6), (1, 1), (2, 2), (0, 0), (0, 0), (1, 1), 8),
    "unequal strides": ((2, 16, 9, 11), (2, 3), (1, 3), (1, 2), (0, 1), (1, 1), 10),
    "dilation": ((1, 8, 9, 12), (3, 3), (1, 1), (2, 3), (2, 3), (2, 3), 40),
    "dilation, stride 2": ((2, 72, 10, 9), (3, 2), (2, 1), (2, 1), (1, 2), (3, 2), 20),
    "all in one tile": ((3, 8, 2, 3), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1), 200),
    "more padding than the window": ((2, 8, 3, 3), (2, 2), (1, 1), (3, 4), (4, 3), (1, 1), 7),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_im2col_as_unfold_has_it(window):
    shape, *arguments = WINDOWS[window]
    torch.manual_seed(2)
    y, expected = im2col(torch.randn(shape).half(), *arguments)
    assert torch.equal(y, expected)


def test_pixels_outside_of_the_bounding_box_are_found():
    with pytest.raises(emulated.RuleBroken, match="pixels from -2 of dimension 1 on, .* outside .*, from -1 to 5"):
        im2col(torch.zeros(1, 8, 7, 7).half(), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 16, off=1)


# ---- maps ------------------------------------------------------------------------------------------------------------


TILED = dict(
    type=6, rank=3, swizzle=3, address=0, sizes=[100, 9, 7], strides=[208, 208 * 9], steps=[1, 1, 1], box=[64, 8, 2]
)
IM2COL = TILED | dict(
    rank=4,
    sizes=[100, 9, 8, 7],
    strides=[208, 208 * 9, 208 * 72],
    steps=[1, 1, 1, 1],
    box=[64, 128],
    lower=[-1, -2],
    upper=[1, 0],
)


def encode(rules, **changes):
    def five(values, n=5):
        return [*values, *[1] * n][:n]

    v = {"lower": [], "upper": [], **rules, **changes}
    flat = [v["type"], v["rank"], v["swizzle"], v["address"]]
    for name in ("sizes", "strides", "steps", "box"):
        flat += five(v[name])
    flat += five(v["lower"], 3) + five(v["upper"], 3)
    emulated._call(90, "emulated_encode", "lower" in rules, (ctypes.c_int64 * len(flat))(*flat))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(address=16),
        dict(type=9),
        dict(type=7, sizes=[52, 9, 7], box=[32, 8, 2]),
        dict(type=11, sizes=[52, 9, 7], box=[32, 8, 2]),
        dict(box=[8, 256, 256]),
        dict(swizzle=0, box=[256, 1, 1]),
        dict(swizzle=1, box=[16, 1, 1]),
        dict(steps=[1, 8, 2]),
        dict(sizes=[104, 9, 7]),
    ],
    ids=str,
)
def test_maps_that_the_driver_takes(changes):
    encode(TILED, **changes)


@pytest.mark.parametrize(
    "changes,fault",
    [
        (dict(address=8), "address is no multiple of 16"),
        (dict(rank=0), "rank"),
        (dict(rank=6), "rank"),
        (dict(sizes=[100, 0, 7]), "size"),
        (dict(strides=[200, 208 * 9]), "stride"),
        (dict(strides=[208, 2**40]), "stride"),
        (dict(strides=[192, 208 * 9]), "stride is less than a row"),
        (dict(box=[64, 257, 1]), "box"),
        (dict(box=[64, 0, 1]), "box"),
        (dict(box=[12, 1, 1]), "no multiple of 16"),
        (dict(box=[72, 1, 1]), "more bytes than its swizzle"),
        (dict(swizzle=2), "more bytes than its swizzle"),
        (dict(swizzle=1, box=[24, 1, 1]), "more bytes than its swizzle"),
        (dict(type=7), "stride is less than a row"),
        (dict(swizzle=4), "unknown"),
        (dict(steps=[1, 9, 1]), "element stride"),
        (dict(steps=[1, 0, 1]), "element stride"),
    ],
    ids=str,
)
def test_maps_that_the_driver_refuses(changes, fault):
    with pytest.raises(emulated.RuleBroken, match=f"a tensor map that the driver does not take: .*{fault}"):
        encode(TILED, **changes)


@pytest.mark.parametrize(
    "changes", [{}, dict(box=[64, 1024]), dict(lower=[-128, -128], upper=[127, 127]), dict(steps=[1, 2, 8, 1])], ids=str
)
def test_im2col_maps_that_the_driver_takes(changes):
    encode(IM2COL, **changes)


@pytest.mark.parametrize(
    "changes,fault",
    [
        (dict(rank=2), "rank"),
        (dict(box=[257, 1], swizzle=0), "channels per pixel"),
        (dict(box=[64, 1025]), "pixels per column"),
        (dict(box=[64, 0]), "pixels per column"),
        (dict(box=[72, 1]), "more bytes than its swizzle"),
        (dict(lower=[-129, 0]), "corner"),
        (dict(upper=[0, 128]), "corner"),
        (dict(lower=[4, 0], upper=[-5, 0]), "bounding box is empty"),
        (dict(steps=[1, 9, 1, 1]), "element stride"),
    ],
    ids=str,
)
def test_im2col_maps_that_the_driver_refuses(changes, fault):
    with pytest.raises(emulated.RuleBroken, match=f"a tensor map that the driver does not take: .*{fault}"):
        encode(IM2COL, **changes)
