"""What is registered with a part of PyTorch when somebody imports that part, which takes long or may be missing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, register: Callable[[ModuleType], Any]) -> None:
        self.name, self.register = name, register

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            self.register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, register: Callable[[ModuleType], Any]) -> None:
    """Calls ``register`` with the module of that name: now if it is imported already, else when it is."""
    if name in sys.modules:
        register(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, register))
