"""What the nodes of a graph are: convolutions, BatchNorms, activations, concatenations, gates, pools; and why no op has
one.

There are two kinds of graphs, those of modules that are called, and those of torch.compile, which have functions alone.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import _activations
from .._block import BnScaleModule
from ..ops import MOST_PARTS
from . import pools
from .layers import FunctionNorm, class_of_conv, is_conv, is_norm, norm_of
from .pools import Pooling

IN_PLACE_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
"""Those that write to their left operand, by their names in the module operator."""

# What returns memory of its own.
_FRESH = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.Linear,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.GELU,
    nn.Sigmoid,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
_FRESH_FUNCTIONS = frozenset(
    {operator.add, operator.mul, torch.add, torch.mul, torch.cat, F.relu, F.silu, F.max_pool2d}
)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_LAYERS = {nn.modules.conv._ConvTransposeNd: "convT", nn.Linear: "linear"}
_PASSES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

REASONS = {
    "class": "it is of class {}, and no op computes what that does",
    "arguments": "it is called with more than its input",
    "watched": "a hook watches it, or it has a forward of its own",
    "readers": "its convolution's result is read by others as well",
    "producer": "what it reads is not the result of a convolution that an op has",
    "taken": "its convolution belongs to another group",
    "alone": "nothing that its op could do as well follows it",
    "normalised": "the BatchNorm that reads its result is not in its group",
    "order": "what it reads is written before its BatchNorm is called",
    "broadcast": "the residual is of another shape or dtype than the result",
    "no capture": "{}",
    "mismatch": "{}",
    "no call": "no captured call reaches it",
    "pending": "what it is in was not called yet",
    "again": "a hook or a module came or went, and what it is in was not called since",
    "not fused": "fuse(model) was not called, or it is no model that calls layers",
}
"""Why a convolution or a BatchNorm is in no group: all kinds of reasons that a report gives."""


class Why(NamedTuple):
    """A kind of :data:`REASONS`, and the sentence."""

    kind: str
    text: str


def why(kind: str, *details: object) -> Why:
    return Why(kind, REASONS[kind].format(*details))


class NormCall(NamedTuple):
    """A BatchNorm's call: what it reads, what it is, and the activation that is in it."""

    input: fx.Node
    identity: object
    activation: str = "none"
    negative_slope: float = 0.01
    trains: bool = False
    function: FunctionNorm | None = None  # where it is no module that is called


NORM = "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
NORM_DEFAULTS: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
"""F.batch_norm's arguments."""


def arguments_of(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, however they were passed."""
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


class Words(Protocol):
    """What the nodes of one kind of graph are."""

    def conv(self, node: fx.Node) -> fx.Node | Why | None:
        """What a convolution reads; why no op has this one; None for what is none."""

    def norm(self, node: fx.Node) -> NormCall | Why | None:
        """The same of a BatchNorm."""

    def activation(self, node: fx.Node) -> tuple[str, float | None] | None:
        """(name, negative slope) of a node that is an activation of its first argument and nothing else."""

    def concatenated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What a concatenation over channels reads, if an op may do it; nothing of any other node."""

    def gated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The factors of a product one of which may be the gate of a squeeze-and-excite block; nothing of others."""

    def is_pointwise(self, node: fx.Node) -> bool:
        """Whether a convolution has windows of one pixel, over all channels: its op may take a gate along."""

    def keeps_pixels(self, node: fx.Node) -> bool:
        """Whether such a convolution of images has neither stride nor padding."""

    def pooled(self, node: fx.Node) -> Pooling | None:
        """How a node pools, if an op does that and it is to be called."""

    def passes(self, node: fx.Node) -> bool:
        """Whether it returns its argument: nn.Identity, and a dropout or a stochastic depth in evaluation."""

    def is_softplus(self, node: fx.Node) -> bool:
        """Whether it is a softplus as mish has it."""

    def is_channelwise(self, node: fx.Node) -> bool:
        """Whether it is a parameter or a buffer that may have a value for each channel, or one for all of them."""

    def layer(self, node: fx.Node) -> str:
        """The word for a layer that no op computes, and that an op may follow; nothing for other nodes."""

    def may_go(self, node: fx.Node) -> bool:
        """Whether nobody watches its call."""

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether its result is memory of its own."""

    def is_in_place(self, node: fx.Node) -> bool:
        """Whether it writes to one of its arguments, or may."""

    def outside(self, node: fx.Node) -> object:
        """Of what the graph is given: the same for those that may be one memory. "get_attr" of a module's own."""


class FunctionWords:
    """What nodes are that call functions and methods. Both kinds of graphs have them."""

    def activation(self, node: fx.Node) -> tuple[str, float | None] | None:
        if node.op == "call_method":
            name = str(node.target).rstrip("_")
            return (name, None) if name in ("relu", "sigmoid", "tanh") and not node.kwargs else None
        if node.op != "call_function":
            return None
        arguments = dict(zip(("input", "a", "b"), node.args, strict=False)) | node.kwargs
        arguments.pop("inplace", None)
        if node.target is F.hardtanh:
            limits = [
                node.kwargs.get("min_val", (*node.args, -1.0)[1]),
                node.kwargs.get("max_val", (*node.args, 1.0, 1.0)[2]),
            ]
            return ("relu6", None) if limits == [0.0, 6.0] else None
        if node.target in (F.gelu, torch._C._nn.gelu) and arguments.get("approximate", "none") in ("none", "tanh"):
            return ("gelu_tanh" if arguments.get("approximate") == "tanh" else "gelu"), None
        if node.target in (F.leaky_relu, torch._C._nn.leaky_relu):
            slope = arguments.get("negative_slope", arguments.get("a", 0.01))
            return ("leaky_relu", slope) if isinstance(slope, float) else None
        found = _activations.named(node.target) if callable(node.target) else None
        if found is None or found[0] == "none":
            return None
        return None if any(isinstance(v, fx.Node) for k, v in arguments.items() if k != "input") else found

    def passes(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        if getattr(node.target, "__name__", "") == "stochastic_depth":
            return (list(node.args) + [node.kwargs.get("training", True)])[3:4] == [False]
        if node.target in (F.dropout, F.dropout2d, F.dropout3d):
            return (list(node.args) + [node.kwargs.get("training", True)] * 2)[2] is False
        return False

    def is_softplus(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target is F.softplus and len(node.args) == 1 and not node.kwargs

    def is_channelwise(self, node: fx.Node) -> bool:
        return False

    def layer(self, node: fx.Node) -> str:
        return ""

    def concatenated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return ()  # inductor writes no concatenation either

    def gated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return ()

    def is_pointwise(self, node: fx.Node) -> bool:
        return False

    def keeps_pixels(self, node: fx.Node) -> bool:
        return False

    def pooled(self, node: fx.Node) -> Pooling | None:
        return None

    def may_go(self, node: fx.Node) -> bool:
        return True

    def outside(self, node: fx.Node) -> object:
        return node.op

    def is_fresh(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS and not self.is_in_place(node)

    def is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            name = str(node.target)
            return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            inplace = node.kwargs.get("inplace", len(node.args) > 1 and node.args[1] is True)
            return (
                name in (*IN_PLACE_OPERATORS, "setitem")
                or (name.endswith("_") and not name.endswith("__"))
                or inplace is True
                or "out" in node.kwargs
                or name.startswith("_foreach_")
            )
        return False


class ModuleWords(FunctionWords):
    """Graphs of modules that are called. ``free``: paths of those whose calls nobody watches, so that they may go."""

    def __init__(self, modules: dict[str, nn.Module], free: set[str]) -> None:
        self.modules, self.free = modules, free

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def conv(self, node: fx.Node) -> fx.Node | Why | None:
        m = self.module(node)
        if m is None or not is_conv(m):
            return None
        if class_of_conv(m) is None:
            return why("class", type(m).__name__)
        return self._input(node)

    def norm(self, node: fx.Node) -> NormCall | Why | None:
        m = self.module(node)
        if m is None:
            return self._function_norm(node)
        if not is_norm(m):
            return None
        found = norm_of(m)
        if found is None:
            return why("class", type(m).__name__)
        read = self._input(node)
        if isinstance(read, Why):
            return read
        return NormCall(read, m, found.activation, found.negative_slope, m.training and not found.frozen)

    def _function_norm(self, node: fx.Node) -> NormCall | None:
        """F.batch_norm with the tensors of one module, all that it has of those."""
        if node.op != "call_function" or node.target is not F.batch_norm:
            return None
        call = arguments_of(node, NORM, NORM_DEFAULTS)
        tensors = {name: call.get(name) for name in NORM[1:5]}
        path = str(getattr(tensors["running_mean"], "target", "")).rpartition(".")[0]
        m = self.modules.get(path)
        if m is None or not isinstance(call.get("input"), fx.Node) or "running_mean" not in m._buffers:
            return None
        for name, value in tensors.items():
            own = m._parameters.get(name, m._buffers.get(name))
            if isinstance(value, fx.Node):
                if value.op != "get_attr" or value.target != f"{path}.{name}".lstrip(".") or own is None:
                    return None
            elif value is not None or own is not None:
                return None
        if ("weight" in m._parameters) is not ("bias" in m._parameters):
            return None
        training, numbers = call["training"], (call["momentum"], call["eps"])
        if type(training) is not bool or not all(type(v) is float for v in numbers):
            return None
        if training and m._buffers.get("num_batches_tracked") is not None:  # which the forward counts, or not
            return None
        return NormCall(call["input"], m, trains=training, function=FunctionNorm(path, training, *numbers))

    def _input(self, node: fx.Node) -> fx.Node | Why:
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return why("arguments")
        return node.args[0] if self.may_go(node) else why("watched")

    def activation(self, node: fx.Node) -> tuple[str, float | None] | None:
        m = self.module(node)
        if m is None:
            return super().activation(node)
        found = _activations.named(m)
        return None if found is None or found[0] == "none" else found

    def is_softplus(self, node: fx.Node) -> bool:
        m = self.module(node)
        if m is None:
            return super().is_softplus(node)
        return type(m) is nn.Softplus and (m.beta, m.threshold) == (1, 20)

    def is_channelwise(self, node: fx.Node) -> bool:
        if node.op != "get_attr":
            return False
        path, _, name = str(node.target).rpartition(".")
        t = getattr(self.modules.get(path), name, None)
        return isinstance(t, torch.Tensor) and t.is_floating_point() and sum(size != 1 for size in t.shape) <= 1

    def layer(self, node: fx.Node) -> str:
        m = self.module(node)
        return next((word for kind, word in _LAYERS.items() if isinstance(m, kind)), "")

    def concatenated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        if node.op != "call_function" or node.target not in _CONCATENATIONS:
            return ()
        named = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        tensors = named.pop("tensors", ())
        of_channels = list(named.items()) in ([("dim", 1)], [("axis", 1)])
        if not of_channels or not isinstance(tensors, (list, tuple)) or not 0 < len(tensors) <= MOST_PARTS:
            return ()
        return tuple(tensors) if all(isinstance(t, fx.Node) for t in tensors) else ()

    def gated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        is_product = (node.op, node.target) == ("call_method", "mul") or (
            node.op == "call_function" and node.target in (operator.mul, torch.mul)
        )
        a, b = (*node.args, None, None)[:2]
        if not is_product or node.kwargs or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return ()
        return (a, b) if self._is_gate(a, b) or self._is_gate(b, a) else ()

    def _is_gate(self, node: fx.Node, gated: fx.Node) -> bool:
        """Whether it is a sigmoid of something else, under whatever view."""
        while node.op == "call_method" and node.target in ("view", "reshape", "unsqueeze", "expand_as"):
            node = node.all_input_nodes[0]
        if node.op == "call_function" and node.target is operator.truediv and node.args[1:] in ((6,), (6.0,)):
            found = self.activation(node.all_input_nodes[0])
            return found is not None and found[0] == "relu6"
        found = self.activation(node)
        return found is not None and found[0] in ("sigmoid", "hardsigmoid") and node.all_input_nodes[:1] != [gated]

    def is_pointwise(self, node: fx.Node) -> bool:
        m: Any = self.module(node)
        return m is not None and (m.groups, m.padding_mode, {*m.kernel_size}) == (1, "zeros", {1})

    def keeps_pixels(self, node: fx.Node) -> bool:
        m: Any = self.module(node)
        return m is not None and class_of_conv(m) is nn.Conv2d and (m.stride, m.padding) == ((1, 1), (0, 0))

    def pooled(self, node: fx.Node) -> Pooling | None:
        m = self.module(node)
        if m is None:
            return pools.of_call(node) if node.op in ("call_function", "call_method") else None
        return pools.of_module(m) if not isinstance(self._input(node), Why) else None

    def passes(self, node: fx.Node) -> bool:
        m = self.module(node)
        if m is None:
            return super().passes(node)
        if type(m) in _PASSES:
            return type(m) is nn.Identity or not m.training
        return type(m).__name__ in ("DropPath", "StochasticDepth") and _is_drop_path(m)

    def may_go(self, node: fx.Node) -> bool:
        return node.op != "call_module" or str(node.target) in self.free

    def is_fresh(self, node: fx.Node) -> bool:
        m = self.module(node)
        return super().is_fresh(node) if m is None else isinstance(m, _FRESH) and not self.is_in_place(node)

    def is_in_place(self, node: fx.Node) -> bool:
        m = self.module(node)
        if m is None:
            return super().is_in_place(node)
        # Of a module that nobody knows nobody knows what it writes to.
        known = type(m).__module__.startswith("torch.nn.") or is_conv(m) or is_norm(m) or isinstance(m, BnScaleModule)
        return bool(getattr(m, "inplace", not known))


def _is_drop_path(m: nn.Module) -> bool:
    """timm's and torchvision's, which return their argument in evaluation."""
    return not m.training and type(m).__module__.split(".")[0] in ("timm", "torchvision")
