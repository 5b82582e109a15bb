"""What ``python -m fused_conv_bn bench`` measures: a model as it is and in other forms, checked, then timed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import fused_conv_bn as fcb

from ._cli_model import UsageError, first_line
from ._fuse.difference import TOLERANCES
from ._fuse.guard import STATE
from ._fuse.root import is_root
from ._fuse.undisturbed import undisturbed
from ._progress import progress
from ._stopwatch import Figure, Processors, call_us

Record = dict[str, Any]
Call = Callable[[], object]

SAMPLE_US = {"cuda": 1e4, "cpu": 2e4}  # what is timed at once, so that the clock's and the events' own time is little
GROUP_SAMPLE_US = 2e3
SECONDS = 20.0  # of the whole, where nobody says how many rounds
ROUNDS = 5, 50
PASSES, GROUP_ROUNDS = 5, 3  # over all groups, so that what else the machine does meets no group alone
COPY_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # larger than caches
# How much larger than eager's an error may be. Each is one draw of what thousands of roundings make of a model, and
# wrong layers are wrong by far more. fuse() itself compares each group of layers, by tolerances for one group.
FACTOR = 10
# What gradients may be off by in any case: a ReLU's sign that one rounding turns changes them by up to some percent. An
# eager result that is off by more says that there is no telling.
LARGE = 0.1

NOTES = {
    "time": "Medians of rounds, in which all take turns, in alternating order; calls follow each other without pauses. "
    "On CUDA between two events, on the CPU wall time. Where the device waits for the host, it is the host's time. "
    "spread: the distance of the quartiles over the median; of a group, the larger of both. processors: the share of "
    "the time of all threads in which they had a processor, by looks between the rounds.",
    "error": "In evaluation the largest difference from the float64 results over the largest of them, the worst of all "
    f"tensors, at most {FACTOR} times eager's and one rounding of the dtype. In training the norm of the difference of "
    f"all gradients over the norm of those in float64, at most {FACTOR} times eager's or {LARGE:g}. What is above that "
    "is not timed. The error of torch.compile is not judged.",
    "groups": "Each group's op, and PyTorch's ops for it, on what the group reads in the model, which caches may have. "
    "On CUDA a spinning kernel holds the device back until the host has queued the calls: the device's time alone. In "
    "training forward and backward.",
    "copy": "Of contiguous memory; its rate counts what is read and what is written.",
}


# ---- what is called --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model with what it is called with, both of the dtype, in the layout and on the device that are asked for."""

    model: nn.Module
    inputs: tuple[Any, ...]
    device: str
    dtype: torch.dtype
    channels_last: bool = False
    train: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()
        self.inputs = tree_map(self._moved, self.inputs)
        with torch.no_grad():
            fill_in_statistics(self.model, self._call)  # in the model's own dtype
            self.model.to(self.dtype)
            if self.channels_last:
                for m in self.model.modules():
                    for tensors in (m._parameters, m._buffers):
                        for t in tensors.values():
                            if t is not None:
                                t.data = _channels_last(t.data)
            self.inputs = tree_map(self._converted, self.inputs)
            self.model.train(self.train)
            with undisturbed(self.model):
                outputs = floating(self._call())
        self.gradients = [torch.randn_like(t) for t in outputs]
        if not outputs:
            raise UsageError("the model returns no tensor of floating point")

    def _call(self) -> Any:
        try:
            return self.model(*self.inputs)
        except Exception as error:
            raise UsageError(f"the model does not take {described(self.inputs)}: {first_line(error)}") from error

    def _moved(self, value: Any) -> Any:
        return value.detach().to(self.device) if isinstance(value, Tensor) else value

    def _converted(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.to(self.dtype)
        return _channels_last(value) if self.channels_last else value

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    def step(self, model: nn.Module) -> Call:
        """What is timed: a call of the model, or a training step without an optimizer."""
        if not self.train:
            return lambda: model(*self.inputs)

        def step() -> None:
            backward(floating(model(*self.inputs)), self.gradients)
            model.zero_grad()

        return step

    def results(self, model: nn.Module, gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> list[Tensor]:
        """What is compared: the results, in training the gradients. From the same random state each time."""
        with undisturbed(model), torch.set_grad_enabled(self.train):
            torch.manual_seed(1)
            outputs = floating(model(*inputs))
            if not self.train:
                return [t.clone() for t in outputs]
            backward(outputs, gradients)
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            model.zero_grad()
            return found

    def wide(self) -> list[Tensor] | None:
        """The results in float64. None of a model that does not run in it."""

        def widened(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        try:
            model = copy.deepcopy(self.model).double()
            return self.results(model, [g.double() for g in self.gradients], tree_map(widened, self.inputs))
        except Exception:
            return None


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def tensors_of(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def described(inputs: tuple[Any, ...]) -> str:
    """The shapes of tensors, in the lists and dicts that they are in. All else is named by its type."""
    shown = [_described(value) for value in inputs]
    return ", ".join(shown) + (", a list as its one argument" if type(inputs[0]) is list and len(inputs) == 1 else "")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_described(v)}' for k, v in value.items())}}}"
    return repr(value) if isinstance(value, (bool, int, float, type(None))) else type(value).__name__


def floating(value: Any) -> list[Tensor]:
    return [t for t in tensors_of(value) if t.is_floating_point()]


def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if y.requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])


def fill_in_statistics(model: nn.Module, call: Call) -> None:
    """Gives BatchNorms that are as they were made about the statistics of what they read, and a random affine.

    A fresh one is nearly the identity: an error in it would not show, and a deep model of them overflows float16.
    """

    def fill_in(m: Any, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        var = torch.where(var > 0, var, 1.0)  # of one value, or of what a ReLU left nothing of
        m.running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn_like(mean))
        m.running_var.copy_(var * torch.empty_like(var).uniform_(0.8, 1.25))

    handles = []
    for m in model.modules():
        mean, var = getattr(m, "running_mean", None), getattr(m, "running_var", None)
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.any() or (var != 1).any():
            continue
        handles.append(m.register_forward_pre_hook(fill_in))
        weight, bias = getattr(m, "weight", None), getattr(m, "bias", None)
        if isinstance(weight, Tensor) and isinstance(bias, Tensor) and (weight == weight[0]).all() and not bias.any():
            weight.data.uniform_(0.5, 1.5)
            bias.data.normal_(0.0, 0.2)
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()


# ---- the forms of a model --------------------------------------------------------------------------------------------


@dataclass
class Variant:
    name: str
    model: nn.Module | None = None
    error: float | None = None
    problem: str | None = None  # why it is not timed
    times: Sequence[float] = ()

    @property
    def us(self) -> float:
        return median(self.times)

    def to_dict(self, eager: Variant) -> Record:
        found: Record = {"name": self.name, "error": self.error, "problem": self.problem}
        if self.times:
            found |= {"median_us": self.us, "min_us": min(self.times), "max_us": max(self.times)}
            found["spread"] = spread(self.times)
            found["speed-up"] = eager.us / self.us
        return found


def forms(case: Case) -> dict[str, Callable[[], nn.Module]]:
    """By name, what makes it: each of a copy of its own."""

    def fused(freeze: bool = False) -> nn.Module:
        return fcb.fuse(copy.deepcopy(case.model), case.inputs, freeze=freeze)

    found: dict[str, Callable[[], nn.Module]] = {"eager": lambda: case.model, "fused": fused}
    if not case.train:
        found["frozen"] = lambda: fused(freeze=True)
    if case.on_cuda:  # on the CPU it is the model itself
        found["graphed"] = lambda: fcb.graphed(fused())
    if case.compile:
        compiler: Any = torch.compile
        found["compile"] = lambda: compiler(copy.deepcopy(case.model))
    return found


def largest_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest difference over the largest value, the worst of all tensors. Inf where they cannot be compared."""
    worst = 0.0
    if len(got) != len(truth):
        return math.inf
    for a, b in zip(got, truth, strict=True):
        if a.shape != b.shape:
            return math.inf
        a, b = a.double(), b.double()
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return math.inf
        if finite.any():
            smallest = torch.finfo(torch.float32).tiny
            worst = max(worst, float((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=smallest)))
    return worst


def norm_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The norm of all differences together over the norm of all values."""
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, truth, strict=True))
    error = math.sqrt(off / max(sum(float(b.double().square().sum()) for b in truth), 1e-300))
    return math.inf if math.isnan(error) else error


def checked(case: Case) -> tuple[list[Variant], str]:
    """All forms of the model, with the errors of their results, and what those are compared with."""
    error_of = norm_error if case.train else largest_error
    variants: list[Variant] = []
    truth, against, limit = case.wide(), "float64", math.inf
    for name, make in progress(list(forms(case).items()), "prepare and check"):
        variant = Variant(name)
        variants.append(variant)
        try:
            model = make()
            got = case.results(model, case.gradients, case.inputs)
            if truth is None:
                truth, against = got, "eager"
            variant.error = error_of(got, truth)
            if name == "eager":
                if not any(torch.isfinite(t).any() for t in got):
                    raise ValueError("all of its results are Inf or NaN, which nothing can be compared with")
                limit = FACTOR * variant.error + torch.finfo(case.dtype).eps
                if case.train or against == "eager":
                    limit = max(limit, LARGE if case.train else TOLERANCES[case.dtype])
            elif not variant.error <= limit and name != "compile":
                variant.problem = f"its error is {variant.error:.1e}, and at most {limit:.1e} is allowed"
                continue
            variant.model = model
        except Exception as error:  # of the form: no compiler, say
            if name == "eager":
                raise UsageError(f"the model fails: {first_line(error)}") from error
            variant.problem = first_line(error)
    return variants, against


def spread(times: Sequence[float]) -> float | None:
    """The distance of the quartiles over the median. Of one sample there is none."""
    return Figure.of_median(times).spread if len(times) > 1 else None


# ---- times -----------------------------------------------------------------------------------------------------------


class Race:
    """Calls that are timed in turns, each so often at once that it takes a sample's time."""

    def __init__(self, calls: dict[str, Call], on_cuda: bool, sample_us: float, device_only: bool = False) -> None:
        self.calls, self.on_cuda, self.device_only = calls, on_cuda, device_only
        self.times: dict[str, list[float]] = {name: [] for name in calls}
        self.repeats: dict[str, int] = {}
        self.host_us: dict[str, float] = {}
        self.seconds = 0.0  # of a round, about
        for name, call in calls.items():
            for _ in range(3 if on_cuda else 1):
                call()
            if on_cuda:
                torch.cuda.synchronize()
            us = max(call_us(call, on_cuda), 0.1)
            self.repeats[name] = max(1, min(100, math.ceil(sample_us / us)))
            self.seconds += us * self.repeats[name] / 1e6
            start = time.perf_counter()
            call()
            self.host_us[name] = (time.perf_counter() - start) * 1e6

    def run(self, rounds: Iterable[int]) -> dict[str, list[float]]:
        """Microseconds of a call, by name, one of each round."""
        for turn in rounds:
            for name in list(self.calls) if turn % 2 == 0 else reversed(self.calls):
                self.times[name].append(self._sample(self.calls[name], self.repeats[name], self.host_us[name]))
        return self.times

    def _sample(self, call: Call, repeats: int, host_us: float) -> float:
        def several() -> None:
            for _ in range(repeats):
                call()

        if self.on_cuda:
            torch.cuda.synchronize()
        if repeats > 1 or self.on_cuda:  # what another left in caches, and an idle device
            call()
        if self.on_cuda and self.device_only:
            cuda: Any = torch.cuda  # which has types only in part
            cuda._sleep(int((host_us * repeats + 50) * 1.5 * 2000))  # at 2 GHz, about the fastest there is
        return call_us(several, self.on_cuda) / repeats


def copy_call(device: str) -> Call:
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(case: Case, rounds: int | None) -> Record:
    """Everything that the tables have."""
    variants, against = checked(case)
    timed = {v.name: v for v in variants if v.model is not None}
    calls = {name: case.step(v.model) for name, v in timed.items() if v.model is not None}
    race = Race({**calls, "copy": copy_call(case.device)}, case.on_cuda, SAMPLE_US[case.device])
    count = rounds or max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / race.seconds)))
    processors = Processors(case.on_cuda)
    times = race.run(_looking(processors, progress(range(count), "time the whole")))
    for name, variant in timed.items():
        variant.times = times[name]
    copy_us = median(times["copy"])
    record: Record = {
        "inputs": [list(t.shape) for t in tensors_of(case.inputs)],
        "dtype": str(case.dtype).removeprefix("torch."),
        "channels_last": case.channels_last,
        "mode": "train" if case.train else "eval",
        "errors against": against,
        "rounds": count,
        "variants": [v.to_dict(timed["eager"]) for v in variants],
        "copy": {
            "bytes": COPY_BYTES[case.device],
            "median_us": copy_us,
            "spread": spread(times["copy"]),
            "gb_per_s": 2 * COPY_BYTES[case.device] / copy_us / 1e3,
        },
        "report": {},
        "groups": [],
        "notes": NOTES,
    }
    fused = timed.get("fused")
    if fused is not None and fused.model is not None:
        record["report"] = fcb.report(fused.model).counts
        record["groups"] = group_times(fused.model, case, min(count, PASSES))
        processors.look()
    record["processors"] = {"share": processors.share, "disturbed": processors.why_disturbed()}
    return record


def _looking(processors: Processors, rounds: Iterable[int]) -> Iterator[int]:
    """``rounds``, each of them behind a look at the processors."""
    for turn in rounds:
        processors.look()
        yield turn


# ---- groups ----------------------------------------------------------------------------------------------------------


class _TimedCall:
    """In the place of a group's call, while the model is called: times it on what it is called with."""

    def __init__(
        self,
        fused: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        names: tuple[str, str],
        parameters: list[Tensor],
        owner: _Groups,
    ) -> None:
        self.fused, self.plain, self.names, self.parameters, self.owner = fused, plain, names, parameters, owner

    def __call__(self, x: Any, residual: Tensor | None = None) -> Tensor:
        self.owner.time(self, x, residual)
        y: Tensor = self.fused(x, residual)
        return y


_Key = tuple[str, str, tuple[int, ...]]  # path, ops, shape


class _Groups:
    def __init__(self, case: Case, steps: Iterator[Any]) -> None:
        self.case, self.steps = case, steps
        self.calls: dict[_Key, int] = {}  # in this pass
        self.times: dict[_Key, dict[str, list[float]]] = {}

    def time(self, timed: _TimedCall, x: Any, residual: Tensor | None) -> None:
        """One that is called again with the same shape is counted. ``x``: a tensor or several."""
        largest = max((x,) if isinstance(x, Tensor) else x, key=Tensor.numel)
        key = *timed.names, tuple(largest.shape)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] > 1:
            return
        next(self.steps, None)
        calls = {
            "fused": self.call(timed.fused, x, residual, timed.parameters),
            "plain": self.call(timed.plain, x, residual, timed.parameters),
        }
        race = Race(calls, self.case.on_cuda, GROUP_SAMPLE_US, device_only=True)
        for name, times in race.run(range(GROUP_ROUNDS)).items():
            self.times.setdefault(key, {}).setdefault(name, []).extend(times)

    def call(self, of: Callable[..., Tensor], x: Any, residual: Tensor | None, parameters: Sequence[Tensor]) -> Call:
        if not self.case.train:
            return lambda: of(x, residual)
        inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (x, residual))
        leaves = [t for t in (*tree_leaves(inputs), *parameters) if isinstance(t, Tensor) and t.requires_grad]
        if not leaves:
            return lambda: of(*inputs)
        dy = torch.randn_like(of(*inputs))
        return lambda: torch.autograd.grad(of(*inputs), leaves, dy, allow_unused=True)

    def rows(self) -> list[Record]:
        """Slowest first."""
        rows = []
        for key, times in self.times.items():
            path, ops, shape = key
            row: Record = {"group": path, "ops": ops, "shape": list(shape), "calls": self.calls[key]}
            fused_us, pytorch_us = median(times["fused"]), median(times["plain"])
            row |= {"fused_us": fused_us, "pytorch_us": pytorch_us, "speed-up": pytorch_us / fused_us}
            rows.append({**row, "spread": max(Figure.of_median(samples).spread for samples in times.values())})
        return sorted(rows, key=lambda row: -float(row["fused_us"]) * int(row["calls"]))


def group_times(model: nn.Module, case: Case, passes: int) -> list[Record]:
    """Of each group of a fused model: its op and PyTorch's ops for it, on what it reads in the model."""
    with undisturbed(model), torch.set_grad_enabled(case.train):
        model(*case.inputs)  # captured in this mode
    entries = []
    for path, root in model.named_modules():
        if is_root(root):
            state = root.__dict__[STATE]
            entries += [(path, root, e) for of_key in state.entries.values() for e in of_key if e.groups]
    total = passes * sum(len(entry.groups) for _, _, entry in entries)
    if not total:
        return []
    groups = _Groups(case, iter(progress(range(total), "time each group")))
    # Where no gradient is needed, groups are called in another way.
    name = "full" if case.train else "quick"
    own = [getattr(entry, name) for _, _, entry in entries]
    try:
        for path, _, entry in entries:
            timed = []
            for group, block, call in zip(entry.groups, entry.blocks, getattr(entry, name), strict=True):
                first = group.name if group.conv is None else group.conv.target
                names = f"{path}.{first}".lstrip("."), group.describe()
                parameters = [p for m in block.parts for p in m.parameters()]
                timed.append(_TimedCall(call, block.plain, names, parameters, groups))
            setattr(entry, name, timed)
        for _ in range(passes):
            groups.calls.clear()
            with undisturbed(model), torch.set_grad_enabled(case.train):
                model(*case.inputs)
    finally:
        for (_, _, entry), calls in zip(entries, own, strict=True):
            setattr(entry, name, calls)
        for _ in groups.steps:  # the bar's end
            pass
    return groups.rows()
