"""A contiguous model in channels_last inside: a root's graph with conversions at its border.

The general convolution kernels take channels_last alone, and most models are contiguous. Where it pays, a root
converts what it is given, and gives its results the strides that eager's have. Values do not depend on strides. What
does: whether there is a ``view``, whether a reshape is a copy or one more view of what is written to, and who shares
memory with an argument. A graph in which somebody could tell the difference stays as it is, and so does one with
anything that is not known here.
"""

from __future__ import annotations

import functools
import gc
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._graphs.model import Looked
from .blocks import Block
from .chain import call_block, compiled
from .layers import class_of_conv, is_conv, is_norm, norm_of
from .patterns import Group
from .words import ModuleWords

if TYPE_CHECKING:
    from .entry import Entry

Difference: TypeAlias = "Callable[[Any, Any], str | None]"

DEVICES = {"cuda"}
"""Those that this package has kernels for which take channels_last alone."""

# ---- which graphs ----------------------------------------------------------------------------------------------------

_FRESH, _SAME, _VIEW, _PART, _TURNED, _NUMBER = "fresh", "same", "view", "part", "turned", "number"
"""What a node makes: memory of its own; its argument, or a copy of it whatever the strides; a view that is a copy where
strides do not allow one; a part of its argument; one whose dimensions have another order or no memory; no tensor."""

_POINTWISE = (
    *("add", "sub", "mul", "div", "neg", "abs", "exp", "sqrt", "rsqrt", "square", "pow", "clamp", "clip"),
    *("maximum", "minimum", "sigmoid", "tanh", "relu"),
)
_KINDS_OF_FUNCTIONS: dict[str, tuple[str, ...]] = {
    _FRESH: (
        *_POINTWISE,
        *("truediv", "iadd", "isub", "imul", "itruediv", "relu_", "sigmoid_", "tanh_", "clamp_"),
        *("relu6", "silu", "hardswish", "hardsigmoid", "hardtanh", "gelu", "leaky_relu", "elu", "selu", "mish"),
        *("softplus", "logsigmoid", "softmax", "log_softmax", "prelu", "layer_norm", "group_norm", "linear"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "pad"),
        *("cat", "concat", "concatenate", "stack", "mean", "sum", "amax", "pixel_shuffle"),
    ),
    _VIEW: ("flatten", "reshape"),
    _PART: ("chunk", "split"),
    _TURNED: ("permute", "transpose"),
    _NUMBER: ("floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge", "_assert"),
}
_FUNCTIONS: dict[Any, str] = {
    getattr(of, name): kind
    for kind, names in _KINDS_OF_FUNCTIONS.items()
    for name in names
    for of in (operator, torch, F, torch._C._nn)
    if hasattr(of, name)
}
_METHODS: dict[str, str] = {
    **dict.fromkeys((*_POINTWISE, *(f"{name}_" for name in _POINTWISE)), _FRESH),
    **dict.fromkeys(("mean", "sum", "amax", "softmax", "log_softmax", "clone"), _FRESH),
    **dict.fromkeys(("float", "half", "bfloat16", "double", "type_as", "detach", "to"), _SAME),
    **dict.fromkeys(("flatten", "reshape", "view", "contiguous", "squeeze", "unsqueeze"), _VIEW),
    **dict.fromkeys(("chunk", "split", "narrow", "select"), _PART),
    **dict.fromkeys(("permute", "transpose", "expand", "expand_as"), _TURNED),
    **dict.fromkeys(("size", "dim", "numel", "is_floating_point"), _NUMBER),
}
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
_MODULES: dict[type[nn.Module], str] = {
    nn.Flatten: _VIEW,
    **dict.fromkeys(
        (
            *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.GELU),
            *(nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.PReLU, nn.Softplus, nn.LogSigmoid, nn.Softsign),
            *(nn.Softmax, nn.LogSoftmax, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.ConvTranspose2d),
            *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle),
            *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
            *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
        ),
        _FRESH,
    ),
}


class _Value(NamedTuple):
    """``dense``: whether eager's tensor is contiguous, whatever the sizes; None: its dimensions are in order at least.
    ``memory``: the nodes that made what it may lie in."""

    is_tensor: bool
    dense: bool | None = True
    memory: frozenset[Any] = frozenset()


_ANOTHER = _Value(False)


class _Unknown(Exception):
    """A node of which nobody knows what strides do to it."""


class _Graph:
    """A graph in which the groups are called, looked through: raises :class:`_Unknown`."""

    def __init__(self, graph: fx.Graph, words: ModuleWords) -> None:
        self.words = words
        self.values: dict[fx.Node, _Value] = {}
        self.copies: list[fx.Node] = []  # those that may be a copy where eager's is a view
        self.views: set[fx.Node] = set()  # calls of Tensor.view, which reshape() does as well
        for node in graph.nodes:
            self.values[node] = self._value(node)
            if node.op != "output" and words.is_in_place(node) and not self._passes(node):
                self._written(node)
        self._look_at_results(next(n for n in reversed(graph.nodes) if n.op == "output"))

    def _of(self, value: Any) -> list[_Value]:
        """The tensors in an argument."""
        found: list[_Value] = []
        fx.map_arg(value, lambda n: found.append(self.values[n]))
        return [v for v in found if v.is_tensor]

    def _value(self, node: fx.Node) -> _Value:
        if node.op == "placeholder":
            return _Value(True, True, frozenset({"placeholder"})) if node.target != "fused_calls" else _ANOTHER
        if node.op == "get_attr":
            return _Value(True, None, frozenset({"get_attr"}))
        if _puts_out(node):
            return _ANOTHER
        kind = self._kind(node)
        read = self._of((node.args, node.kwargs))
        if kind == _NUMBER or not read:
            return _ANOTHER
        if kind == _FRESH and not self.words.is_in_place(node):
            return _Value(True, False if any(v.dense is False for v in read) else True, frozenset({node}))
        first = self._of(node.args[:1])
        if len(first) != 1:
            raise _Unknown
        value = first[0]
        if kind == _PART:
            return value._replace(dense=False if value.dense is False else None)
        if kind == _TURNED:
            return value._replace(dense=False)
        if kind == _VIEW:
            self.copies.append(node)
            if node.target == "view":
                # Of a contiguous tensor it is what reshape() is. (Of another dtype it is something else.)
                if not value.dense or any(isinstance(a, torch.dtype) for a in node.args) or node.kwargs:
                    raise _Unknown
                self.views.add(node)
            if node.target == "contiguous":
                if len(node.args) > 1 or node.kwargs:
                    raise _Unknown
                return value._replace(dense=True)
        return value

    def _passes(self, node: fx.Node) -> bool:
        return self.words.passes(node) and self.words.may_go(node)

    def _kind(self, node: fx.Node) -> str:
        if node.target is call_block:
            return _FRESH
        if self._passes(node):
            return _SAME
        if "memory_format" in node.kwargs or "out" in node.kwargs:
            raise _Unknown
        kind: str | None
        if node.op == "call_module":
            kind = self._kind_of_module(node)
        elif node.op == "call_method":
            kind = _METHODS.get(str(node.target))
            if node.target == "to" and any(isinstance(a, torch.memory_format) for a in node.args):
                raise _Unknown
        elif node.target is getattr:
            kind = _NUMBER if node.args[1] in _ATTRIBUTES else None
        elif node.target is operator.getitem:
            # Of a shape or a list of parts; or a slice, which is a view. With tensors as indices it would be no view.
            kind = None if self._of(node.args[1]) else _PART
        else:
            kind = _FUNCTIONS.get(node.target)
        if kind is None or (node.kwargs.get("return_indices") or node.kwargs.get("training")):
            raise _Unknown
        return kind

    def _kind_of_module(self, node: fx.Node) -> str | None:
        m = self.words.module(node)
        if m is None or not self.words.may_go(node) or getattr(m, "return_indices", False):
            return None
        if is_norm(m):
            return None if m.training or norm_of(m) is None else _FRESH
        if is_conv(m) and (class_of_conv(m) is not None or _pads_first(m)):
            return _FRESH
        return _MODULES.get(type(m))

    def _written(self, node: fx.Node) -> None:
        """Arguments are copies at the border. What is written to shows in every view, and not in a copy before it."""
        written = self._of(node.args[:1])
        if not written:
            return
        memory = written[0].memory
        if memory & {"placeholder", "get_attr"} or any(memory & self.values[n].memory for n in self.copies):
            raise _Unknown

    def _look_at_results(self, output: fx.Node) -> None:
        """Contiguous in eager, and each of memory that is nobody else's."""
        self.results = _results(output)
        seen: set[Any] = {"placeholder", "get_attr"}
        for node in self.results:
            value = self.values[node]
            if not value.is_tensor or node.op == "placeholder":  # which is put out as it came
                continue
            if not value.dense or value.memory & seen:
                raise _Unknown
            seen |= value.memory


def _pads_first(m: nn.Module) -> bool:
    """timm's convolutions of TensorFlow's padding, which depends on the input's size."""
    return type(m).__name__ == "Conv2dSame" and type(m).__module__.startswith("timm.")


def _results(output: fx.Node) -> list[fx.Node]:
    """What a graph puts out, also in containers of its own."""
    found: dict[fx.Node, None] = {}
    waiting: list[fx.Node] = list(output.all_input_nodes)
    while waiting:
        node = waiting.pop(0)
        if _puts_out(node):
            waiting += node.all_input_nodes
        else:
            found[node] = None
    return list(found)


def inside_of(graph: fx.Graph, words: ModuleWords, tensors: Iterable[Tensor]) -> Inside | None:
    """What computes the graph with channels_last inside; None where somebody could tell, but by the time.

    ``tensors``: the arguments. They may be others, of the same kinds.
    """
    if not {t.device.type for t in tensors} <= DEVICES:
        return None
    try:
        found = _Graph(graph, words)
    except _Unknown:
        return None
    other = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    other.output(other.graph_copy(graph, twins))
    for node in found.views:
        twins[node].target = "reshape"
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target != "fused_calls":
            with other.inserting_after(_last_placeholder(other)):
                converted = other.call_function(_inwards, (twins[node],))
            readers = [n for n in twins[node].users if n is not converted and not _puts_out(n)]
            twins[node].replace_all_uses_with(converted, delete_user_cb=readers.__contains__)
    for node in found.results:
        if found.values[node].is_tensor and node.op != "placeholder":
            twin = twins[node]
            with other.inserting_after(twin):
                converted = other.call_function(_outwards, (twin,))
            twin.replace_all_uses_with(converted, delete_user_cb=_puts_out)
    return Inside(compiled(other))


def _puts_out(node: fx.Node) -> bool:
    return node.op == "output" or node.target is OrderedDict


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [n for n in graph.nodes if n.op == "placeholder"][-1]


# ---- the border ------------------------------------------------------------------------------------------------------


def _is_image(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_floating_point()


def is_plain(t: Tensor) -> bool:
    """Whether it has the strides of a contiguous tensor also where extents of 1 leave a choice."""
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True


def _inwards(t: Tensor) -> Tensor:
    if not _is_image(t):
        return t
    if not t.is_contiguous(memory_format=torch.channels_last):
        return t.contiguous(memory_format=torch.channels_last)
    n, c, h, w = t.shape  # one channel, or one pixel: a convolution would take it for contiguous
    return t.as_strided((n, c, h, w), (c * h * w, 1, w * c, c))


def _outwards(t: Any) -> Any:
    return t if not isinstance(t, Tensor) or is_plain(t) else t.clone(memory_format=torch.contiguous_format)


def _are_contiguous(tensors: Iterable[Tensor]) -> bool:
    """Whether eager would be contiguous from its first convolution on."""
    return not any(t.dim() == 4 and not is_plain(t) and _reads_as_channels_last(t) for t in tensors)


def _reads_as_channels_last(t: Tensor) -> bool:
    """Whether a convolution would put out channels_last: t.suggest_memory_format() of C++."""
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = t.shape[d], t.stride(d)
        if size == 0 or stride < least or (d == 1 and stride == 0) or (d == 0 and least == t.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


# ---- where it pays ---------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a call showed: the elements that are read and written by convolutions that this package's kernels take in
    channels_last alone; by those that have to do without one there; and what is converted, each time."""

    gained: Sequence[int]
    lost: Sequence[int]
    converted: Sequence[int]


def pays(seen: Seen) -> bool:
    """Whether the root is faster for it.

    cuDNN converts what a contiguous convolution in 16 bits reads and writes, and the pass behind it reads and writes
    the result once more. So a gained one saves about what conversions of as many elements cost. Half of that has to be
    left, and two convolutions for each conversion, whose launch costs as well where tensors are small.
    """
    costs = [*seen.lost, *seen.converted]
    return len(seen.gained) > 2 * len(costs) and sum(seen.gained) > 2 * sum(costs)


class _Trial:
    """A call of the graph with each group compared: the op in channels_last with PyTorch's ops as eager calls them.

    What goes on is PyTorch's result, so that roundings do not add up.
    """

    def __init__(self, groups: Sequence[Group], blocks: Sequence[Block], calls: Sequence[Any], difference: Difference):
        self.groups, self.blocks, self.quick, self.difference = groups, blocks, calls, difference
        self.is_right = True
        self.gained: list[int] = []
        self.lost: list[int] = []
        self.algorithms: dict[str, str] = {}
        self.calls = [functools.partial(self._call, i) for i in range(len(blocks))]

    def _call(self, index: int, x: Any, residual: Tensor | None = None) -> Tensor:
        block = self.blocks[index]
        plain: Any = tuple(map(_outwards, x)) if type(x) is tuple else _outwards(x)
        plain_residual = _outwards(residual)
        expected = block.plain(plain, plain_residual)
        got = self.quick[index](x, residual)
        self.is_right &= self.difference(got, expected) is None
        if (algorithm := block.algorithm(x, residual)) is not None:
            self.algorithms[str(self.groups[index].conv.target)] = algorithm  # type: ignore[union-attr]
            self._count(block, x, expected, _is_own(algorithm), _is_own(block.algorithm(plain, plain_residual)))
        return _inwards(expected)

    def _count(self, block: Block, x: Any, y: Tensor, is_own: bool, was_own: bool) -> None:
        elements = sum(t.numel() for t in (*(x if type(x) is tuple else (x,)), y))
        if is_own and not was_own:
            self.gained.append(elements)
        # PyTorch's grouped convolutions have no tensor cores' kernels in channels_last but of late.
        elif not is_own and (was_own or block.conv_twin.groups > 1):
            self.lost.append(elements)


def _is_own(algorithm: str | None) -> bool:
    return algorithm is not None and algorithm.split()[0].rstrip(",") != "aten"


class Inside:
    """A root's graph with channels_last inside. ``is_on``: whether it is what runs, which a first call decides."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.is_on = run, False

    def takes(self, tensors: Iterable[Tensor]) -> bool:
        return self.is_on and _are_contiguous(tensors)

    def decide(
        self,
        root: nn.Module,
        entry: Entry,
        tensors: Sequence[Tensor],
        expected: Any,
        changed: set[str],
        may_change: bool,
        difference: Difference,
    ) -> None:
        """Behind the first call, whose result was ``expected``; ``tensors`` are copies of its arguments.

        ``changed``: paths of convolutions whose weights have got other strides. Once there are some, results in
        eager's strides take conversions in any case. ``may_change``: whether there may be more of them from now on.
        """
        if not _are_contiguous(tensors) or not any(map(_is_image, tensors)):
            return
        results = [t for t in torch.utils._pytree.tree_leaves(expected) if isinstance(t, Tensor)]
        if not (changed or all(map(is_plain, results))):
            return
        trial = _Trial(entry.groups, entry.blocks, entry.quick, difference)
        try:
            got = self.run(root, trial.calls, *tensors)
        except Exception:
            return
        if not trial.is_right or difference(got, expected) is not None:
            return
        weights = _weights_of(root, entry.called)
        free = {path for path, p in weights.items() if may_change and _may_change(p)}
        converted = [t.numel() for t in (*filter(_is_image, tensors), *filter(_is_image, results))]

        def is_worth_it() -> bool:
            copied = [p.numel() for path, p in weights.items() if path not in free]
            return bool(changed) or pays(Seen(trial.gained, trial.lost, [*converted, *copied]))

        if not is_worth_it():
            return
        if free and (held := free & _held_by_others(root, weights)):
            free -= held
            if not is_worth_it():
                return
        try:
            _change_strides({path: weights[path] for path in free}, changed)
        except torch.OutOfMemoryError:
            return
        entry.algorithms |= trial.algorithms
        self.is_on = True


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weights_of(root: nn.Module, called: Iterable[str]) -> dict[str, nn.Parameter]:
    """Of the convolutions that are called, those that a kernel would bring to channels_last at every call."""
    found = {}
    for path in called:
        m = root.get_submodule(path)
        weight = m._parameters.get("weight") if class_of_conv(m) is nn.Conv2d else None
        if weight is not None and not weight.is_contiguous(memory_format=torch.channels_last):
            found[path] = weight
    return found


def _may_change(p: nn.Parameter) -> bool:
    """Whether nobody but its module has its memory, and nothing is kept that has its strides, as gradients are."""
    if type(p) is not nn.Parameter or p.layout is not torch.strided or p.is_inference() or p.grad is not None:
        return False
    storage = p.untyped_storage()
    owns = p.storage_offset() == 0 and is_plain(p) and storage.nbytes() == p.numel() * p.element_size()
    return owns and not (p.is_cpu and p.is_shared()) and _has_one_user(storage)


def _has_one_user(storage: torch.UntypedStorage) -> bool:
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) <= _USERS_OF_ONE


def _users_of_one() -> int:
    count = getattr(torch._C, "_storage_Use_Count", None)
    t = torch.empty(1)
    storage = t.untyped_storage()
    return count(storage._cdata) if count is not None else 0


_USERS_OF_ONE = _users_of_one()


def _held_by_others(root: nn.Module, weights: dict[str, nn.Parameter]) -> set[str]:
    """Which of them somebody beside their modules has: an optimizer, whose own tensors have their strides."""
    own = {id(m._parameters) for m in root.modules()} | {id(weights)}
    held: set[int] = set()
    for referrer in gc.get_referrers(*weights.values()):
        if id(referrer) not in own and type(referrer) is not Looked:
            held.update(map(id, gc.get_referents(referrer)))
    return {path for path, p in weights.items() if id(p) in held}


def _change_strides(weights: dict[str, nn.Parameter], changed: set[str]) -> None:
    """Adds the paths of those that have got them, which :func:`give_back` wants of all, also where memory runs out."""
    with torch.inference_mode(False), torch.no_grad():
        for path, p in weights.items():
            p.data = p.data.contiguous(memory_format=torch.channels_last)
            changed.add(path)


def give_back(root: nn.Module, changed: set[str]) -> None:
    """Their own strides to those that still have ours."""
    modules = dict(root.named_modules(remove_duplicate=False))
    with torch.inference_mode(False), torch.no_grad():
        for path in changed:
            p = modules[path]._parameters.get("weight") if path in modules else None
            if type(p) is nn.Parameter and p.dim() == 4 and not p.is_contiguous() and not p.is_inference():
                p.data = p.data.contiguous()
    changed.clear()
