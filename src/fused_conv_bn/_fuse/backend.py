"""``torch.compile(model, backend="fused_conv_bn")``: the groups of dynamo's graphs as fused ops, the rest to inductor.

PyTorch finds the backend by the package's entry point, without an import.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from ..algorithms import explain
from .blocks import shift_of
from .patterns import Group, Matcher
from .words import NORM, NORM_DEFAULTS, FunctionWords, NormCall, Why, arguments_of, why

_CONVS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_CONV = "input", "weight", "bias", "stride", "padding", "dilation", "groups"
_CONV_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_DTYPES = torch.float32, torch.float16, torch.bfloat16, torch.float64
_THEN = "inductor", "eager"


def compile_backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """A backend of ``torch.compile``, as ``backend="fused_conv_bn"``.

    Convolutions with their BatchNorms, residuals and activations become fused ops. With inductor behind it, those do
    for which this package has a kernel of its own, and that need no gradient: the others are inductor's, which fuses
    what is behind them as well.

    Args:
        graph, example_inputs: dynamo's.
        options: ``{"then": "eager"}`` runs the rest of the graph by PyTorch's ops, and each group as a fused op, with
            gradients. Default ``"inductor"``, which takes what it takes: a C++ compiler on the CPU, Triton on CUDA.
        mode: inductor's.

    Raises:
        ValueError: an unknown option.
    """
    options = dict(options or {})
    then = options.pop("then", "inductor")
    if options or then not in _THEN:
        given = f"then={then!r}" if not options else f"{next(iter(options))!r}"
        raise ValueError(f"fused_conv_bn: options has {given}, expected 'then' with one of {', '.join(_THEN)}")
    grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)
    if then == "eager":
        # With dynamic=True numbers are nodes, too. They are numbers when the op is called.
        rewrite(graph, CompiledWords((float, int, fx.Node)), lambda *_: True)
        return graph.forward
    if not grad:
        rewrite(graph, CompiledWords((float, int)), _has_kernel)
    return _inductor(graph, example_inputs, mode)


def _inductor(graph: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode and mode != "default" else None
    compiled: Any = compile_fx(graph, example_inputs, config_patches=patches)
    return compiled


def rewrite(
    graph_module: fx.GraphModule, words: CompiledWords, wanted: Callable[[dict[str, Any], Group], bool]
) -> list[Group]:
    """Puts fused ops into a graph of functions, where ``wanted`` says so. Returns the groups that it put in."""
    graph = graph_module.graph
    if any(getattr(n.target, "__name__", "") in ("_enter_autocast", "_set_grad_enabled") for n in graph.nodes):
        return []  # another dtype, or no gradient, from there on
    done = []
    groups = Matcher(graph, words, _broadcast(graph)).groups()
    for group in groups:
        conv = None if group.conv is None else arguments_of(group.conv, _CONV, _CONV_DEFAULTS)
        if not wanted(conv or {}, group):
            continue
        norm = None if group.bn is None else arguments_of(group.bn, NORM, NORM_DEFAULTS)
        last = group.nodes[-1]
        with graph.inserting_before(last):
            fused = _fused(graph, group, conv, norm)
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        for node in reversed(group.nodes):
            graph.erase_node(node)
        for other in groups:  # those whose input or residual this one was
            other.replace(last, fused)
        done.append(group)
    graph.lint()
    graph_module.recompile()
    return done


def _fused(graph: fx.Graph, group: Group, conv: dict[str, Any] | None, norm: dict[str, Any] | None) -> fx.Node:
    named: dict[str, Any] = {}
    if group.residual is not None:
        named |= {"residual": group.residual, "residual_last": group.residual_last}
    if group.activation != "none":
        named |= {"activation": group.activation, "negative_slope": group.negative_slope}
    window = () if conv is None else tuple(conv[name] for name in _CONV[3:])
    if norm is None:
        assert conv is not None
        arguments = (group.argument, conv["weight"], conv["bias"], *window)
        return graph.call_function(_conv_shift, arguments, named)
    statistics = tuple(norm[name] for name in NORM[1:5])
    train = norm["training"]
    behind = (*statistics, group.factor, *([norm["momentum"]] if train else []), norm["eps"])
    if conv is None:
        return graph.call_function(ops.bn_scale_train if train else ops.bn_scale, (group.argument, *behind), named)
    arguments = group.argument, conv["weight"], conv["bias"], *behind, *window
    return graph.call_function(ops.conv_bn_scale_train if train else ops.conv_bn_scale, arguments, named)


def _conv_shift(input: Tensor, weight: Tensor, bias: Tensor | None, *window: Any, **epilogue: Any) -> Tensor:
    """A convolution without a BatchNorm: its bias is the shift."""
    return ops.conv_scale_shift(input, weight, None, shift_of(bias), *window, **epilogue)


class CompiledWords(FunctionWords):
    """Graphs of torch.compile: convolutions and BatchNorms are functions, and parameters are their arguments.

    ``numbers``: the types that a number may have.
    """

    def __init__(self, numbers: tuple[type, ...]) -> None:
        self.numbers = numbers

    def outside(self, node: fx.Node) -> object:
        """Parameters and buffers are arguments, too. What counts batches is of another dtype than what is computed."""
        return "argument", getattr(value_of(node), "dtype", None)

    def conv(self, node: fx.Node) -> fx.Node | Why | None:
        if node.op != "call_function" or node.target not in _CONVS:
            return None
        call = arguments_of(node, _CONV, _CONV_DEFAULTS)
        read, weight = call["input"], call["weight"]
        x, w = value_of(read), value_of(weight)
        if not _is_plain(x, _CONVS[node.target] + 2) or not isinstance(w, Tensor) or w.dtype != x.dtype:
            return why("class", "of a convolution of other tensors")
        numbers = [call["groups"], *_flat(call["stride"]), *_flat(call["padding"]), *_flat(call["dilation"])]
        if not all(isinstance(v, int) for v in numbers):
            return why("class", "of a convolution of other arguments")
        bias = value_of(call["bias"])
        if bias is not None and bias.dtype not in (x.dtype, torch.float32):
            return why("class", "of a convolution of several dtypes")
        return read

    def norm(self, node: fx.Node) -> NormCall | Why | None:
        if node.op != "call_function" or node.target is not F.batch_norm:
            return None
        call = arguments_of(node, NORM, NORM_DEFAULTS)
        read, training = call["input"], call["training"]
        x = value_of(read)
        if not isinstance(x, Tensor) or not _is_plain(x, x.dim()) or not 2 <= x.dim() <= 5:
            return why("class", "of a BatchNorm of other tensors")
        numbers = [call["eps"], *([call["momentum"]] if training else [])]
        if type(training) is not bool or not all(type(v) in self.numbers for v in numbers):
            return why("class", "of a BatchNorm of other arguments")
        statistics = [value_of(call[name]) for name in NORM[1:5]]
        if any(t is not None and (t.dtype not in (x.dtype, torch.float32) or t.dim() != 1) for t in statistics):
            return why("class", "of a BatchNorm of several dtypes")
        if not training and (statistics[0] is None or statistics[1] is None):
            return why("class", "of a BatchNorm without statistics")
        return NormCall(read, call["running_mean"], trains=training)


def value_of(argument: Any) -> Any:
    """What dynamo knows of a node's value: a fake tensor."""
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else argument


def _is_plain(x: Any, dims: int) -> bool:
    devices = "cpu", "cuda"
    return isinstance(x, Tensor) and x.dim() == dims and x.dtype in _DTYPES and x.device.type in devices


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _broadcast(graph: fx.Graph) -> frozenset[str]:
    """Nodes whose two arguments are not of one shape, layout and dtype."""

    def kinds(node: fx.Node) -> set[Any]:
        values = [value_of(n) for n in node.all_input_nodes]
        return {(str(v.shape), str(v.stride()), v.dtype) if isinstance(v, Tensor) else None for v in values}

    return frozenset(n.name for n in graph.nodes if len(n.all_input_nodes) == 2 and len(kinds(n)) != 1)


def _has_kernel(conv: dict[str, Any], group: Group) -> bool:
    """Whether a kernel of this package would run, by what dynamo knows of the shapes."""
    if not conv:
        return False
    try:
        tensors = []
        for name in ("input", "weight"):
            fake = value_of(conv[name])
            size, stride = ([int(v) for v in values] for values in (fake.shape, fake.stride()))
            with _disable_current_modes():
                tensors.append(torch.empty_strided(size, stride, dtype=fake.dtype, device=fake.device))
        with _disable_current_modes():
            window = {name: conv[name] for name in _CONV[3:]}
            x, weight = tensors
            return not explain(x, weight, **window, residual=group.residual is not None).startswith("aten")
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            warnings.warn("fused_conv_bn: no memory to ask what computes a convolution of this size", stacklevel=2)
        return False
