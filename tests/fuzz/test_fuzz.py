"""The fuzzer: problems that hold, wrong ops that it finds and makes small, and what its numbers reach."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_conv_bn as fcb
from common import CONV_ALGORITHMS, DTYPES
from fused_conv_bn import _pooling, autograd, conditions, reference
from fused_conv_bn.reference import ACTIVATIONS
from fuzz import __main__ as program
from fuzz import truth
from fuzz.generate import BUDGETS, DEVICES, cost, generate
from fuzz.problem import OPS, WAYS, Problem, changed
from fuzz.run import Failure, Invalid, check
from fuzz.values import LAYOUTS, Spec, placed

original = fcb.scale_shift


def test_some_seconds(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None of them fails, and a seed makes one problem."""
    assert program.main(["--device", device, "--first", "0", "--count", "150", "--seconds", "15"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fuzz: \d+ problems in \d+ s .*, seeds 0 to \d+, 0 failed", printed)
    assert program.main(["--device", device, "--seed", "3"]) == 0
    assert "fuzz: 1 problem in" in capsys.readouterr().out


@pytest.mark.parametrize("outcome", ["failed", "refused"])
def test_it_ends_where_the_gpu_is_lost(
    outcome: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "run", lambda *_: outcome)
    monkeypatch.setattr(program, "is_lost", lambda device: True)
    assert program.main(["--device", "cpu", "--first", "0", "--count", "5"]) == 1
    printed = capsys.readouterr().out
    assert "seed 0: the GPU takes no more work after Problem(" in printed and "fuzz: 1 problem in" in printed


def wrong_element(input: Tensor, *arguments: Any, **named: Any) -> Tensor:
    y = original(input, *arguments, **named)
    if y.numel() > 0 and y.size(1) > 4:
        y[(-1,) * y.dim()] += 1
    return y


def written_argument(input: Tensor, scale: Tensor | None, shift: Tensor | None, **named: Any) -> Tensor:
    y = original(input, scale, shift, **named)
    if shift is not None and shift.numel() > 1:
        shift[1] += 1
    return y


def written_memory(input: Tensor, *arguments: Any, **named: Any) -> Tensor:
    y = original(input, *arguments, **named)
    out = named.get("out")
    if out is not None:
        out.as_strided((1,), (1,), out.untyped_storage().nbytes() // out.element_size() - 1).fill_(0)
    return y


def memory_behind(input: Tensor, *arguments: Any, **named: Any) -> Tensor:
    y = original(input, *arguments, **named)
    if y.numel() > 0 and "out" not in named:
        behind = input.as_strided((1,), (1,), input.untyped_storage().nbytes() // input.element_size() - 1)
        y[(0,) * y.dim()] += behind[0]
    return y


def other_bits(input: Tensor, *arguments: Any, **named: Any) -> Tensor:
    y = original(input, *arguments, **named)
    with torch.no_grad():
        if y.numel() > 0:
            y[(0,) * y.dim()] *= 1 + float(torch.rand(()))
    return y


def wrong_strides(input: Tensor, *arguments: Any, **named: Any) -> Tensor:
    y = original(input, *arguments, **named)
    return y if "out" in named or y.dim() != 4 else y.transpose(2, 3).contiguous().transpose(2, 3)


def refused(input: Tensor, *arguments: Any, **named: Any) -> Tensor:
    if input.size(-1) == 7:
        raise RuntimeError("scale_shift: no sevens")
    return original(input, *arguments, **named)


WRONG: dict[Callable[..., Tensor], str] = {
    wrong_element: "result: an element is .* unit roundoffs off",
    written_argument: "shift: written to, or memory around it",
    written_memory: "(out|input|residual): written to, or memory around it",
    memory_behind: "result: elements that are not finite where exact ones are, or the other way round: 1",
    other_bits: "result: two runs differ",
    wrong_strides: "result: has strides .*, expected eager's",
    refused: "the call raised RuntimeError: scale_shift: no sevens",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_ops_are_found_and_made_small(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_derivatives(*arguments: Any, **named: Any) -> Tensor:
        with torch.no_grad():
            return wrong(*arguments, **named)

    monkeypatch.setattr(fcb, "scale_shift", without_derivatives)
    monkeypatch.setattr(program, "generate", lambda *arguments: plain(generate(*arguments)))
    arguments = [
        "--device",
        "cpu",
        "--only",
        "scale_shift",
        "--first",
        "0",
        "--seconds",
        "600",
        "--shrink-seconds",
        "120",  # it takes a tenth of a second, where nobody else has the processor
    ]
    monkeypatch.setattr(program, "OPS", ("scale_shift",))
    assert program.main(arguments) == 1
    printed = capsys.readouterr().out
    assert re.search(f"fuzz: seed \\d+ failed: {WRONG[wrong]}", printed), printed
    smallest = re.search(r"the smallest that fails: (.*)\n((    .*\n)+)", printed)
    assert smallest is not None and re.match(WRONG[wrong], smallest[1]), printed
    lines = [line[4:] for line in smallest[2].splitlines()]
    # What is printed runs, and fails by the same.
    with pytest.raises(Failure, match=WRONG[wrong]):
        exec("\n".join(lines[:3]), {})
    named = {"Problem": Problem}
    problem = eval(lines[2].removeprefix("check(").removesuffix(", 'cpu')"), named)
    assert problem.activation == problem.residual == "none" and problem.special == "none", problem
    if wrong is wrong_element:
        assert sorted(problem.shape)[-1] == problem.shape[1] == 5 and sum(problem.shape) == 5 + len(problem.shape) - 1
    if wrong is not refused and "out" not in problem.way:
        scope: dict[str, Any] = {}
        exec("\n".join(lines[3:]), scope)
        assert scope["result"].shape == problem.shape


WINDOW = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
SHAPE = {"shape": (2, 8, 9, 10), "filters": 8}
POOL = {"shape": (2, 8, 9, 10), **WINDOW}
SQUEEZE = {**SHAPE, "hidden": 4, "given": ("bias1", "bias2"), "activation": "silu"}


@pytest.mark.parametrize(
    ("p", "wrong"),
    [
        (Problem("squeeze_excite", **SQUEEZE), [0, 1, 2, 3, 4]),
        (Problem("gate_conv_bn_scale", **SHAPE, **WINDOW), [0, 1, 2]),
        (Problem("max_pool2d", **POOL), [0]),
        (Problem("spatial_mean", shape=(2, 8, 9, 10)), [0]),
        (Problem("bn_scale_cat", shape=(2, 1, 9, 10), parts=(3, 5)), [0]),
    ],
    ids=lambda p: p.op if isinstance(p, Problem) else "",
)
def test_wrong_gradients_are_found(p: Problem, wrong: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one element of one argument."""
    p = changed(p, gradients=True)
    assert check(p, "cpu")
    op = getattr(fcb, p.op)

    def with_hook(t: Tensor) -> Tensor:
        t = t.view_as(t)
        t.register_hook(lambda d: torch.where(torch.arange(d.numel()).view(d.shape) == d.numel() // 2, d + 0.01, d))
        return t

    for i in wrong:

        def of_wrong(*arguments: Any, i: int = i, **named: Any) -> Tensor:
            changed = list(arguments)
            first = changed[i]
            changed[i] = [with_hook(first[0]), *first[1:]] if isinstance(first, list) else with_hook(first)
            return op(*changed, **named)

        monkeypatch.setattr(fcb, p.op, of_wrong)
        with pytest.raises(Failure, match=r"gradient of \w+: .* unit roundoffs off"):
            check(p, "cpu")


def test_gradients_of_max_pooling_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as well, where PyTorch's op runs by rule: the position of each maximum, and what becomes of it."""
    p = Problem("max_pool2d", gradients=True, **POOL)
    backward = _pooling._backward
    monkeypatch.setattr(_pooling, "_backward", lambda dy, position, *others: backward(dy, position ^ 1, *others))
    with pytest.raises(Failure, match="gradient of input: an element is .* unit roundoffs off"):
        check(p, "cpu")


def wrong_hidden(input: Tensor, weight1: Tensor, bias1: Tensor | None, *others: Any, **named: Any) -> Tensor:
    return reference.squeeze_excite(input, weight1, bias1 if bias1 is None else bias1.roll(1), *others, **named)


def wrong_mean(input: Tensor, *others: Any, **named: Any) -> Tensor:
    return reference.squeeze_excite(input[..., :4], *others, **named)


def other_gate(*arguments: Any, gate: str, **named: Any) -> Tensor:
    return reference.squeeze_excite(*arguments, gate="hardsigmoid", **named)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("wrong", [wrong_hidden, wrong_mean, other_gate], ids=lambda f: f.__name__)
def test_wrong_squeezes_are_found(wrong: Callable[..., Tensor], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem("squeeze_excite", dtype, **SQUEEZE)
    assert check(p, "cpu")
    monkeypatch.setattr(fcb, "squeeze_excite", wrong)
    with pytest.raises(Failure, match="result: an element is .* unit roundoffs off"):
        check(p, "cpu")


def plain(p: Problem) -> Problem:
    """Without gradients, which these wrong functions have none of."""
    return Problem(**{**vars(p), "gradients": False})


def test_keep_going_and_what_was_not_seen_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcb, "scale_shift", wrong_element)
    monkeypatch.setattr(program, "generate", lambda *arguments: plain(generate(*arguments)))
    monkeypatch.setattr(program, "OPS", ("scale_shift",))
    common = ["--device", "cpu", "--only", "scale_shift", "--first", "0", "--count", "12", "--shrink-seconds", "0"]
    assert program.main([*common, "--keep-going"]) == 1
    printed = capsys.readouterr().out
    failed = len(re.findall(r"fuzz: seed \d+ failed:", printed))
    assert failed > 1 and re.search(f"fuzz: 12 problems .*, {failed} failed", printed)
    assert program.main(["--only", "no such op"]) == 2


def test_what_the_numbers_reach() -> None:
    for device in DEVICES:
        made = [generate(seed, device) for seed in range(6000)]
        assert made[:50] == [generate(seed, device) for seed in range(50)]
        assert {p.op for p in made} == set(OPS) - ({"fold_bn"} if device == "emulator" else set())
        assert {p.dtype for p in made} == {str(dtype).removeprefix("torch.") for dtype in DTYPES}
        assert {p.activation for p in made} == set(ACTIVATIONS)
        assert {p.layout for p in made} == {p.residual_layout for p in made} == set(LAYOUTS)
        assert {p.residual for p in made} == {"none", "first", "last"}
        assert {p.special for p in made} == {"none", "finite", "non-finite"}
        assert {p.gate_activation for p in made} == set(ACTIVATIONS)
        differentiable = {"max_pool2d"} if device == "emulator" else set(OPS) - {"fold_bn"}
        assert {p.op for p in made if p.gradients} == differentiable
        algorithms = {p.algorithm for p in made}
        if device == "cpu":
            assert algorithms == {"by rule"}
        else:
            assert algorithms == {"by rule", *CONV_ALGORITHMS} - ({"aten"} if device == "emulator" else set())
        if device != "emulator":
            assert {p.way for p in made} == set(WAYS)
            assert any(0 in p.shape for p in made)
        sizes = sorted(cost(p)[0] for p in made)
        assert sizes[len(sizes) // 2] <= BUDGETS[device][0] and sizes[-1] <= 4 * BUDGETS[device][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors(layout: str) -> None:
    """The same values wherever they lie, with NaN all around."""
    for shape in ((2, 3, 4, 5), (3, 4, 2), (4, 6), (7,), (1, 2, 3, 2, 2), (2, 0, 3)):
        x, memory = placed(Spec(shape, layout=layout, offset=3, seed=5), "cpu")
        plain, _ = placed(Spec(shape, seed=5), "cpu")
        assert x.shape == shape and x.storage_offset() == 3 or x.numel() == 0
        if layout != "expanded":
            assert torch.equal(x, plain)
        elif x.numel():
            assert x.dim() == 1 or (x == x[:1]).all()
        assert memory[:3].isnan().all() and memory[-20:].isnan().all() and not x.isnan().any()
        assert memory.isnan().sum() >= memory.numel() - x.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager_takes_aligned_tensors(layout: str) -> None:
    """In the same strides. An address on CUDA that is not aligned is an error there alone."""
    for offset in (0, 3):
        x = placed(Spec((2, 3, 4, 5), layout=layout, offset=offset, seed=5), "cpu")[0]
        made = truth.aligned(x)
        assert torch.equal(made, x) and made.stride() == x.stride() and made.data_ptr() % 16 == 0
        assert (made is x) == (offset == 0)


def test_steps_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are PyTorch's by default, whose backward keeps the running statistics. The fuzzer's are ours."""
    monkeypatch.undo()
    assert conditions.LEAST_OF_STEPS[True] > 0
    calls = []
    original = autograd.bn_scale_train
    monkeypatch.setattr(autograd, "bn_scale_train", lambda *args: calls.append(1) or original(*args))
    window = {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    named = {"shape": (2, 3, 8, 8), "filters": 4, "given": ("bias", "running_mean", "running_var", "weight"), **window}
    assert check(Problem("conv_bn_scale_train", way="module", gradients=True, **named), "cpu")
    assert len(calls) == 2


def test_a_convolution_that_ends_the_process() -> None:
    """Of nothing but padding in its second dimension. With one more column there is something to convolve."""
    window = {"kernel": (1, 1), "stride": (2, 2), "padding": (1, 1), "dilation": (3, 3)}
    named = {"layout": "channels_last", "filters": 16, "given": ("conv_bias",), "gradients": True, **window}
    with pytest.raises(Invalid, match="PyTorch's convolution of nothing but padding"):
        check(Problem("conv_bn_scale", shape=(2, 16, 17, 1), **named), "cpu")
    assert check(Problem("conv_bn_scale", shape=(2, 16, 17, 2), **named), "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_that_are_not_eagers(dtype: str) -> None:
    """PyTorch's BatchNorm is wrong about them where the channels of one column lie beside each other, and ours is right."""
    p = Problem("bn_scale_train", dtype, shape=(1, 2, 3, 1), layout="permuted", gradients=True)
    assert check(p, "cpu")


def test_a_problem_that_is_none() -> None:
    window = {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    with pytest.raises(Invalid):
        check(Problem("conv_scale_shift", shape=(1, 1, 2, 2), **window), "cpu")


def test_a_backward_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure of ours where eager's raises as well."""

    def raises(*arguments: Any, **named: Any) -> Tensor:
        y = reference.gate(*arguments, **named)
        y.register_hook(lambda dy: dy.new_zeros(3) @ dy.new_zeros(4))
        return y

    p = Problem("gate", shape=(2, 3, 4), gradients=True)
    monkeypatch.setattr(fcb, "gate", raises)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        check(p, "cpu")
    monkeypatch.setattr(truth, "twin", lambda p: raises)
    with pytest.raises(Invalid, match="inconsistent tensor size"):
        check(p, "cpu")
