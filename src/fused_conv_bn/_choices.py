"""Which algorithms were measured to be the fastest on this machine: in a file, and in the tables of the libraries.

The user's cache folder has a file for each set of versions, of this package, torch and cuDNN. In it choices are kept by
device, with its driver, and by problem: numbers that the library makes of a call. The file is read when the package is
imported. That asks nothing of CUDA: the choices of all GPUs go to the library, which knows what it runs on.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from ._count import counted
from .conditions import has_cuda_library

_ops = torch.ops.fused_conv_bn

Problem: TypeAlias = tuple[int, ...]
Choices: TypeAlias = dict[Problem, str]
"""The name of an algorithm for each problem."""

NUMBERS = 23
"""Of a problem: as many as the libraries want (TunedProblem in csrc/ops/conv_tuned.h)."""

CPU = "cpu"
"""What the library calls the device that it has no name for. The file has the processor's."""

_lock = threading.RLock()
_known: dict[str, Choices] = {}
_unwritten: set[str] = set()  # devices of which the file could not be written


# ---- the libraries' tables -------------------------------------------------------------------------------------------


def known(device: str) -> Choices:
    """A copy of what is known of a device, by the library's name for it."""
    with _lock:
        return dict(_known.get(device, {}))


def _hand_over(device: str, choices: Choices) -> None:
    """Replaces the library's table for a device. RuntimeError: a problem has not the numbers that the library wants."""
    numbers = [n for problem in choices for n in problem]
    names = ",".join(choices.values())
    if device == CPU:
        _ops._set_choices.cpu(numbers, names)
    elif has_cuda_library():
        _ops._set_choices.cuda(numbers, names, device)


def are_kept(device: str) -> bool:
    """Whether later processes have what was found here."""
    return device not in _unwritten


@contextlib.contextmanager
def trial(device: str, problem: Problem, algorithm: str | None) -> Iterator[None]:
    """Inside, the library has this choice for a problem; None: the rule's."""
    with _lock:
        tried = known(device)
        tried.pop(problem, None)
        _hand_over(device, tried if algorithm is None else tried | {problem: algorithm})
    try:
        yield
    finally:
        with _lock:
            _hand_over(device, known(device))


def add(device: str, choices: Choices) -> None:
    """From now on these hold, in this process and in later ones. A file that cannot be written leads to a warning."""
    with _lock:
        _known[device] = known(device) | choices
        _hand_over(device, _known[device])
        try:
            _write({device: _known[device]})
            _unwritten.discard(device)
        except OSError as error:
            _unwritten.add(device)
            warnings.warn(
                f"fused_conv_bn: {path()} could not be written ({error}): what was tuned holds for this process alone",
                RuntimeWarning,
                stacklevel=2,
            )


# ---- the file --------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """$FUSED_CONV_BN_CHOICES, $XDG_CACHE_HOME/fused_conv_bn or ~/.cache/fused_conv_bn. It need not exist."""
    if named := os.environ.get("FUSED_CONV_BN_CHOICES"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "fused_conv_bn")


def path() -> Path:
    from . import __version__

    return folder() / f"choices-{__version__}-torch-{torch.__version__}-cudnn-{_cudnn()}.json"


def _cudnn() -> str:
    """The version of cuDNN by its package: the library itself may begin with CUDA when it is asked."""
    if torch.version.cuda is None:
        return "none"
    try:
        return importlib.metadata.version(f"nvidia-cudnn-cu{torch.version.cuda.partition('.')[0]}")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _in_file(device: str) -> str:
    """A device's name in the file: a processor has its model's, and what PyTorch's kernels may use of it."""
    if device != CPU:
        return device
    model = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"cpu {model}, {torch.backends.cpu.get_cpu_capability()}"


def _read(file: Path) -> dict[str, Choices]:
    """By the names in the file. FileNotFoundError, other OSErrors, and ValueError for what is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or not all(isinstance(choices, dict) for choices in content.values()):
        raise ValueError("it is no JSON object of objects")
    found: dict[str, Choices] = {}
    for device, choices in content.items():
        if not device.isprintable():
            raise ValueError(f"{device!r} is no device")
        found[device] = {}
        for problem, algorithm in choices.items():
            if not isinstance(algorithm, str) or not (algorithm.isascii() and algorithm.isidentifier()):
                raise ValueError(f"{algorithm!r} is no algorithm")
            numbers = tuple(map(int, problem.split()))
            if len(numbers) != NUMBERS:
                raise ValueError(f"a problem has {counted(len(numbers), 'number')}, not {NUMBERS}")
            if any(n.bit_length() > 63 for n in numbers):
                raise ValueError("a problem has a number of more than 64 bits")
            found[device][numbers] = algorithm
    return found


def _write(mine: Mapping[str, Choices]) -> None:
    """Adds choices to the file. It is replaced as a whole, so that nobody reads half of it."""
    file = path()
    try:
        content = _read(file)
    except (OSError, ValueError):  # nothing there that is worth keeping
        content = {}
    for device, choices in mine.items():
        content[_in_file(device)] = content.get(_in_file(device), {}) | choices
    texts = {
        device: {" ".join(map(str, problem)): algorithm for problem, algorithm in choices.items()}
        for device, choices in content.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".new")
    try:
        with open(handle, "w", encoding="utf-8") as out:
            json.dump(texts, out, indent=1)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def load() -> None:
    """Hands the file's choices to the libraries. A damaged file is ignored, with a warning."""
    try:
        if not folder().is_dir():
            return
    except OSError:  # of another user's home, say: this user has tuned nothing
        return
    file = path()
    try:
        found = _read(file)
        processor = _in_file(CPU)
        for name, choices in found.items():
            if name == processor or not name.startswith("cpu "):
                device = CPU if name == processor else name
                _hand_over(device, choices)
                _known[device] = choices
    except FileNotFoundError:
        pass
    except OSError as error:
        warnings.warn(
            f"fused_conv_bn: {file} could not be read ({error}): nothing that was tuned holds",
            RuntimeWarning,
            stacklevel=2,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"fused_conv_bn: {file} is damaged ({reason}) and was ignored: tune again, or delete it",
            RuntimeWarning,
            stacklevel=2,
        )
