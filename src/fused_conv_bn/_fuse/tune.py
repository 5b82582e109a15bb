"""Which algorithm is the fastest for each convolution of a model, measured on the device that the model is on.

One call of the model shows the convolutions: a dispatch mode sees the ops with their arguments. Calls with the same
problem share a choice. For each problem that several algorithms cover, the calls are made again with random data: first
each algorithm is compared with the same op in float64, then those that are accurate are timed in turns.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _choices
from .._choices import Problem
from .._progress import part
from .._stopwatch import Figure, Processors, call_us
from ..algorithms import use_algorithm
from .entry import State
from .guard import STATE
from .undisturbed import undisturbed

_ops = torch.ops.fused_conv_bn
CONV_OPS = {  # and whether they take the batch's statistics
    _ops.conv_scale_shift.default: False,
    _ops.conv_bn_scale.default: False,
    _ops.conv_bn_scale_mean.default: False,
    _ops.gate_conv_bn_scale.default: False,
    _ops.conv_bn_scale_train.default: True,
    _ops.conv_bn_scale_train_stats.default: True,
    _ops.conv_bn_scale_train_functional.default: True,
    _ops._conv_bn_scale_train_sums.default: True,
}
_TIE = 1.02  # what is slower than the fastest by less is as fast
_UNDECIDED = 1.1  # where an algorithm may be faster than the rule's by more, and is not for sure, nothing is decided
_ROUNDS, _SAMPLES = 7, 3
_ROUNDS_AT_LEAST, _CPU_SECONDS = 3, 0.5  # of a problem
_IMAGES = 4  # that are compared where the images of a batch are independent

cuda: Any = torch.cuda  # which has types only in part
_measuring = threading.Lock()  # a trial of another thread's would be in the table, too


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Like:
    """A tensor's metadata, from which another one is made."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, generator: torch.Generator) -> Tensor:
        elements = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) if self.numel else 0
        values = torch.randn(elements, generator=generator, dtype=self.dtype, device=self.device)
        if name == "running_var":
            values = values.abs_().add_(0.5)
        return values.as_strided(self.shape, self.strides)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def is_channels_last(self) -> bool:
        of_this = torch.empty_strided(self.shape, self.strides, device="meta")
        return not of_this.is_contiguous() and of_this.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Call:
    """A call of an op, but for the values of its tensors."""

    op: Any
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
        return cls(op, tuple((name, cls._frozen(value)) for name, value in named.items()))

    @staticmethod
    def _frozen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _Like(tuple(value.shape), value.stride(), value.dtype, value.device)
        return tuple(value) if isinstance(value, list) else value

    def tensors(self, generator: torch.Generator) -> dict[str, Any]:
        """The arguments, with random values. (The weight's are such that a sum over its terms is about 1.)"""
        named = {n: v.tensor(n, generator) if isinstance(v, _Like) else v for n, v in self.arguments}
        weight = conv_weight(named)
        weight.mul_(max(1, weight[0].numel()) ** -0.5)
        return named


def conv_weight(arguments: dict[str, Any]) -> Any:
    return arguments["conv_weight"] if "conv_weight" in arguments else arguments["weight"]


def problem_arguments(op: Any, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``_candidates`` and ``_explain`` take."""
    window = named.get("stride", (1,)), named.get("padding", (0,)), named.get("dilation", (1,)), named.get("groups", 1)
    return (named["input"], conv_weight(named), *window), {
        "has_residual": named.get("residual") is not None,
        "has_statistics": CONV_OPS.get(op, False),
        "allow_tf32": named.get("allow_tf32", False),
    }


@dataclass
class Case:
    """A problem, who calls it how often, and what came of it."""

    device: str
    problem: Problem
    algorithms: list[str]
    calls: Counter[Call] = field(default_factory=Counter)
    times: dict[str, Figure] = field(default_factory=dict)
    """Of all calls, by algorithm. Those that are missing failed, or were not accurate."""
    rule: str = ""
    choice: str = ""
    is_decided: bool = True
    """Or another algorithm may be faster, by less than its times vary, or other programs were in the way: the rule's
    choice stays, and is not kept."""

    def text(self) -> str:
        call = next(iter(self.calls))
        named = dict(call.arguments)
        (x, weight, stride, padding, dilation, groups), keywords = problem_arguments(call.op, named)

        def window(values: tuple[int, ...]) -> str:
            return "x".join(map(str, values if len(set(values)) > 1 else values[:1]))

        words = [
            "x".join(map(str, x.shape)),
            str(x.dtype).removeprefix("torch."),
            "channels_last" if x.is_channels_last() else "",
            f"{weight.shape[0]} of {'x'.join(map(str, weight.shape[2:]))}",
            f"stride {window(stride)}" if set(stride) != {1} else "",
            f"padding {window(padding)}" if set(padding) != {0} else "",
            f"dilation {window(dilation)}" if set(dilation) != {1} else "",
            f"groups {groups}" if groups != 1 else "",
            "residual" if keywords["has_residual"] else "",
            "training" if keywords["has_statistics"] else "",
        ]
        return " ".join(filter(None, words))


class _Recorder(TorchDispatchMode):
    """Collects the convolutions of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.cases: dict[tuple[str, Problem], Case] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in CONV_OPS:
            self._record(func, args, kwargs)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any) -> None:
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        positional, keywords = problem_arguments(func, named)
        device, problem, algorithms = _ops._candidates(*positional, **keywords)
        if algorithms:
            key = device, tuple(problem)
            case = self.cases.setdefault(key, Case(device, tuple(problem), algorithms.split(",")))
            case.calls[Call.of(func, args, kwargs)] += 1


def cases_of(model: nn.Module, args: tuple[Any, ...]) -> list[Case]:
    """The problems that a call of the model has a choice for."""
    recorder = _Recorder()
    with undisturbed(model), recorder:
        model(*args)
    return list(recorder.cases.values())


# ---- measurements ----------------------------------------------------------------------------------------------------


def _outputs(result: Any) -> Tensor:
    y: Tensor = result if isinstance(result, Tensor) else result[0]
    return y


def _part(op: Any, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments in float64: of some images, where each is computed by itself."""
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in named.items()}
    if not CONV_OPS[op]:
        for name in ("input", "gate", "residual"):
            if isinstance(wide.get(name), Tensor):
                wide[name] = wide[name][:_IMAGES]
    return wide


class _Measured:
    """One call's algorithms: their errors, and how long they take."""

    def __init__(self, case: Case, call: Call, generator: torch.Generator) -> None:
        self.case, self.op = case, call.op
        self.named = call.tensors(generator)
        self.on_cuda = self.named["input"].is_cuda

    def run(self) -> Tensor:
        return _outputs(self.op(**self.named))

    def explained(self) -> str:
        positional, keywords = problem_arguments(self.op, self.named)
        text: str = _ops._explain(*positional, **keywords)
        return text

    def accurate(self) -> list[str]:
        """By the promise of the package: at most twice the error of PyTorch's own convolution, and a rounding."""
        truth = _outputs(self.op(**_part(self.op, self.named)))
        scale = truth.abs().max().clamp(min=1e-30)
        errors: dict[str, float] = {}
        for name in self.case.algorithms:
            with contextlib.suppress(RuntimeError), self._chosen(name):
                errors[name] = float((self.run()[: len(truth)].double() - truth).abs().max() / scale)
        most = 2 * errors.get("aten", 0.0) + torch.finfo(self.named["input"].dtype).eps
        return [name for name, error in errors.items() if error <= most]

    @contextlib.contextmanager
    def _chosen(self, name: str) -> Iterator[None]:
        with _choices.trial(self.case.device, self.case.problem, name):
            if self.explained().split()[0].rstrip(",") != name:
                raise RuntimeError(f"tune: {name} does not run for {self.case.text()}")
            yield

    def times(self, names: Sequence[str]) -> dict[str, Figure]:
        """On CUDA the median, on the CPU the least, since what else runs there only adds."""
        samples: dict[str, list[float]] = {name: [] for name in names}
        device = self.named["input"].device
        flush = torch.empty(_flush_bytes(device), dtype=torch.int8, device=device)
        stop = time.perf_counter() + _CPU_SECONDS / max(1, len(self.case.calls))
        for turn in range(_ROUNDS):
            if not self.on_cuda and turn >= _ROUNDS_AT_LEAST and time.perf_counter() > stop:
                break
            for name in list(names) if turn % 2 == 0 else reversed(names):
                with self._chosen(name):
                    self.run()  # what is done once after a choice
                    for _ in range(_SAMPLES):
                        samples[name].append(_device_us(self.run, flush) if self.on_cuda else call_us(self.run, False))
        figure = Figure.of_median if self.on_cuda else Figure.of_least
        return {name: figure(values) for name, values in samples.items()}


def _flush_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return 2 * int(cuda.get_device_properties(device).L2_cache_size)


def _device_us(run: Callable[[], object], flush: Tensor) -> float:
    """Of one call that finds nothing of its data in the L2. The device is kept busy until the host has queued it."""
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 200_000
    for _ in range(4):
        cuda._sleep(cycles)
        flush.zero_()
        start.record()
        run()
        end.record()
        ahead = not start.query()
        end.synchronize()
        if ahead:
            break
        cycles *= 4
    return float(start.elapsed_time(end)) * 1e3


def measure(case: Case) -> None:
    """Times a case's algorithms, and chooses. No choice where none can be measured, for lack of memory say."""
    device = next(v.device for _, v in next(iter(case.calls)).arguments if isinstance(v, _Like))
    generator = torch.Generator(device).manual_seed(0)
    totals: dict[str, Figure] | None = None
    on_device = cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), on_device, use_algorithm("default", "default"):
        for call, count in case.calls.items():
            measured = _Measured(case, call, generator)
            with _choices.trial(case.device, case.problem, None):
                case.rule = measured.explained().split()[0].rstrip(",")
            names = [name for name in measured.accurate() if totals is None or name in totals]
            before, totals = totals or {}, {}
            for name, figure in measured.times(names).items():
                totals[name] = before.get(name, Figure(0.0, 0.0, 0.0)).plus(figure, count)
    case.times = totals or {}
    if case.times:
        case.choice, case.is_decided = choose(case.times, case.rule)


def choose(times: dict[str, Figure], rule: str) -> tuple[str, bool]:
    """The fastest algorithm, or the rule's where none is faster for sure; and whether that is decided."""

    def us(name: str) -> float:
        return times[name].us

    if rule not in times:
        return min(times, key=us), True
    own = times[rule]
    if faster := [name for name, other in times.items() if other.high < own.low and _TIE * other.us < own.us]:
        return min(faster, key=us), True
    return rule, all(own.high <= _UNDECIDED * other.low for name, other in times.items() if name != rule)


class NamedAlgorithmError(RuntimeError):
    """There is nothing to choose: the environment names the algorithm."""


def tune_cases(
    model: nn.Module, args: tuple[Any, ...], again: bool = False, processors: Processors | None = None
) -> list[Case]:
    """Measures what a call of the model has a choice for, and adds it to what is known. Returns all cases.

    again: also what is known already. processors: gets what is seen before and after each measurement.

    Raises:
        NamedAlgorithmError: an algorithm is named in the environment, which comes before every choice.
    """
    named = os.environ.get("FUSED_CONV_BN_CONV", "")
    cases = cases_of(model, args)
    if named and any(case.device != _choices.CPU for case in cases):
        raise NamedAlgorithmError(
            f"tune: FUSED_CONV_BN_CONV is {named!r}, expected nothing: an algorithm that it names always runs"
        )
    todo = [case for case in cases if again or case.problem not in _choices.known(case.device)]
    try:
        with _measuring, part("tune", len(todo), of_command=False) as own:
            for case in todo:
                seen = Processors(case.device != _choices.CPU)
                seen.look()
                with contextlib.suppress(torch.OutOfMemoryError):
                    measure(case)
                seen.look()
                # Threads wait for one that has no processor, by some algorithms longer than by others. One thread's
                # least time is that of a call that had a processor.
                if seen.is_disturbed and seen.threads > 1 and case.choice:
                    case.choice, case.is_decided = case.rule, False
                if processors is not None:
                    processors.plus(seen)
                own.advance(case.text())
    finally:  # what was measured before an interruption counts
        for device in {case.device for case in todo}:
            kept = [case for case in todo if case.device == device and case.choice and case.is_decided]
            chosen = {case.problem: case.choice for case in kept}
            if chosen:
                _choices.add(device, chosen)
    for case in cases:
        if not case.choice or not case.is_decided:
            case.choice = _choices.known(case.device).get(case.problem, case.choice)
    if todo:
        _compare_again(model, args)
    return cases


def _compare_again(model: nn.Module, args: tuple[Any, ...]) -> None:
    """What was compared with the model's own forward is compared again, and reported, as it runs now."""
    for m in model.modules():
        state: State | None = m.__dict__.get(STATE)
        for entry in [] if state is None else [e for of_key in state.entries.values() for e in of_key]:
            if entry.algorithms:
                entry.unchecked = True
    with undisturbed(model):
        model(*args)
