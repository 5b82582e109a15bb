"""The model that a command line names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ._cli import UsageError


def load(spec: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """The model that ``module:name`` or ``path.py:name`` names, and the inputs that come with it, if any do.

    The name is that of a callable without arguments, which returns a model, or a model with a tensor or a tuple of
    arguments to call it with. It may also be that of a model.

    Raises:
        UsageError: there is no such thing, it fails, or it returns something else.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"MODEL is {spec!r}, expected module:callable or file.py:callable")
    found: Any = _import_file(place) if place.endswith(".py") else _import_module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"MODEL: {place} has no {name}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UsageError(f"MODEL: {spec} is of type {type(found).__name__}, expected a callable or an nn.Module")
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise UsageError(f"MODEL: {spec}() failed: {first_line(error)}") from error
    model, inputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"MODEL: {spec}() returned a {type(found).__name__}, expected an nn.Module, or one and its inputs"
        )
    return model, inputs if inputs is None or isinstance(inputs, tuple) else (inputs,)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UsageError(f"MODEL: module {name} cannot be imported: {first_line(error)}") from error


def _import_file(place: str) -> ModuleType:
    """As Python runs a file: what is in its folder can be imported."""
    path = Path(place).resolve()
    if not path.is_file():
        raise UsageError(f"MODEL: there is no file {place}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules.setdefault(path.stem, module)  # which dataclasses and pickles look for
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"MODEL: {place} failed: {first_line(error)}") from error
    return module
