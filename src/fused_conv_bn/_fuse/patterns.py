"""Which nodes of a graph one fused op computes: a convolution, its BatchNorm, a factor, a residual, an activation; a
BatchNorm of inputs that are concatenated; the gate of a squeeze-and-excite block; pooling.

The matcher knows dataflow. What a node is, :class:`Words` tell it: there are two kinds of graphs, those of modules that
are called, and those of torch.compile, which have functions alone.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import _activations
from .._block import BnScaleModule
from ..ops import MOST_PARTS
from . import pools
from .layers import class_of_conv, is_conv, is_norm, norm_of
from .pools import Pooling

IN_PLACE_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
"""Those that write to their left operand, by their names in the module operator."""

_ADDS = (operator.add, operator.iadd, torch.add)
_MULTIPLIES = (operator.mul, operator.imul, torch.mul)
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
    "not fused": "fuse(model) was not called",
}
"""Why a convolution or a BatchNorm is in no group: all kinds of reasons that a report gives."""


class Why(NamedTuple):
    """A kind of :data:`REASONS`, and the sentence."""

    kind: str
    text: str


def why(kind: str, *details: object) -> Why:
    return Why(kind, REASONS[kind].format(*details))


@dataclass
class Group:
    """Nodes in the order in which they run; the last one is what others read."""

    conv: fx.Node | None  # None: the BatchNorm is behind something else
    bn: fx.Node | None  # None: the convolution has no BatchNorm
    inputs: tuple[fx.Node, ...]
    nodes: list[fx.Node]
    concatenates: bool = False  # the inputs, in front of the BatchNorm
    product: fx.Node | None = None  # of a gate, which has neither: its factors are the inputs
    pooling: Pooling | None = None  # of rows and columns, which has neither
    factor: float = 1.0
    residual: fx.Node | None = None
    adds: str = ""  # the name of the node that adds it
    residual_first: bool = False  # it is the first of the two: the sum has its strides
    residual_last: bool = False
    activation: str = "none"
    negative_slope: float = 0.01
    swallowed: list[fx.Node] = field(default_factory=list)  # those that are not called any more, beside conv and bn
    note: str = ""  # why the convolution in front is not in it

    @property
    def name(self) -> str:
        """Its module's path, or the name of the product's or the pooling's node."""
        node = self.bn or self.conv or self.product or self.nodes[0]
        return str(node.target) if node.op == "call_module" else node.name

    @property
    def key(self) -> str:
        """The name of the node that is none of a group where the first call shows that an op does not fit."""
        return self.nodes[0].name if self.pooling is not None else self.adds if self.product is None else self.name

    @property
    def argument(self) -> fx.Node | tuple[fx.Node, ...]:
        """What its block is called with: its input, or all of them where there may be several."""
        return self.inputs if self.concatenates or self.is_gate else self.inputs[0]

    @property
    def is_gate(self) -> bool:
        return self.product is not None

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Another node for one that is read."""
        self.inputs = tuple(by if n is node else n for n in self.inputs)
        if self.residual is node:
            self.residual = by

    def describe(self) -> str:
        if self.pooling is not None:
            return self.pooling.describe()
        parts = ["gate"] if self.is_gate else ["cat"] if self.concatenates else []
        parts += [name for name, node in (("conv", self.conv), ("bn", self.bn)) if node is not None]
        if self.factor != 1.0:
            parts.append(f"* {self.factor:g}")
        if self.residual is not None and not self.residual_last:
            parts.append("add")
        if self.activation != "none":
            parts.append(self.activation)
        if self.residual_last:
            parts.append("add")
        return " ".join(parts)


class NormCall(NamedTuple):
    """A BatchNorm's call: what it reads, what it is, and the activation that is in it."""

    input: fx.Node
    identity: object
    activation: str = "none"
    negative_slope: float = 0.01
    trains: bool = False


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

    def pooled(self, node: fx.Node) -> Pooling | None:
        """How a node pools, if an op does that and it is to be called."""

    def passes(self, node: fx.Node) -> bool:
        """Whether it returns its argument: nn.Identity, and a dropout or a stochastic depth in evaluation."""

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

    def concatenated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return ()  # inductor writes no concatenation either

    def gated(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return ()

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
        if m is None or not is_norm(m):
            return None
        found = norm_of(m)
        if found is None:
            return why("class", type(m).__name__)
        read = self._input(node)
        if isinstance(read, Why):
            return read
        return NormCall(read, m, found.activation, found.negative_slope, m.training and not found.frozen)

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


class Matcher:
    """Finds the groups of a graph. ``broadcast``: nodes that add what is not of the result's shape. ``pools``: whether
    pooling is one."""

    def __init__(
        self, graph: fx.Graph, words: Words, broadcast: frozenset[str] = frozenset(), pools: bool = False
    ) -> None:
        self.graph, self.words, self.broadcast, self.pools = graph, words, broadcast, pools
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.taken: set[fx.Node] = set()
        self.why: dict[fx.Node, Why] = {}

    def groups(self) -> list[Group]:
        """Those with a BatchNorm first: a convolution's result is its BatchNorm's before it is anybody else's."""
        found = []
        for node in self.graph.nodes:
            call = self.words.norm(node)
            if call is None:
                continue
            group = call if isinstance(call, Why) else self.group_of(node, call)
            if isinstance(group, Why):
                self.why[node] = group
                continue
            self.taken |= set(group.nodes)
            found.append(group)
        for node in self.graph.nodes:
            read = self.words.conv(node)
            if read is None or node in self.taken:
                continue
            if isinstance(read, Why):
                self.why[node] = read
                continue
            group = Group(node, None, (read,), [node])
            self.extend(group, trains=None)
            if len(group.nodes) == 1:
                behind = any(self.words.norm(reader) is not None for reader in node.users)
                self.why[node] = why("normalised" if behind else "alone")
                continue
            self.taken |= set(group.nodes)
            found.append(group)
        for node in self.graph.nodes:
            if node not in self.taken and node.name not in self.broadcast and (factors := self.words.gated(node)):
                group = self.gate_of(node, factors)
                self.taken |= set(group.nodes)
                found.append(group)
        for node in self.graph.nodes if self.pools else ():
            if node not in self.taken and node.name not in self.broadcast and (how := self.words.pooled(node)):
                found.append(Group(None, None, (node.all_input_nodes[0],), [node], pooling=how, swallowed=[node]))
        return sorted(found, key=lambda g: self.order[g.nodes[0]])

    def gate_of(self, product: fx.Node, factors: tuple[fx.Node, ...]) -> Group:
        """A factor that a view makes as large as the other one is taken as it is."""
        group = Group(None, None, factors, [product], product=product)
        for i, node in enumerate(factors):
            if (node.op, node.target) == ("call_method", "expand_as") and self.only_reader(node) is product:
                small = Group(None, None, (node.all_input_nodes[0], factors[1 - i]), [node, product], product=product)
                if node.args[1:] == (factors[1 - i],) and self.may_move_to(small, product, None, None):
                    group = small
                    group.swallowed = [node]
        self.extend(group, trains=None)
        return group

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def group_of(self, bn: fx.Node, call: NormCall) -> Group | Why:
        trains = call.identity if call.trains else None
        found = self.conv_in_front(bn, call)
        if isinstance(found, Group):
            self.extend_norm(found, call, trains)
            return found
        self.why[bn] = found
        group = Group(None, bn, (call.input,), [bn], note=found.text)
        self.extend_norm(group, call, trains)
        # The op that concatenates adds no residual.
        if group.residual is None and (concatenates := self.with_concatenation(bn, call)) is not None:
            group = concatenates
            group.note = found.text
            self.extend_norm(group, call, trains)
        return group

    def extend_norm(self, group: Group, call: NormCall, trains: object) -> None:
        group.activation, group.negative_slope = call.activation, call.negative_slope
        self.extend(group, trains)

    def with_concatenation(self, bn: fx.Node, call: NormCall) -> Group | None:
        inputs = self.words.concatenated(call.input)
        if not inputs or self.only_reader(call.input) is not bn:
            return None
        group = Group(None, bn, inputs, [call.input], concatenates=True, swallowed=[call.input])
        if not self.may_move_to(group, bn, None, call.identity if call.trains else None):
            return None
        group.nodes.append(bn)
        return group

    def conv_in_front(self, bn: fx.Node, call: NormCall) -> Group | Why:
        between: list[fx.Node] = []
        conv = call.input
        while self.words.passes(conv) and self.words.may_go(conv):
            between.insert(0, conv)
            conv = conv.all_input_nodes[0]
        read = self.words.conv(conv)
        if read is None:
            return why("producer")
        if isinstance(read, Why):
            return read
        if any(self.only_reader(n) is None for n in (conv, *between)):
            return why("readers")
        if conv in self.taken:
            return why("taken")
        group = Group(conv, bn, (read,), [conv, *between], swallowed=between)
        # The convolution is computed where its BatchNorm is.
        if not self.may_move_to(group, bn, None, call.identity if call.trains else None):
            return why("order")
        group.nodes.append(bn)
        return group

    def memory_of(self, node: fx.Node) -> set[Any]:
        """Nodes whose memory this one's result may be: its own, unless it may be a view of an argument.

        Arguments of the graph may be one memory, and so may parameters and buffers: those are two kinds.
        """
        found: set[Any] = set()
        waiting = [node]
        while waiting:
            n = waiting.pop()
            if n in found:
                continue
            found.add(n)
            if n.op in ("placeholder", "get_attr"):
                found.add(self.words.outside(n))
            if not self.words.is_fresh(n):
                waiting += n.all_input_nodes
        return found

    def may_move_to(self, group: Group, node: fx.Node, residual: fx.Node | None, trains: object) -> bool:
        """Whether nothing that the group reads is written between its first node and this one.

        ``trains``: the BatchNorm, if it writes its statistics: calls of one stay in their order.
        """
        inside = {*group.nodes, node}
        first, last = self.order[group.nodes[0]], self.order[node]
        between = [n for n, i in self.order.items() if first < i < last and n not in inside]
        if trains is not None:
            calls = [call for n in between if isinstance(call := self.words.norm(n), NormCall)]
            if any(call.identity is trains for call in calls):
                return False
            # Nor does anybody read its statistics before they are written.
            if any("get_attr" in self.memory_of(a) for n in between for a in n.all_input_nodes):
                return False
        writes = [n for n in between if self.words.is_in_place(n)]
        if not writes:
            return True
        read = {"get_attr"}.union(*map(self.memory_of, group.inputs))
        # The residual is read where it is added, and from there on.
        added = set() if residual is None else self.memory_of(residual)
        add = next((self.order[n] for n in group.nodes if n.name == group.adds), last)
        return not any(
            self.memory_of(a) & (read | added if self.order[n] > add else read)
            for n in writes
            for a in n.all_input_nodes
        )

    def writes_attributes(self) -> bool:
        """Whether the graph itself writes to parameters or buffers."""
        return any(
            "get_attr" in self.memory_of(a)
            for n in self.graph.nodes
            if n.op != "call_module" and self.words.is_in_place(n)
            for a in n.all_input_nodes
        )

    def extend(self, group: Group, trains: object) -> None:
        """What follows, as far as one op has it: a factor, a residual, an activation, or a residual behind it."""
        last = group.nodes[-1]
        waiting: list[fx.Node] = []  # of those that return their argument: they go along with what follows
        while (node := self.only_reader(last)) is not None and node not in self.taken:
            if self.words.passes(node) and self.words.may_go(node):
                waiting.append(node)
                last = node
                continue
            change = self.step(group, node, last)
            if change is None or not self.may_move_to(group, node, change.get("residual", group.residual), trains):
                return
            for name, value in change.items():
                setattr(group, name, value)
            group.nodes += [*waiting, node]
            group.swallowed = [*group.swallowed, *waiting, node]
            waiting, last = [], node

    def step(self, group: Group, node: fx.Node, last: fx.Node) -> dict[str, Any] | None:
        """What of the group changes when this node, the only reader of what is its result by now, comes along."""
        found = self.words.activation(node)
        if found is not None:
            if group.activation != "none" or group.residual_last or node.all_input_nodes[:1] != [last]:
                return None
            if not self.words.may_go(node):
                return None
            return {"activation": found[0], "negative_slope": 0.01 if found[1] is None else found[1]}
        if node.op != "call_function" and not (node.op == "call_method" and node.target in ("add", "add_", "mul")):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        other = node.args[1] if node.args[0] is last else node.args[0]
        if node.target in (*_MULTIPLIES, "mul"):
            if (
                not isinstance(other, (int, float))
                or not math.isfinite(other)
                or group.residual is not None
                or group.activation != "none"
            ):
                return None
            return {"factor": group.factor * other} if group.bn is not None else None
        if node.target not in (*_ADDS, "add", "add_") or not isinstance(other, fx.Node) or other is last:
            return None
        if group.residual is not None or group.concatenates or node.name in self.broadcast:
            return None
        if self.words.is_in_place(node) and node.args[0] is not last:
            # What it adds to is overwritten: nobody else may have it.
            if any(not isinstance(n, fx.Node) or len(n.users) != 1 for n in self.memory_of(other)):
                return None
        first = node.args[0] is other
        return {
            "residual": other,
            "adds": node.name,
            "residual_first": first,
            "residual_last": group.activation != "none",
        }
