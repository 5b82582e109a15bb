"""Consecutive groups of a snapshot as one op, which keeps what lies between them in memory of its own.

A chain is a run of a graph's nodes: convolutions of this package's packed kernel, the gates and means of
squeeze-and-excite blocks, and a classifier's mean and nn.Linear. What others read of it are its results. Calls that the
op refuses run group by group.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .frozen import PackedConv, packed_conv
from .patterns import Group
from .words import ModuleWords

Calls = Sequence[Callable[..., Any]]
_op = torch.ops.fused_conv_bn._conv_packed_chain.default._op
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_CONV, _DEPTHWISE, _MEAN, _GATE = range(4)
_LINE = 16
"""Floats in a line of the caches, where each weight begins."""


def call_block(calls: Calls, index: int, x: Any, residual: Tensor | None = None) -> Any:
    """What a graph has in the place of a group, and of a chain."""
    return calls[index](x, residual)


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<fused_conv_bn.fuse>", "exec"), scope)
    run: Callable[..., Any] = scope["forward"]
    return run


class Link(NamedTuple):
    """A node of a chain that is no group, and whether its result has but two dimensions."""

    kind: str  # mean, same or linear
    is_flat: bool
    linear: nn.Linear | None = None


def links_of(graph: fx.Graph, words: ModuleWords) -> dict[fx.Node, Link]:
    """Of a graph in which groups are called, where nobody watches these calls."""
    found: dict[fx.Node, Link] = {}
    for node in graph.nodes:
        if words.may_go(node) and node.all_input_nodes and (link := _link(node, words, found)) is not None:
            found[node] = link
    return found


def _link(node: fx.Node, words: ModuleWords, found: dict[fx.Node, Link]) -> Link | None:
    m, read = words.module(node), node.all_input_nodes[0]
    before = found.get(read)
    named = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    named.pop("input", None)
    is_function = node.op in ("call_function", "call_method")
    if (pooling := words.pooled(node)) is not None and pooling.is_mean:
        return Link("mean", not pooling.keepdim)
    if before is None:
        return None
    # Behind a mean there is a row of channels for each image.
    is_flatten = is_function and node.target in ("flatten", torch.flatten) and list(named.values()) == [1]
    if is_flatten or (type(m) is nn.Flatten and (m.start_dim, m.end_dim) == (1, -1)):
        return Link("same", True)
    if words.passes(node):
        return Link("same", before.is_flat)
    if before.is_flat and type(m) is nn.Linear and type(m.weight) is nn.Parameter:
        if m.weight.is_cpu and m.weight.dtype == torch.float32:
            return Link("linear", True, m)
    return None


def chain_groups(
    graph: fx.Graph, groups: Sequence[Group], calls: list[Callable[..., Any]], links: dict[fx.Node, Link]
) -> bool:
    """Puts chains into a graph whose groups have run once, and their calls behind those of the groups.

    Returns whether there is one.
    """
    convs, gates = set(), set()
    for node in graph.nodes:
        if node.target is call_block:
            convs |= {node} if packed_conv(calls[node.args[1]]) is not None else set()
            gates |= {node} if groups[node.args[1]].is_gate else set()
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        link = links.get(node)
        continues = link is not None and (link.kind == "mean" or node.all_input_nodes[0] in runs[-1])
        if not (node in convs or node in gates or continues):
            runs.append([])
        else:
            runs[-1].append(node)
    # A classifier alone is worth it: PyTorch reads its weights in one thread where there is one image.
    linears = {node for node, link in links.items() if link.kind == "linear"}
    runs = [nodes for nodes in runs if len(convs.intersection(nodes)) > 1 or not linears.isdisjoint(nodes)]
    for nodes in runs:
        found = Chain(nodes, groups, calls[: len(groups)], links)
        with graph.inserting_before(nodes[0]):
            every = next(iter(graph.nodes))  # the first placeholder: all calls
            results = graph.call_function(call_block, (every, len(calls), tuple(found.inputs)))
            for i, node in enumerate(found.results):
                result = graph.call_function(operator.getitem, (results, i))
                for user in [u for u in node.users if u not in nodes]:
                    user.replace_input_with(node, result)
        for node in reversed(nodes):
            graph.erase_node(node)
        calls.append(found)
    return bool(runs)


class Chain:
    """The op and its arguments, and the same group by group."""

    def __init__(self, nodes: list[fx.Node], groups: Sequence[Group], calls: Calls, links: dict[fx.Node, Link]) -> None:
        inside = set(nodes)
        read = {n: _read(n) for n in nodes}
        self.inputs = list(dict.fromkeys(r for n in nodes for r in read[n] if r not in inside))
        self.results = [n for n in nodes if not inside.issuperset(n.users)]
        linears = [m for n in nodes if n in links and (m := links[n].linear) is not None]
        self.calls = [*calls, *map(_linear_call, linears)]
        self.by_groups = self._by_groups(nodes, len(calls), links)
        program = _Program(self.inputs)
        for node in nodes:
            if node.target is call_block:
                index: int = node.args[1]  # type: ignore[assignment]
                program.add_group(node, read[node], groups[index], packed_conv(calls[index]))
            elif links[node].kind == "mean":
                program.add(node, _MEAN, read[node][0])
            elif links[node].kind == "same":
                program.values[node] = program.values[read[node][0]]
            else:
                program.add_linear(node, read[node][0], links[node].linear)
        self.arguments, places = program.finish(self.results)
        # Of each result, which of the op's it is, and whether with two dimensions.
        self.picks = [(at, n in links and links[n].is_flat) for at, n in zip(places, self.results, strict=True)]

    def __call__(self, inputs: tuple[Any, ...], residual: None = None) -> Sequence[Tensor]:
        if all(type(x) is Tensor for x in inputs) and not _is_any_autocast_enabled():
            try:
                results = _op(inputs, *self.arguments)
            except (RuntimeError, TypeError):
                pass
            else:
                return [results[at].flatten(1) if is_flat else results[at] for at, is_flat in self.picks]
        found: Sequence[Tensor] = self.by_groups(None, self.calls, *inputs)
        return found

    def _by_groups(self, nodes: list[fx.Node], linear: int, links: dict[fx.Node, Link]) -> Callable[..., Any]:
        """``linear``: the index of the first one's call."""
        graph = fx.Graph()
        calls = graph.placeholder("fused_calls")
        copies = {n: graph.placeholder(n.name) for n in self.inputs}
        for node in nodes:
            if (link := links.get(node)) is None:
                copies[node] = graph.node_copy(node, lambda n: copies.get(n, calls))
                continue
            x = copies[node.all_input_nodes[0]]
            if link.kind == "mean":
                copies[node] = graph.call_function(torch.mean, (x, (2, 3), not link.is_flat))
            elif link.kind == "same":
                copies[node] = graph.call_function(torch.flatten, (x, 1)) if link.is_flat else x
            else:
                copies[node] = graph.call_function(call_block, (calls, linear, x))
                linear += 1
        graph.output([copies[n] for n in self.results])
        return compiled(graph)


def _linear_call(m: nn.Linear) -> Callable[..., Tensor]:
    return lambda x, residual: m(x)


def _read(node: fx.Node) -> list[Any]:
    """What a node of a chain reads: a gate's two factors, a residual behind them."""
    if node.target is not call_block:
        return node.all_input_nodes[:1]
    argument = node.args[2]
    return [*(argument if isinstance(argument, tuple) else (argument,)), *node.args[3:]]


class _Program:
    """Steps as the op takes them, with all that is packed in one tensor."""

    def __init__(self, inputs: list[fx.Node]) -> None:
        self.values = {n: i for i, n in enumerate(inputs)}
        self.inputs = len(inputs)
        self.rows: list[list[int]] = []
        self.activations: list[str] = []
        self.pieces: list[Tensor] = []
        self.kernels: list[tuple[PackedConv, int, int]] = []
        self.size = 0

    def add_group(self, node: fx.Node, read: list[fx.Node], group: Group, kernel: PackedConv | None) -> None:
        epilogue = group.activation, group.negative_slope, group.residual_last
        residual = None if group.residual is None else read[-1]
        if kernel is None:
            self.add(node, _GATE, read[0], residual, read[1], epilogue=epilogue)
        else:
            self.add(node, _CONV, read[0], residual, kernel=kernel, epilogue=epilogue)

    def add_linear(self, node: fx.Node, read: fx.Node, m: Any) -> None:
        weight = m.weight.detach()
        shift = torch.zeros(weight.shape[0]) if m.bias is None else m.bias.detach()
        kernel = PackedConv(weight[:, :, None, None], shift, ((1, 1), (0, 0), (1, 1)))
        self.add(node, _CONV, read, kernel=kernel)

    def add(
        self,
        node: fx.Node,
        kind: int,
        read: fx.Node,
        residual: fx.Node | None = None,
        gate: fx.Node | None = None,
        kernel: PackedConv | None = None,
        epilogue: tuple[str, float, bool] = ("none", 0.0, False),
    ) -> None:
        name, slope, residual_last = epilogue
        if name not in self.activations:
            self.activations.append(name)
        weight, shift, window = 0, 0, [0] * 10
        if kernel is not None:
            is_depthwise = kernel.weight.dim() == 3
            kind = _DEPTHWISE if is_depthwise else kind
            weight, shift = self._put(kernel.weight), self._put(kernel.shift)
            *extent, channels = kernel.weight.shape if is_depthwise else kernel.weight.shape[1:4]
            window = [channels, kernel.filters, *extent, *(v for values in kernel.window for v in values)]
            self.kernels.append((kernel, weight, shift))
        values = [-1 if n is None else self.values[n] for n in (read, residual, gate)]
        packed = weight, shift, self._put(torch.tensor([slope]))
        self.values[node] = self.inputs + len(self.rows)
        last = self.activations.index(name), int(residual_last), 0
        self.rows.append([kind, *values, *packed, *window, *last])

    def _put(self, t: Tensor) -> int:
        """Where it begins."""
        at = self.size
        self.pieces.append(F.pad(t.flatten(), (0, -t.numel() % _LINE)))
        self.size += self.pieces[-1].numel()
        return at

    def finish(self, results: list[fx.Node]) -> tuple[tuple[Tensor, Tensor, str], list[int]]:
        """The op's arguments, and for each node which one of its results that is.

        The kernels' weights are views of the packed ones from now on.
        """
        steps = [self.values[n] - self.inputs for n in results]
        for i in steps:
            self.rows[i][-1] = 1
        packed = torch.cat(self.pieces)
        for kernel, weight, shift in self.kernels:
            kernel.weight = packed[weight:][: kernel.weight.numel()].view(kernel.weight.shape)
            kernel.shift = packed[shift:][: kernel.shift.numel()]
        places = [sorted(set(steps)).index(i) for i in steps]
        return (packed, torch.tensor(self.rows), ",".join(self.activations)), places
