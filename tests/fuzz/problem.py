"""A call of an op, described by plain values: its tensors, its arguments, and itself as lines of Python."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from .values import Spec

CONVOLVED = ("conv_scale_shift", "conv_bn_scale", "conv_bn_scale_train", "gate_conv_bn_scale")
GATED = ("gate", "gate_conv_bn_scale")
TRAINING = ("bn_scale_train", "conv_bn_scale_train")
POOLED = ("max_pool2d", "spatial_mean", "squeeze_excite")
OPS = (*CONVOLVED, "bn_scale", "scale_shift", "bn_scale_train", "bn_scale_cat", "gate", *POOLED, "fold_bn")
WAYS = ("function", "out", "out is input", "out is residual", "module")
RUNNING = ("running_mean", "running_var")
PAIR, BN = ("scale", "shift"), ("weight", "bias")


@dataclass(frozen=True)
class Problem:
    """What differs from these defaults makes a problem. Where an op does not take something, it is not read."""

    op: str
    dtype: str = "float32"
    shape: tuple[int, ...] = (1, 1)
    layout: str = "contiguous"
    offset: int = 0
    # Convolutions.
    filters: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    weight_layout: str = "contiguous"
    weight_offset: int = 0
    tf32: bool = False
    padding_mode: str = "zeros"
    # What is there, of scale, shift, running_mean (with running_var), weight, bias, conv_bias, bias1 and bias2.
    given: tuple[str, ...] = ()
    given_dtype: str = ""  # "mixed": running statistics alone are float32
    given_layout: str = "contiguous"
    factor: float = 1.0
    eps: float = 1e-5
    momentum: float = 0.1
    # The epilogue. The gradient of the result lies as a residual does.
    residual: str = "none"
    residual_layout: str = "contiguous"
    residual_offset: int = 0
    activation: str = "none"
    slope: float = 0.01
    # Of other ops.
    parts: tuple[int, ...] = ()
    ceil_mode: bool = False
    keepdim: bool = False
    hidden: int = 1
    gate_activation: str = "sigmoid"
    # How it is called, and by what values.
    way: str = "function"
    out_layout: str = "contiguous"
    out_offset: int = 0
    algorithm: str = "by rule"
    statistics: str = "by rule"
    capability: int = 90
    gradients: bool = False
    special: str = "none"
    mean: float = 0.0
    seed: int = 0

    @property
    def channels(self) -> int:
        """Of the result."""
        if self.op in CONVOLVED:
            return self.filters
        return sum(self.parts) if self.op == "bn_scale_cat" else self.shape[1]

    def out_shape(self) -> tuple[int, ...]:
        """Of the result of a convolution or an elementwise op."""
        shape = self.shape
        if self.op not in CONVOLVED:
            return (shape[0], self.channels, *shape[2:])
        window = zip(shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return (shape[0], self.filters, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window))

    def specs(self) -> dict[str, Spec]:
        """The tensors by their names."""
        made: dict[str, Spec] = {}
        seed = self.seed * 64

        def add(name: str, shape: tuple[int, ...], **named: Any) -> None:
            made[name] = Spec(shape, **{"dtype": self.dtype, "seed": seed + len(made), **named})

        def per_channel(name: str, **named: Any) -> None:
            mixed = self.given_dtype == "mixed"
            dtype = ("float32" if name in RUNNING else self.dtype) if mixed else self.given_dtype or self.dtype
            add(name, (self.channels,), dtype=dtype, layout=self.given_layout, **named)

        special = self.special
        values: dict[str, Any] = {"special": special, "shift": self.mean, "tf32": self.tf32}
        if self.op == "fold_bn":
            pass
        elif self.op == "bn_scale_cat":
            for i, n in enumerate(self.parts):
                shape = (self.shape[0], n, *self.shape[2:])
                add(f"part{i}", shape, layout=self.layout, offset=(self.offset * (i + 1)) % 8, **values)
        else:
            add("input", self.shape, layout=self.layout, offset=self.offset, **values)
        if self.op in CONVOLVED:
            shape = (self.filters, self.shape[1] // self.groups, *self.kernel)
            terms = 1
            for n in shape[1:]:
                terms *= n
            named = {"layout": self.weight_layout, "offset": self.weight_offset, "factor": max(terms, 1) ** -0.5}
            add("weight" if self.op == "conv_scale_shift" else "conv_weight", shape, tf32=self.tf32, **named)
        if self.op == "squeeze_excite":
            named = {"layout": self.weight_layout, "offset": self.weight_offset}
            for i, (n, of) in enumerate(((self.hidden, self.shape[1]), (self.filters, self.hidden)), 1):
                add(f"weight{i}", (n, of, *[1] * (len(self.shape) - 2)), factor=of**-0.5, **named)
                if f"bias{i}" in self.given:
                    add(f"bias{i}", (n,), layout=self.given_layout)
        if self.op in GATED:
            add("gate", self.shape[:2], values="unit", layout=self.given_layout)
        inference = self.op in ("bn_scale", "conv_bn_scale", "gate_conv_bn_scale", "bn_scale_cat", "fold_bn")
        if inference or (self.op in TRAINING and "running_mean" in self.given):
            per_channel("running_mean")
            per_channel("running_var", values="variance")
        for name in (*PAIR, *BN, "conv_bias"):
            if name in self.given and not (name == "weight" and "weight" in made):
                per_channel(name, special=special if special == "non-finite" and name in ("shift", "bias") else "none")
        if self.residual != "none":
            add("residual", self.out_shape(), layout=self.residual_layout, offset=self.residual_offset)
        if self.way == "out":
            add("out", self.out_shape(), layout=self.out_layout, offset=self.out_offset)
        return made

    def arguments(self, tensors: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Of the op, from what stands for each tensor."""
        get = tensors.get
        bn = [get(name) for name in (*RUNNING, *BN)]
        window = [self.stride, self.padding, self.dilation, self.groups]
        epilogue: dict[str, Any] = {}
        if self.residual != "none":
            epilogue |= {"residual": tensors["residual"], "residual_last": self.residual == "last"}
        if self.activation != "none":
            epilogue |= {"activation": self.activation}
            if self.activation == "leaky_relu":
                epilogue |= {"negative_slope": self.slope}
        if self.tf32 and self.op in CONVOLVED:
            epilogue["allow_tf32"] = True
        if self.way.startswith("out"):
            epilogue["out"] = tensors[self.way.rpartition(" ")[2]]
        numbers = [self.factor, self.momentum, self.eps] if self.op in TRAINING else [self.factor, self.eps]
        input = get("input")
        if self.op == "fold_bn":
            return [*bn, *numbers, get("conv_bias")], {}
        if self.op == "bn_scale_cat":
            return [[tensors[f"part{i}"] for i in range(len(self.parts))], *bn, *numbers], epilogue
        if self.op == "gate":
            return [input, tensors["gate"]], epilogue
        if self.op == "max_pool2d":
            return [input, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode], {}
        if self.op == "spatial_mean":
            return [input], {"keepdim": True} if self.keepdim else {}
        if self.op == "squeeze_excite":
            named = {"activation": self.activation, "gate": self.gate_activation, "negative_slope": self.slope}
            return [input, *map(get, ("weight1", "bias1", "weight2", "bias2"))], named
        if self.op == "scale_shift":
            return [input, get("scale"), get("shift")], epilogue
        if self.op == "conv_scale_shift":
            return [input, tensors["weight"], get("scale"), get("shift"), *window], epilogue
        if self.op in CONVOLVED:
            inputs = [input, tensors["gate"]] if self.op in GATED else [input]
            return [*inputs, tensors["conv_weight"], get("conv_bias"), *bn, *numbers, *window], epilogue
        return [input, *bn, *numbers], epilogue

    def __str__(self) -> str:
        return f"Problem({self._differences(self)})"

    @staticmethod
    def _differences(x: Any) -> str:
        """Of a dataclass: what is not its default."""
        given = ((f.name, getattr(x, f.name), f.default) for f in fields(x))
        return ", ".join(f"{name}={value!r}" for name, value, default in given if value != default)

    def lines(self, device: str) -> list[str]:
        """Runnable, with src and tests in PYTHONPATH."""
        checked = ["from fuzz import Problem, check", f"check({self}, {device!r})"]
        if self.way == "module":
            return checked
        if device == "emulator":
            return checked
        made = ["import torch, fused_conv_bn as fcb", "from fuzz.values import Spec, tensor"]
        specs = self.specs()
        made += [f"{name} = tensor(Spec({self._differences(spec)}), {device!r})" for name, spec in specs.items()]
        if self.gradients:
            made += [f"{name}.requires_grad_()" for name in specs if name not in RUNNING]
        named = {name: _Name(name) for name in specs}
        positional, keyword = self.arguments(named)
        text = ", ".join([*map(repr, positional), *(f"{k}={v!r}" for k, v in keyword.items())])
        call = f"result = fcb.{self.op}({text})"
        if (self.algorithm, self.statistics) != ("by rule", "by rule"):
            made += [f"with fcb.use_algorithm({self.algorithm!r}, {self.statistics!r}):", f"    {call}"]
        else:
            made.append(call)
        return ["# As the fuzzer checks it:", *checked, "# The call by itself:", *made]


class _Name:
    """A variable, in lines of Python."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def changed(problem: Problem, **named: Any) -> Problem:
    return dataclasses.replace(problem, **named)
