"""Which nodes of a graph one fused op computes: a convolution, its BatchNorm, a factor, a residual, an activation."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import _activations
from ..conditions import has_hooks

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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
_PASSES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Group:
    """Nodes in the order in which they run; the last one is what others read."""

    conv: str | None  # None: the BatchNorm is behind something else
    bn: str
    input: fx.Node
    nodes: list[fx.Node]
    factor: float = 1.0
    residual: fx.Node | None = None
    residual_last: bool = False
    activation: str = "none"
    negative_slope: float = 0.01
    swallowed: list[str] = field(default_factory=list)  # other modules that are not called any more

    def describe(self) -> str:
        parts = ["bn"] if self.conv is None else ["conv", "bn"]
        if self.factor != 1.0:
            parts.append(f"* {self.factor:g}")
        if self.residual is not None and not self.residual_last:
            parts.append("add")
        if self.activation != "none":
            parts.append(self.activation)
        if self.residual_last:
            parts.append("add")
        return " ".join(parts)


def norm_act_parts(bn: nn.Module) -> list[nn.Module]:
    """The modules in timm's BatchNormAct2d, which are called behind its BatchNorm: its dropout and its activation."""
    if type(bn).__name__ != "BatchNormAct2d" or not type(bn).__module__.startswith("timm."):
        return []
    return [m for m in (bn._modules.get("drop"), bn._modules.get("act")) if m is not None]


def norm_activation(bn: nn.Module) -> tuple[str, float | None] | None:
    """(name, slope) of what is called behind its BatchNorm; None for modules that are no such thing, or not known."""
    parts = norm_act_parts(bn)
    if len(parts) != 2 or not isinstance(bn, nn.BatchNorm2d) or type(parts[0]) is not nn.Identity:
        return None
    if any(map(has_hooks, (bn, *parts))):
        return None
    return _activations.named(parts[1])


def is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it writes to one of its arguments, or may."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        inplace = node.kwargs.get("inplace", len(node.args) > 1 and node.args[1] is True)
        return (
            name in ("iadd", "imul", "isub", "itruediv", "setitem")
            or (name.endswith("_") and not name.endswith("__"))
            or inplace is True
            or "out" in node.kwargs
        )
    return False


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, float | None] | None:
    """(name, negative slope) of a node that is an activation of its first argument and nothing else."""
    if node.op == "call_module":
        found = _activations.named(modules[str(node.target)])
        return None if found is None or found[0] == "none" else found
    if node.op == "call_method":
        name = str(node.target).rstrip("_")
        return (name, None) if name in ("relu", "sigmoid", "tanh") and not node.kwargs else None
    if node.op != "call_function":
        return None
    arguments = dict(zip(("input", "a", "b"), node.args, strict=False)) | node.kwargs
    arguments.pop("inplace", None)
    if node.target is F.hardtanh and [arguments.pop("min_val", None), arguments.pop("max_val", None)] == [0.0, 6.0]:
        return "relu6", None
    if node.target is F.gelu and arguments.get("approximate", "none") in ("none", "tanh"):
        return ("gelu_tanh" if arguments.get("approximate") == "tanh" else "gelu"), None
    if node.target is F.leaky_relu:
        slope = arguments.get("negative_slope", arguments.get("a", 0.01))
        return ("leaky_relu", slope) if isinstance(slope, float) else None
    found = _activations.named(node.target) if callable(node.target) else None
    if found is None or found[0] == "none" or any(isinstance(v, fx.Node) for k, v in arguments.items() if k != "input"):
        return None
    return found


def _passes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it returns its argument: nn.Identity, and a dropout or torchvision's stochastic depth in evaluation."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth":
        return (list(node.args) + [node.kwargs.get("training", True)])[3:4] == [False]
    if node.op != "call_module" or type(module := modules[str(node.target)]) not in _PASSES:
        return False
    return type(module) is nn.Identity or not module.training


class Matcher:
    """Finds the groups of a graph. ``free``: paths of modules whose calls nobody watches, so that they may go."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], free: set[str]) -> None:
        self.graph, self.modules, self.free = graph, modules, free
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.taken: set[fx.Node] = set()
        self.why: dict[str, str] = {}

    def groups(self) -> list[Group]:
        found = []
        for node in self.graph.nodes:
            if node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.modules.batchnorm._BatchNorm):
                group = self.group_of(node)
                if isinstance(group, str):
                    self.why[str(node.target)] = group
                    module = self.modules[str(node.target)]
                    known = type(module) in NORMS or norm_activation(module) is not None
                    if not known or len(node.args) != 1 or node.kwargs:
                        continue
                    group = Group(None, str(node.target), node.args[0], [node])
                    self.begin(group)
                    self.extend(group)
                self.taken |= set(group.nodes)
                found.append(group)
        return found

    def begin(self, group: Group) -> None:
        """With what the BatchNorm has in itself."""
        found = norm_activation(self.modules[group.bn])
        if found is not None:
            group.activation, slope = found
            group.negative_slope = 0.01 if slope is None else slope

    def may_go(self, node: fx.Node) -> bool:
        """Whether nobody watches its call."""
        return node.op != "call_module" or str(node.target) in self.free

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def group_of(self, bn: fx.Node) -> Group | str:
        module = self.modules[str(bn.target)]
        known = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or norm_activation(module) is not None
        if not known:
            return f"it is of class {type(module).__name__}, which no fused op covers yet"
        if len(bn.args) != 1 or bn.kwargs or not isinstance(bn.args[0], fx.Node):
            return "it is called with more than its input"
        between: list[fx.Node] = []
        conv = bn.args[0]
        while _passes(conv, self.modules) and self.may_go(conv):
            between.insert(0, conv)
            conv = conv.args[0]  # type: ignore[assignment]
        if conv.op != "call_module" or type(self.modules[str(conv.target)]) is not nn.Conv2d:
            return "what it reads is not the result of an nn.Conv2d"
        if len(conv.args) != 1 or conv.kwargs:
            return "its convolution is called with more than its input"
        if any(self.only_reader(n) is None for n in (conv, *between)):
            return "its convolution's result is read by others as well"
        if conv in self.taken:
            return "its convolution belongs to another group"
        group = Group(str(conv.target), str(bn.target), conv.args[0], [conv, *between, bn])  # type: ignore[arg-type]
        group.swallowed += [str(n.target) for n in between if n.op == "call_module"]
        self.begin(group)
        self.extend(group)
        return group

    def memory_of(self, node: fx.Node) -> set[fx.Node]:
        """Nodes whose memory this one's result may be: its own, unless it may be a view of an argument."""
        found, waiting = set(), [node]
        while waiting:
            n = waiting.pop()
            if n in found:
                continue
            found.add(n)
            if n.op == "call_module":
                module = self.modules[str(n.target)]
                fresh = isinstance(module, _FRESH) and not is_in_place(n, self.modules)
            else:
                fresh = n.op == "call_function" and n.target in _FRESH_FUNCTIONS
            if not fresh:
                waiting += n.all_input_nodes
        return found

    def may_move_to(self, group: Group, node: fx.Node, residual: fx.Node | None) -> bool:
        """Whether nothing that the group reads is written between its convolution and this node."""
        inside = {*group.nodes, node}
        first, last = self.order[group.nodes[0]], self.order[node]
        between = [n for n, i in self.order.items() if first < i < last and n not in inside]
        # In training mode a BatchNorm writes its statistics: calls of one stay in their order.
        bn = self.modules[group.bn]
        if bn.training and any(n.op == "call_module" and self.modules[str(n.target)] is bn for n in between):
            return False
        writes = [n for n in between if is_in_place(n, self.modules)]
        if not writes:
            return True
        read = self.memory_of(group.input) | (set() if residual is None else self.memory_of(residual))
        # A residual's own last step may be to write in place: that comes before it is read, here as there.
        return not any(
            n is not residual and any(self.memory_of(a) & read for a in n.all_input_nodes[:1]) for n in writes
        )

    def extend(self, group: Group) -> None:
        """What follows, as far as one op has it: a factor, a residual, an activation, or a residual behind it."""
        last = group.nodes[-1]
        waiting: list[fx.Node] = []  # of those that return their argument: they go along with what follows
        while (node := self.only_reader(last)) is not None and node not in self.taken:
            if _passes(node, self.modules) and self.may_go(node):
                waiting.append(node)
                last = node
                continue
            change = self.step(group, node, last)
            if change is None or not self.may_move_to(group, node, change.get("residual", group.residual)):
                return
            for name, value in change.items():
                setattr(group, name, value)
            swallowed = [*waiting, node]
            group.nodes += swallowed
            group.swallowed += [str(n.target) for n in swallowed if n.op == "call_module"]
            waiting, last = [], node

    def step(self, group: Group, node: fx.Node, last: fx.Node) -> dict[str, Any] | None:
        """What of the group changes when this node, the only reader of what is its result by now, comes along."""
        found = activation_of(node, self.modules)
        if found is not None:
            if group.activation != "none" or group.residual_last or node.args[:1] != (last,):
                return None
            if not self.may_go(node):
                return None
            return {"activation": found[0], "negative_slope": 0.01 if found[1] is None else found[1]}
        if node.op != "call_function" and not (node.op == "call_method" and node.target in ("add", "add_", "mul")):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        other = node.args[1] if node.args[0] is last else node.args[0]
        if node.target in (*_MULTIPLIES, "mul"):
            if not isinstance(other, (int, float)) or group.residual is not None or group.activation != "none":
                return None
            return {"factor": group.factor * other}
        if node.target not in (*_ADDS, "add", "add_") or not isinstance(other, fx.Node) or other is last:
            return None
        if group.residual is not None:
            return None
        if is_in_place(node, self.modules) and node.args[0] is not last:
            # What it adds to is overwritten: nobody else may have it.
            mine = other.op == "call_module" and len(other.users) == 1 and not _passes(other, self.modules)
            if not mine or is_in_place(other, self.modules):
                return None
        return {"residual": other, "residual_last": group.activation != "none"}
