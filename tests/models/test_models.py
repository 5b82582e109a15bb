"""fuse() of whole models of torchvision, timm, ultralytics and segmentation_models_pytorch: nothing lost, all right."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._fuse import entry as fused_entry

PACKAGES = ("torchvision", "timm", "ultralytics", "segmentation_models_pytorch")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
    needs = f"needs {', '.join(MISSING)}: pip install --no-deps -r requirements/models.txt"
    pytest.skip(needs, allow_module_level=True)

import zoo  # noqa: E402
from zoo import CASES, Case  # noqa: E402


@dataclass
class Subject:
    name: str
    case: Case
    plain: nn.Module
    fused: nn.Module
    wanted: list[list[Tensor]]  # what the plain model gives, for each input
    first: list[list[Tensor]]  # what the fused one gave at its first call of each
    seconds: float  # of the processor: fuse() and the first call, less a call of the plain model


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the processor's time is what one waits for, whatever else runs
    case = CASES[request.param]
    plain = zoo.make(request.param)
    fused = copy.deepcopy(plain)
    with torch.no_grad():
        case.run(plain, 0)
        start = time.process_time()
        wanted = [case.run(plain, 0)]
        middle = time.process_time()
        fcb.fuse(fused)
        first = [case.run(fused, 0)]
        seconds = time.process_time() - middle - (middle - start)
        wanted.append(case.run(plain, 1))
        first.append(case.run(fused, 1))
    yield Subject(request.param, case, plain, fused, wanted, first, seconds)
    torch.set_num_threads(threads)


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest of all tensors' differences, relative to the largest value of each."""
    assert [t.shape for t in got] == [t.shape for t in wanted]
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, wanted, strict=True)]
    assert all(b.isfinite().all() for _, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def test_groups(subject: Subject) -> None:
    with_bn, alone, without = zoo.found(subject.fused)
    assert with_bn == subject.case.groups
    assert alone == subject.case.alone
    assert without == subject.case.without


def test_nothing_is_left_without_a_reason(subject: Subject) -> None:
    rows = fcb.report(subject.fused).rows
    assert all(row.text for row in rows)
    assert {row.path for row in rows if row.state == "not called"} == subject.case.never_called
    ran = [row for row in rows if row.state != "not called"]
    assert {row.state for row in ran if row.module == "bn"} <= {"fused"}
    assert {row.state for row in ran if row.module == "conv"} <= {"fused", "left"}


def test_evaluation(subject: Subject) -> None:
    limit = 3e-6 if subject.case.before_selection is None else 1e-5
    for index, wanted in enumerate(subject.wanted):
        assert difference(subject.first[index], wanted) <= limit
        with torch.no_grad():
            assert difference(subject.case.run(subject.fused, index), wanted) <= limit


def test_time(subject: Subject) -> None:
    assert subject.seconds < 3


def test_a_second_call_captures_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fcb.fuse(copy.deepcopy(subject.plain))

    def again(root: nn.Module, *_: object) -> None:
        raise AssertionError(f"{type(root).__name__} is captured again")

    with torch.no_grad():
        subject.case.run(model, 0)
        monkeypatch.setattr(fused_entry, "capture", again)
        assert difference(subject.case.run(model, 0), subject.wanted[0]) <= 1e-5


def test_unfused_is_the_same_bit_by_bit(subject: Subject) -> None:
    fcb.unfuse(subject.fused)
    try:
        assert [type(m) for m in subject.fused.modules()] == [type(m) for m in subject.plain.modules()]
        with torch.no_grad():
            got = subject.case.run(subject.fused, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, subject.wanted[0], strict=True))
    finally:
        fcb.fuse(subject.fused)
        with torch.no_grad():  # as it was: other tests read what its calls have captured
            subject.case.run(subject.fused, 0)


def test_state_dict(subject: Subject) -> None:
    """Of a fused model into a plain one, and of another one into the fused one, through a file."""
    state, other = subject.fused.state_dict(), copy.deepcopy(subject.plain.state_dict())
    assert list(state) == list(other)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.values(), strict=True))
    generator = torch.Generator().manual_seed(5)
    for t in other.values():
        if t.is_floating_point():
            t.mul_(torch.rand(t.shape, generator=generator) * 0.2 + 0.9)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    plain, fused = copy.deepcopy(subject.plain), subject.fused
    before = {name: t.clone() for name, t in state.items()}
    try:
        for model in (plain, fused):
            file.seek(0)
            model.load_state_dict(torch.load(file))
        with torch.no_grad():
            wanted, got = subject.case.run(plain, 0), subject.case.run(fused, 0)
        assert difference(subject.wanted[0], wanted) > 1e-3
        assert difference(got, wanted) <= 1e-5
    finally:
        fused.load_state_dict(before)


def as_exact_as_eager(got: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Against the same in float64: an error of eager's size.

    The factor is for the largest of few roundings, the floor for values that eager happens to have exactly.
    """
    for mine, theirs, right in zip(got, eager, exact, strict=True):
        size = float(right.detach().abs().max())
        limit = 8 * float((theirs.detach() - right.detach()).abs().max()) + 2e-6 * size
        assert limit < 0.05 * size or size == 0, "the case says nothing"
        assert float((mine.detach() - right.detach()).abs().max()) <= limit


def close_in_float64(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Within 1e-7: eager's own error in float32 is up to 0.3 in gradients, 3e6 roundings, and in float64 these are 6e-10.

    A gradient may be 0 but for roundings, as that of a bias in front of a BatchNorm: so the others' size counts as well.
    """
    largest = max(float(t.detach().abs().max()) for t in wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        size = max(float(theirs.detach().abs().max()), 1e-3 * largest)
        assert mine.dtype == theirs.dtype == torch.float64
        assert float((mine.detach() - theirs.detach()).abs().max()) <= 1e-7 * size


def floating_buffers(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if b.is_floating_point()]


def test_training(subject: Subject) -> None:
    """Results and running statistics after two steps."""
    models = [zoo.without_chance(copy.deepcopy(m)).train() for m in (subject.fused, subject.plain, subject.plain)]
    models[2].double()
    for index in range(2):
        as_exact_as_eager(*(subject.case.run(m, index) for m in models))
    as_exact_as_eager(*map(floating_buffers, models))
    counts = [[b for n, b in m.named_buffers() if n.endswith("num_batches_tracked")] for m in models]
    assert counts[0] == counts[1]


def test_training_in_float64(subject: Subject) -> None:
    """With all that chance does to it."""
    models = [copy.deepcopy(m).train().double() for m in (subject.fused, subject.plain)]
    for index in range(2):
        close_in_float64(*(subject.case.run(m, index) for m in models))
    close_in_float64(*map(floating_buffers, models))


@pytest.mark.parametrize("subject", ["resnet50", "mobileone_s0", "yolo11n"], indirect=True)
def test_gradients(subject: Subject) -> None:
    """In training mode in float64: in float32 eager's own are nearly random."""
    gradients = []
    for m in (copy.deepcopy(m).train().double() for m in (subject.fused, subject.plain)):
        sum(t.square().mean() for t in subject.case.run(m, 0)).backward()
        gradients.append([p.grad for p in m.parameters() if p.requires_grad])
    close_in_float64(*gradients)


@pytest.mark.parametrize("subject", ["resnet50", "mobileone_s0", "yolo11n"], indirect=True)
def test_gradients_in_evaluation(subject: Subject) -> None:
    models = [copy.deepcopy(m) for m in (subject.fused, subject.plain, subject.plain)]
    models[2].double()
    gradients = []
    for m in models:
        sum(t.square().mean() for t in subject.case.run(m, 0)).backward()
        gradients.append([p.grad for p in m.parameters() if p.requires_grad])
    as_exact_as_eager(*gradients)


@pytest.mark.parametrize("subject", ["yolo11n"], indirect=True)
def test_as_many_as_the_model_s_own_fuse(subject: Subject) -> None:
    rival = copy.deepcopy(subject.plain)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in rival.modules())
    rival.fuse(verbose=False)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in rival.modules())
    assert norms - left == sum(zoo.found(subject.fused)[0].values())
    with torch.no_grad():
        assert difference(subject.case.run(rival, 0), subject.wanted[0]) <= 1e-5
