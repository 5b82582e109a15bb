"""How the compiled libraries are chosen and loaded, and what a user reads when that cannot work."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_conv_bn import _loader

IMPORT_BUDGET_MS = 150


def install(directory: Path, *names: str) -> Path:
    """Fakes an installation with the libraries ``names`` in it."""
    for name in names:
        (directory / f"_{name}.so").write_bytes(b"")
    (directory / "_loader.py").write_bytes(b"")
    return directory


def assert_one_sentence(error: pytest.ExceptionInfo[ImportError]) -> None:
    message = str(error.value)
    assert "\n" not in message and not message.endswith(".") and ". " not in message, message
    assert message.startswith("fused_conv_bn"), message


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+gitabc", "2.11.0+cu130", "2.13.0+cpu", "3.0.0", "2.100.1"])
def test_torch_new_enough(version: str) -> None:
    _loader.check_torch(version)


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.1", "2.1.0", "2.0", "", "unknown"])
def test_torch_too_old(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs torch 2\.10 or newer, and torch .*: pip install --upgrade") as error:
        _loader.check_torch(version)
    assert f"torch {version} is installed" in str(error.value)
    assert_one_sentence(error)


def test_shipped_finds_libraries_only(tmp_path: Path) -> None:
    install(tmp_path, "cpu", "cu13", "cu12")
    (tmp_path / "_core.py").touch()
    (tmp_path / "other.so").touch()
    assert _loader.shipped(tmp_path) == {name: tmp_path / f"_{name}.so" for name in ("cpu", "cu12", "cu13")}


@pytest.mark.parametrize(
    ("cuda", "names"), [(None, ["cpu"]), ("13.0", ["cpu", "cu13"]), ("12.8", ["cpu", "cu12"]), ("13", ["cpu", "cu13"])]
)
def test_library_names(cuda: str | None, names: list[str], tmp_path: Path) -> None:
    assert _loader.library_names(cuda, install(tmp_path, "cpu", "cu12", "cu13")) == names


def test_cpu_library_missing(tmp_path: Path) -> None:
    for cuda in (None, "13.0"):
        with pytest.raises(ImportError, match=r"_cpu\.so is missing from .*reinstall it") as error:
            _loader.library_names(cuda, install(tmp_path, "cu13"))
        assert str(tmp_path) in str(error.value)
        assert_one_sentence(error)


@pytest.mark.parametrize(
    ("shipped", "built"),
    [(["cpu"], "no CUDA"), (["cpu", "cu13"], "CUDA 13"), (["cpu", "cu12", "cu13"], "CUDA 12, CUDA 13")],
)
def test_cuda_major_not_shipped(shipped: list[str], built: str, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=rf"CUDA 14\.1, and this .* has libraries for {built}: .*_cu14\.so") as error:
        _loader.library_names("14.1", install(tmp_path, *shipped))
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("cuda", "forced", "names"),
    [
        ("13.0", "cu12", ["cpu", "cu12"]),
        ("14.1", "cu13", ["cpu", "cu13"]),
        ("13.0", "cpu", ["cpu"]),
        (None, "cpu", ["cpu"]),
    ]
    + [("12.8", "", ["cpu", "cu12"]), (None, None, ["cpu"])],
)
def test_forced(cuda: str | None, forced: str | None, names: list[str], tmp_path: Path) -> None:
    assert _loader.library_names(cuda, install(tmp_path, "cpu", "cu12", "cu13"), forced) == names


@pytest.mark.parametrize(
    ("cuda", "forced", "message"),
    [
        ("13.0", "cu11", r"FUSED_CONV_BN_LIBRARY=cu11, expected one of the libraries in .*: cpu, cu12, cu13"),
        ("13.0", "_cu12.so", r"FUSED_CONV_BN_LIBRARY=_cu12\.so, expected one of"),
        (None, "cu12", r"FUSED_CONV_BN_LIBRARY=cu12, and the installed torch is built without CUDA: unset"),
    ],
)
def test_forced_and_impossible(cuda: str | None, forced: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=message) as error:
        _loader.library_names(cuda, install(tmp_path, "cpu", "cu12", "cu13"), forced)
    assert_one_sentence(error)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)], ids=["empty", "text", "cut ELF"])
def test_damaged_library(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "_cpu.so"
    path.write_bytes(content)
    before = dict(_loader.loaded)
    with pytest.raises(ImportError, match=r"could not be loaded .*reinstall it") as error:
        _loader.load_library("cpu", path)
    assert str(path) in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert_one_sentence(error)
    assert _loader.loaded == before


def test_the_linker_s_reason_is_said(tmp_path: Path) -> None:
    """Of a complete file that needs a library which is not there."""
    damaged = tmp_path / "_cpu.so"
    damaged.write_bytes((_loader.PACKAGE / "_cpu.so").read_bytes().replace(b"\0libtorch.so\0", b"\0libnotch.so\0"))
    with pytest.raises(
        ImportError, match=r"could not be loaded \(libnotch\.so: cannot open shared object file"
    ) as error:
        _loader.load_library("cpu", damaged)
    assert_one_sentence(error)


def test_reinstalling_leaves_torch_alone(tmp_path: Path) -> None:
    """By the wheel's file, as the name alone may find nothing, and without torch, which pip would exchange."""
    advice = r"pip install --force-reinstall --no-deps WHEEL"
    with pytest.raises(ImportError, match=advice):
        _loader.library_names(None, tmp_path)
    (tmp_path / "_cpu.so").touch()
    with pytest.raises(ImportError, match=advice):
        _loader.load_library("cpu", tmp_path / "_cpu.so")


def test_this_process_has_what_its_torch_needs() -> None:
    assert list(_loader.loaded) == _loader.library_names(torch.version.cuda, forced=os.environ.get(_loader.FORCE))
    assert all(path.parent == _loader.PACKAGE for path in _loader.loaded.values())


def python(code: str, package_parent: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds the package in ``package_parent`` first."""
    path = os.pathsep.join([str(package_parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize("damage", ["zero the header", "cut short", "remove"])
def test_import_of_a_damaged_installation(damage: str, tmp_path: Path) -> None:
    package = tmp_path / "fused_conv_bn"
    shutil.copytree(_loader.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert python("import fused_conv_bn; assert 'cpu' in fused_conv_bn._loader.loaded", tmp_path).returncode == 0
    library = package / "_cpu.so"
    if damage == "zero the header":
        library.write_bytes(bytes(64) + library.read_bytes()[64:])
    elif damage == "cut short":  # by little: dlopen would crash the process
        library.write_bytes(library.read_bytes()[:-100])
    else:
        library.unlink()
    result = python("import fused_conv_bn", tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_conv_bn: ") and str(package) in last and "reinstall it" in last


def test_the_variable_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import fused_conv_bn; print(*fused_conv_bn._loader.loaded)"
    monkeypatch.setenv(_loader.FORCE, "cpu")
    assert python(code, _loader.PACKAGE.parent).stdout == "cpu\n"
    monkeypatch.setenv(_loader.FORCE, "nothing")
    assert "ImportError: fused_conv_bn: FUSED_CONV_BN_LIBRARY=nothing" in python(code, _loader.PACKAGE.parent).stderr


def test_import_is_quick_and_leaves_cuda_alone() -> None:
    """On top of torch. The budget is for all of it: reading the libraries, registering the ops, their fakes."""
    code = (
        "import time, torch; t = time.perf_counter(); import fused_conv_bn; t = time.perf_counter() - t; "
        "assert not torch.cuda.is_initialized(); print(1e3 * t)"
    )
    runs = [python(code, _loader.PACKAGE.parent) for _ in range(3)]
    assert not any(run.returncode for run in runs), runs[0].stderr
    assert statistics.median(float(run.stdout) for run in runs) < IMPORT_BUDGET_MS


# ---- compute capabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "archs", "covered"),
    [
        ((9, 0), "9.0", True),
        ((8, 9), "8.0 9.0", True),  # machine code for 8.0 runs on 8.9
        ((8, 0), "8.6 9.0", False),
        ((10, 0), "9.0", False),
        ((10, 0), "9.0+PTX", True),
        ((9, 0), "8.0 10.0+PTX", False),
        ((12, 1), "8.0 9.0 12.0+PTX", True),
        ((7, 5), "8.0+PTX", False),
        ((9, 0), "", False),
    ],
)
def test_covers(capability: tuple[int, int], archs: str, covered: bool) -> None:
    assert _loader.covers(capability, archs) is covered


def test_cuda_archs_are_those_of_a_loaded_library(device: str) -> None:
    archs = _loader.cuda_archs()
    assert (archs is None) == (list(_loader.loaded) == ["cpu"])
    if device == "cuda":
        assert archs is not None and _loader.covers(torch.cuda.get_device_capability(), archs)
