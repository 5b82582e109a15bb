"""Makes a problem that fails smaller, for as long as it fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import MISSING, fields

from .problem import CONVOLVED, Problem, changed
from .run import Failure, Invalid, check


class Other(Failure):
    """An error of no promise."""


def failure_of(p: Problem, device: str, *, of_any_kind: bool = True) -> Failure | None:
    """None for a problem that holds, is none, or is not covered. of_any_kind: also an error beside the promises."""
    try:
        check(p, device)
    except Invalid:
        return None
    except Failure as failure:
        return failure
    except Exception as error:
        return Other(f"{type(error).__name__}: {error}") if of_any_kind else None
    return None


def shrunk(p: Problem, failure: Failure, device: str, seconds: float = 20.0) -> tuple[Problem, Failure]:
    """The smallest problem found in that time, and how it fails, which may be another way than the first one."""
    end = time.monotonic() + seconds
    found = True
    while found:
        found = False
        for smaller in candidates(p):
            if time.monotonic() > end:
                return p, failure
            now = failure_of(smaller, device, of_any_kind=isinstance(failure, Other))
            if now is not None:
                p, failure, found = smaller, now, True
                break
    return p, failure


def candidates(p: Problem) -> Iterator[Problem]:
    """Simpler ones: options at their defaults, then tensors left out, then numbers halved and one less."""
    for field in fields(p):
        value, default = getattr(p, field.name), field.default
        if default is MISSING or value == default or field.name in SIZES:
            continue
        if field.name == "given":
            for name in value:
                partner = {"running_mean": "running_var", "running_var": "running_mean"}.get(name)
                yield changed(p, given=tuple(n for n in value if n not in (name, partner)))
        elif not (field.name == "given_dtype" and p.op in ("scale_shift", "conv_scale_shift")):
            yield changed(p, **{field.name: default})
    if p.groups > 1 and p.op in CONVOLVED:
        inner, outer = p.shape[1] // p.groups, p.filters // p.groups
        for groups in {1, p.groups // 2, p.groups - 1}:
            yield changed(p, groups=groups, filters=outer * groups, shape=(p.shape[0], inner * groups, *p.shape[2:]))
    for i in range(len(p.parts)):
        if len(p.parts) > 1:
            yield changed(p, parts=p.parts[:i] + p.parts[i + 1 :])
    for name in SIZES:
        value = getattr(p, name)
        if isinstance(value, int):
            for n in _smaller(value, 1):
                yield changed(p, **{name: n})
            continue
        for i, n in enumerate(value):
            for less in _smaller(n, 0 if name == "padding" else 1):
                yield changed(p, **{name: (*value[:i], less, *value[i + 1 :])})


SIZES = ("shape", "filters", "hidden", "kernel", "stride", "padding", "dilation", "parts", "groups")
"""A group's channels are halved together with the groups."""


def _smaller(n: int, least: int) -> list[int]:
    return sorted({m for m in (least, n // 2, n - n // 4, n - 1) if least <= m < n})
