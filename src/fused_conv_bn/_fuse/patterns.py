"""Which nodes of a graph one fused op computes: a convolution, its BatchNorm, a factor, a residual, an activation; a
BatchNorm of inputs that are concatenated; what a squeeze-and-excite block squeezes, and its gate; pooling.

The matcher knows dataflow. What a node is, :class:`Words` tell it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from .layers import FunctionNorm
from .pools import Pooling
from .words import IN_PLACE_OPERATORS, NormCall, Why, Words, why

_ADDS = (operator.add, operator.iadd, torch.add)
_SUBTRACTS = (operator.sub, operator.isub, torch.sub)
_MULTIPLIES = (operator.mul, operator.imul, torch.mul, torch.multiply)
_DIVIDES = (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide)
_METHODS = ("add", "add_", "sub", "mul", "div")

Step = tuple[str, fx.Node | float]
"""A change of a BatchNorm's result: "*" or "+", and a number, or a tensor that may have a value for each channel."""


class Squeeze(NamedTuple):
    """The groups that a squeeze-and-excite block's are: a mean, and two convolutions with their activations."""

    mean: Group
    reduce: Group
    excite: Group


@dataclass
class Group:
    """Nodes in the order in which they run; the last one is what others read."""

    conv: fx.Node | None  # None: the BatchNorm is behind something else
    bn: fx.Node | None  # None: the convolution has no BatchNorm
    inputs: tuple[fx.Node, ...]
    nodes: list[fx.Node]
    concatenates: bool = False  # the inputs, in front of the BatchNorm
    product: fx.Node | None = None  # of a gate, which has neither: its factors are the inputs
    gate: Group | None = None  # whose product the convolution alone reads: its factors are the inputs
    pooling: Pooling | None = None  # of rows and columns, which has neither
    squeeze: Squeeze | None = None  # the convolution is the first of two
    is_squeezed: bool = False  # a squeeze reads it, and beside that gates' products alone
    layer: fx.Node | None = None  # whose result the BatchNorm alone reads, and which PyTorch computes
    layer_word: str = ""
    steps: list[Step] = field(default_factory=list)  # behind the BatchNorm, before the factor
    channelwise: str = ""  # the name of the last node that is one of them, with a tensor
    factor: float = 1.0
    residual: fx.Node | None = None
    adds: str = ""  # the name of the node that adds it
    residual_first: bool = False  # it is the first of the two: the sum has its strides
    adds_in_place: bool = False  # to the other one, which keeps its dtype
    residual_last: bool = False
    activation: str = "none"
    negative_slope: float = 0.01
    by_hand: bool = False  # the activation is several nodes
    swallowed: list[fx.Node] = field(default_factory=list)  # those that are not called any more, beside conv and bn
    note: str = ""  # why the convolution in front is not in it
    function: FunctionNorm | None = None  # of a BatchNorm that is a function's call

    @property
    def name(self) -> str:
        """Its module's path, or the name of the product's or the pooling's node."""
        node = self.bn or self.conv or self.product or self.nodes[0]
        return str(node.target) if node.op == "call_module" else node.name

    @property
    def bn_path(self) -> str | None:
        """Of the module that has the BatchNorm's tensors."""
        return None if self.bn is None else self.function.path if self.function else str(self.bn.target)

    @property
    def key(self) -> str:
        """The name of the node that is none of a group where the first call shows that an op does not fit."""
        if self.pooling is not None:
            return self.nodes[0].name
        if self.squeeze is not None:
            return self.nodes[-1].name
        if self.gate is not None:
            return self.gate.key
        return self.channelwise or self.adds if self.product is None else self.name

    @property
    def argument(self) -> fx.Node | tuple[fx.Node, ...]:
        """What its block is called with: its input, or all of them where there may be several."""
        several = self.concatenates or self.is_gate or self.gate is not None or self.steps
        return self.inputs if several else self.inputs[0]

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
        if self.squeeze is not None:
            return " ".join(of.describe() for of in self.squeeze)
        parts = ["gate"] if self.is_gate or self.gate is not None else ["cat"] if self.concatenates else []
        parts += [self.layer_word] if self.layer is not None else []
        parts += [name for name, node in (("conv", self.conv), ("bn", self.bn)) if node is not None]
        parts += [f"{op} {operand:g}" if isinstance(operand, float) else f"{op} c" for op, operand in self.steps]
        if self.factor != 1.0:
            parts.append(f"* {self.factor:g}")
        if self.residual is not None and not self.residual_last:
            parts.append("add")
        if self.activation != "none":
            parts.append(self.activation)
        if self.residual_last:
            parts.append("add")
        return " ".join(parts)


def written(node: fx.Node) -> list[fx.Node]:
    """What a node may write to if it is in place, and return: an operator, its left operand alone."""
    of_operator = node.op == "call_function" and getattr(node.target, "__name__", "") in IN_PLACE_OPERATORS
    return [node.args[0]] if of_operator and isinstance(node.args[0], fx.Node) else node.all_input_nodes


class Matcher:
    """Finds the groups of a graph. ``broadcast``: nodes that add what is not of the result's shape, or that have no
    value for each channel. ``pools``: whether pooling is one. ``channelwise``: whether a group may have such values.
    ``joins``: whether a gate and the convolution behind it are one. ``squeezes``: whether a mean and two convolutions
    behind it are."""

    def __init__(
        self,
        graph: fx.Graph,
        words: Words,
        broadcast: frozenset[str] = frozenset(),
        pools: bool = False,
        channelwise: bool = False,
        joins: bool = False,
        squeezes: bool = False,
    ) -> None:
        self.graph, self.words, self.broadcast, self.pools = graph, words, broadcast, pools
        self.channelwise, self.joins, self.squeezes = channelwise, joins, squeezes
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
        found = self.with_squeezes(found) if self.squeezes else found
        for node in self.graph.nodes:
            if node not in self.taken and node.name not in self.broadcast and (factors := self.words.gated(node)):
                group = self.gate_of(node, factors)
                self.taken |= set(group.nodes)
                found.append(group)
        found = self.with_gates(found) if self.joins else found
        for node in self.graph.nodes if self.pools else ():
            if node not in self.taken and node.name not in self.broadcast and (how := self.words.pooled(node)):
                found.append(Group(None, None, (node.all_input_nodes[0],), [node], pooling=how, swallowed=[node]))
        return sorted(found, key=lambda g: self.order[g.nodes[0]])

    def with_squeezes(self, groups: list[Group]) -> list[Group]:
        """Two layers on a mean are one group."""
        by_last = {g.nodes[-1]: g for g in groups if self.is_layer(g)}
        joined = [s for g in by_last.values() if (s := self.squeeze_of(g, by_last)) is not None]
        inside = {node for g in joined for node in g.nodes}
        self.taken |= inside
        squeezed = {g.inputs[0] for g in joined}
        for g in groups:
            last = g.nodes[-1]
            g.is_squeezed = last in squeezed and all(n in inside or self.words.gated(n) for n in last.users)
        return [*(g for g in groups if g.nodes[-1] not in inside), *joined]

    def is_layer(self, group: Group) -> bool:
        """Whether it is a 1x1 convolution and an activation, with nothing else."""
        conv = group.conv
        plain = group.bn is None and group.residual is None and group.activation != "none"
        return plain and conv is not None and self.words.is_pointwise(conv) and self.words.keeps_pixels(conv)

    def squeeze_of(self, excite: Group, layers: dict[fx.Node, Group]) -> Group | None:
        last = excite.nodes[-1]
        if excite.activation not in ("sigmoid", "hardsigmoid") or last.name in self.broadcast:
            return None
        hidden, behind_hidden = self.behind_what_passes(excite.inputs[0])
        reduce = layers.get(hidden)
        if reduce is None:
            return None
        mean, behind_mean = self.behind_what_passes(reduce.inputs[0])
        pooling = self.words.pooled(mean)
        if pooling is None or not pooling.is_mean or not pooling.keepdim or mean in self.taken:
            return None
        if any(self.only_reader(n) is None for n in (mean, *behind_mean, hidden, *behind_hidden)):
            return None
        of_mean = Group(None, None, (mean.all_input_nodes[0],), [mean], pooling=pooling, swallowed=[mean])
        nodes = [mean, *behind_mean, *reduce.nodes, *behind_hidden, *excite.nodes]
        group = dataclasses.replace(
            reduce,
            inputs=of_mean.inputs,
            nodes=nodes,
            activation="none",
            by_hand=False,
            swallowed=[n for n in nodes if n is not reduce.conv],
            squeeze=Squeeze(of_mean, reduce, excite),
        )
        return group if self.may_move_to(group, last, None, None) else None

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

    def with_gates(self, groups: list[Group]) -> list[Group]:
        """Those of gates alone go into the groups of the convolutions that read them."""
        gates = {g.nodes[-1]: g for g in groups if g.is_gate and g.residual is None and g.activation == "none"}
        found = [self.with_gate(g, gates.get(g.inputs[0])) for g in groups]
        inside = {g.gate.name for g in found if g.gate is not None}
        return [g for g in found if not (g.is_gate and g.name in inside)]

    def with_gate(self, group: Group, gate: Group | None) -> Group:
        conv, call = group.conv, None if group.bn is None else self.words.norm(group.bn)
        if gate is None or conv is None or group.steps or not isinstance(call, NormCall) or call.trains:
            return group
        if self.only_reader(gate.nodes[-1]) is not conv or not self.words.is_pointwise(conv):
            return group
        nodes, swallowed = [*gate.nodes, *group.nodes], [*gate.swallowed, *group.swallowed]
        joined = dataclasses.replace(group, inputs=gate.inputs, nodes=nodes, gate=gate, swallowed=swallowed)
        # Its factors are read where the convolution is computed.
        return joined if self.may_move_to(joined, nodes[-1], group.residual, None) else group

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
        layer = self.behind_what_passes(call.input)[0]
        if (word := self.words.layer(layer)) and self.only_reader(layer) is not None:
            group.layer, group.layer_word = layer, word
        self.extend_norm(group, call, trains)
        # The op that concatenates adds no residual.
        if group.residual is None and (concatenates := self.with_concatenation(bn, call)) is not None:
            group = concatenates
            group.note = found.text
            self.extend_norm(group, call, trains)
        return group

    def extend_norm(self, group: Group, call: NormCall, trains: object) -> None:
        group.activation, group.negative_slope, group.function = call.activation, call.negative_slope, call.function
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
        conv, between = self.behind_what_passes(call.input)
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

    def behind_what_passes(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """What made a node's value, and the nodes from there on that returned it."""
        between: list[fx.Node] = []
        while self.words.passes(node) and self.words.may_go(node):
            between.insert(0, node)
            node = node.all_input_nodes[0]
        return node, between

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
                waiting += written(n)
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
            self.memory_of(a) & (read | added if self.order[n] > add else read) for n in writes for a in written(n)
        )

    def writes_attributes(self) -> bool:
        """Whether the graph itself writes to parameters or buffers."""
        return any(
            "get_attr" in self.memory_of(a)
            for n in self.graph.nodes
            if n.op != "call_module" and self.words.is_in_place(n)
            for a in written(n)
        )

    def extend(self, group: Group, trains: object) -> None:
        """What follows, as far as one op has it: a factor, a residual, an activation, or a residual behind it."""
        last = group.nodes[-1]
        waiting: list[fx.Node] = []  # of those that return their argument: they go along with what follows
        while True:
            nodes, change = self.by_hand(group, last)
            if not nodes:
                node = self.only_reader(last)
                if node is None or node in self.taken:
                    return
                if self.words.passes(node) and self.words.may_go(node):
                    waiting.append(node)
                    last = node
                    continue
                nodes, change = [node], self.step(group, node, last)
            if change is None or not self.may_move_to(group, nodes[-1], change.get("residual", group.residual), trains):
                return
            for name, value in change.items():
                setattr(group, name, value)
            group.nodes += [*waiting, *nodes]
            group.swallowed = [*group.swallowed, *waiting, *nodes]
            waiting, last = [], nodes[-1]

    def by_hand(self, group: Group, last: fx.Node) -> tuple[list[fx.Node], dict[str, Any] | None]:
        """SiLU and Mish as several nodes: the result times its own sigmoid, or times the tanh of its softplus."""
        if len(last.users) != 2 or group.activation != "none" or group.residual_last:
            return [], None
        node, product = sorted(last.users, key=self.order.__getitem__)
        nodes = [node]
        while (reader := self.only_reader(nodes[-1])) is not product:
            if reader is None or len(nodes) == 2:
                return [], None
            nodes.append(reader)
        is_product = product.op == "call_function" and product.target in _MULTIPLIES
        if not (is_product or (product.op, product.target) == ("call_method", "mul")) or product.kwargs:
            return [], None
        if len(product.args) != 2 or set(product.args) != {last, nodes[-1]}:
            return [], None
        if any(n in self.taken or self.words.is_in_place(n) or not self.words.may_go(n) for n in nodes):
            return [], None
        if any(n.all_input_nodes != [m] for m, n in zip([last, *nodes], nodes, strict=False)):
            return [], None
        of_last = (self.words.activation(nodes[-1]) or ("",))[0]
        if len(nodes) == 1 and of_last == "sigmoid":
            name = "silu"
        elif len(nodes) == 2 and of_last == "tanh" and self.words.is_softplus(nodes[0]):
            name = "mish"
        else:
            return [], None
        return [*nodes, product], {"activation": name, "by_hand": True}

    def step(self, group: Group, node: fx.Node, last: fx.Node) -> dict[str, Any] | None:
        """What of the group changes when this node, the only reader of what is its result by now, comes along."""
        found = self.words.activation(node)
        if found is not None:
            if group.activation != "none" or group.residual_last or node.all_input_nodes[:1] != [last]:
                return None
            if not self.words.may_go(node):
                return None
            return {"activation": found[0], "negative_slope": 0.01 if found[1] is None else found[1]}
        if node.op != "call_function" and not (node.op == "call_method" and node.target in _METHODS):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        first = node.args[0] is last
        other = node.args[1] if first else node.args[0]
        if isinstance(other, fx.Node) and self.words.is_channelwise(other):
            # No residual, whose shape is the result's.
            may_be = self.channelwise and node.name not in self.broadcast
            return self.affine(group, node, other, first) if may_be else None
        if isinstance(other, (int, float)):
            return self.affine(group, node, other, first)
        if node.target not in (*_ADDS, "add", "add_") or not isinstance(other, fx.Node) or other is last:
            return None
        if group.residual is not None or group.concatenates or node.name in self.broadcast:
            return None
        if self.words.is_in_place(node) and not first:
            # What it adds to is overwritten: nobody else may have it.
            if any(not isinstance(n, fx.Node) or len(n.users) != 1 for n in self.memory_of(other)):
                return None
        return {
            "residual": other,
            "adds": node.name,
            "residual_first": not first,
            "adds_in_place": first and self.words.is_in_place(node),
            "residual_last": group.activation != "none",
        }

    def affine(self, group: Group, node: fx.Node, other: Any, first: bool) -> dict[str, Any] | None:
        """A number, or a tensor of values for each channel, by which BatchNorm's result is changed. ``first``: the
        result is the first of the two."""
        if group.bn is None or group.residual is not None or group.activation != "none":
            return None
        target = node.target
        adds = target in (*_ADDS, "add", "add_")
        is_tensor = isinstance(other, fx.Node)
        number = 1.0 if is_tensor else float(other)
        if is_tensor and self.words.is_in_place(node) and not first:
            return None
        if not is_tensor and target in (*_DIVIDES, "div"):
            target, number = operator.mul, 1.0 / number if first and number != 0 else math.inf
        if target in (*_SUBTRACTS, "sub") and first and not is_tensor:
            adds, number = True, -number
        multiplies = target in (*_MULTIPLIES, "mul")
        if not (adds or multiplies) or not math.isfinite(number):
            return None
        if multiplies and not is_tensor:
            return {"factor": group.factor * number}
        if number == 0:  # what a sum over branches begins with
            return {}
        if not self.channelwise or group.concatenates:
            return None
        operand = other if is_tensor else number
        steps = [*group.steps, *([("*", group.factor)] if adds and group.factor != 1.0 else [])]
        change = {"steps": [*steps, ("+" if adds else "*", operand)], "factor": 1.0 if adds else group.factor}
        return {**change, "inputs": (*group.inputs, other), "channelwise": node.name} if is_tensor else change
