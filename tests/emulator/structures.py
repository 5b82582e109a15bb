"""What the emulator's library takes (library.cu), field by field."""

from __future__ import annotations

import ctypes

AFFINE = ("mean", "var", "weight", "bias", "conv_bias")


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "N C H W K R S P Q".split()),
        *((f"{name}_{side}", ctypes.c_int64) for name in ("stride", "pad", "dilation") for side in "hw"),
        ("groups", ctypes.c_int64),
        ("element_bytes", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("channels_last", "has_residual", "allow_tf32")),
    ]


class Whole(ctypes.Structure):
    """A problem of 1 to 3 dimensions, of which the library makes the above."""

    _fields_ = [
        ("space", ctypes.c_int),
        *((name, ctypes.c_int64) for name in "N C K groups".split()),
        *((name, ctypes.c_int64 * 3) for name in "input filter output stride padding dilation".split()),
        ("element_bytes", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("channels_last", "has_residual", "allow_tf32")),
    ]


class Affine(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in AFFINE),
        *((name, ctypes.c_double) for name in ("scaling_factor", "eps")),
        ("wide", ctypes.c_bool),
    ]


class Epilogue(ctypes.Structure):
    _fields_ = [
        ("activation", ctypes.c_int),
        ("residual_last", ctypes.c_bool),
        ("negative_slope", ctypes.c_double),
    ]


class Operands(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w")),
        *((f"w_stride_{name}", ctypes.c_int64) for name in "kcrs"),
        ("affine", Affine),
        ("late_affine", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("residual", "y", "means", "sums", "gates")),
    ]


class Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("element", ctypes.c_int)]


class Train(ctypes.Structure):
    _fields_ = [
        *((name, Buffer) for name in ("running_mean", "running_var", "weight", "bias", "conv_bias")),
        *((name, ctypes.c_double) for name in ("scaling_factor", "momentum", "eps")),
        ("spare_centers", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("saved_mean", "saved_invstd")),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dy", "z", "other", "dz", "dresidual")),
        ("from_result", ctypes.c_bool),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        *((name, Buffer) for name in ("mean", "var", "invstd", "weight", "bias", "conv_bias")),
        *((name, ctypes.c_double) for name in ("scaling_factor", "eps")),
        ("counts", Buffer),
        ("count", ctypes.c_double),
        *((name, Buffer) for name in ("dweight", "dbias", "dconv_bias")),
        ("sums", ctypes.c_void_p),
    ]


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("numel", "channels", "inner")]


class Weight(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((f"stride_{name}", ctypes.c_int64) for name in "kcrs")]


class Wgrad(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "result")),
        ("activation", ctypes.c_int),
        ("w", Weight),
        ("has_statistics", ctypes.c_bool),
        *((name, Buffer) for name in ("mean", "var", "weight", "conv_bias")),
        *((name, ctypes.c_double) for name in ("scaling_factor", "eps")),
        ("input_sums", ctypes.c_void_p),
        *((name, Weight) for name in ("dw", "scaled_weight")),
        *((name, Buffer) for name in ("dweight", "dbias", "dconv_bias", "input_scale", "input_shift")),
    ]


class GemmSm90Layout(ctypes.Structure):
    """A tile of gemm_sm90 and so many splits, on a GPU of its own; a call says what came of it."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("tile", "splits", "multiprocessors", "shared_memory")),
        *((name, ctypes.c_int) for name in ("stages", "buffers", "rounds")),
        ("resident", ctypes.c_bool),
    ]


class PoolWindow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("input", "output", "kernel", "stride", "padding", "dilation")]


class SqueezeProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "hidden", "outputs")),
        ("channels_last", ctypes.c_bool),
    ]


class SqueezeNumbers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight1", "bias1", "weight2", "bias2")),
        *((name, ctypes.c_int) for name in ("activation", "gate")),
        ("negative_slope", ctypes.c_double),
    ]


class PoolProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "channels")),
        *((name, PoolWindow) for name in ("rows", "columns")),
    ]
