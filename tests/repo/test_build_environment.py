"""What a build from source finds: torch, the CUDA toolkit, compilers, and CUDA 12's set up. Compiles nothing."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from building import ROOT, install_nvcc, install_torch, sentence, use

pytest.importorskip("setuptools.command.bdist_wheel", reason="building needs setuptools 77 or newer")


# ---- what is installed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "headers", "message"),
    [
        ("2.9.1+cu128", True, "torch 2.9.1+cu128 is installed, and building needs 2.10 or newer"),
        ("2.13.0", False, "torch 2.13.0 has no C++ headers in"),
        (None, True, "building needs torch 2.10 or newer, and"),
    ],
)
def test_no_usable_torch(
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str | None,
    headers: bool,
    message: str,
) -> None:
    if version:
        install_torch(tmp_path, version, None, headers=headers)
    use(environment, monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as error:
        environment.Tools()
    assert message in sentence(error) and "pip install" in sentence(error)


def test_torch_of_the_build_comes_first(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = install_torch(tmp_path / "a", "2.14.0+cu130", "13.0")
    use(environment, monkeypatch, tmp_path, first, install_torch(tmp_path / "b", "2.13.0", None))
    torch = environment.find_torch()
    assert (torch.version, torch.cuda_major, torch.lib) == ("2.14.0+cu130", 13, first / "torch" / "lib")


def test_torch_that_cannot_be_imported(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(environment, monkeypatch, install_torch(tmp_path, "2.13.0", None))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    with pytest.raises(SystemExit) as error:
        environment.import_torch(environment.find_torch())
    assert "torch 2.13.0 is installed, and importing it fails (" in sentence(error)
    assert sys.path[-1] == str(tmp_path)


def test_no_compiler() -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fused_conv_bn: building needs a C++ compiler, and no-such-compiler is not in PATH")


@pytest.mark.parametrize(
    ("torch_major", "found", "setting", "expected"),
    [
        (None, [], "", []),
        (None, [13], "", []),
        (None, [12, 13], "1", [12]),
        (13, [12, 13], "", [13]),
        (13, [13], "0", []),
        (None, [13], "1", [13]),
        (12, [13, 12], "1", [12]),
        (None, [12, 13], "12 13", [12, 13]),
        (13, [12], "12", [12]),
        (13, [], "", "no CUDA 13 compiler was found: install one with pip install 'cuda-toolkit"),
        (12, [13], "", "no CUDA 12 compiler was found: let CUDA_HOME name"),
        (None, [], "1", "no CUDA 13 compiler"),
        (None, [13], "12 13", "no CUDA 12 compiler"),
        (11, [], "", "CUDA 11 is not supported"),
        (None, [13], "yes", "FUSED_CONV_BN_CUDA is 'yes', expected 0, 1, or"),
    ],
)
def test_choice_of_cuda(
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    torch_major: int | None,
    found: list[int],
    setting: str,
    expected: list[int] | str,
) -> None:
    monkeypatch.setenv("FUSED_CONV_BN_CUDA", setting)
    monkeypatch.setattr(environment, "find_cuda", lambda: dict.fromkeys(found))
    if isinstance(expected, list):
        assert list(environment.choose_cuda(torch_major)) == expected
        return
    with pytest.raises(SystemExit) as error:
        environment.choose_cuda(torch_major)
    assert expected in sentence(error)


def test_cuda_home_comes_first(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(install_nvcc(tmp_path / "mine", "13.2")))
    use(environment, monkeypatch, tmp_path)
    assert environment.find_cuda()[13].version == (13, 2)
    monkeypatch.setenv("CUDA_HOME", str(install_nvcc(tmp_path / "old", "12.4")))
    assert {major: cuda.version for major, cuda in environment.find_cuda().items()} == {12: (12, 4), 13: (13, 0)}


def test_toolkit_without_what_is_needed(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that CUDA_HOME names is refused, another is passed over."""
    home = install_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    use(environment, monkeypatch, tmp_path)
    assert list(environment.find_cuda()) == [13]
    (home / "lib" / "libcudart_static.a").unlink()
    assert environment.find_cuda() == {}
    for folder, message in ((home, "has no libcudart_static.a"), (tmp_path, "nvcc is missing or does not run")):
        monkeypatch.setenv("CUDA_HOME", str(folder))
        with pytest.raises(SystemExit) as error:
            environment.find_cuda()
        assert message in sentence(error)


@pytest.mark.parametrize(
    ("torch", "nvcc", "setting", "expected"),
    [
        (("2.13.0+cpu", None), False, "", set()),
        (("2.14.0+cu130", "13.0"), True, "", set()),
        (("2.14.0+cu130", "13.0"), False, "", {"cuda-toolkit"}),
        (("2.14.0+cu130", "13.0"), False, "0", set()),
        (("2.14.0+cu126", "12.6"), False, "", set()),
        (("2.13.0+cpu", None), False, "1", {"cuda-toolkit"}),
        (("2.13.0+cpu", None), False, "13", {"cuda-toolkit"}),
        (None, False, "0", {"torch"}),
        (None, False, "", {"torch", "cuda-toolkit"}),
    ],
)
def test_isolated_build_installs_only_what_is_missing(
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    torch: tuple[str, str | None] | None,
    nvcc: bool,
    setting: str,
    expected: set[str],
) -> None:
    if torch:
        install_torch(tmp_path, *torch)
    if nvcc:
        install_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    use(environment, monkeypatch, tmp_path)
    monkeypatch.setenv("FUSED_CONV_BN_CUDA", setting)
    backend = importlib.import_module("build_tools.backend")
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda config_settings: [])
    assert {re.split(r"[\[>]", name)[0] for name in backend.get_requires_for_build_wheel()} == expected


def test_isolated_build_ends_early_next_to_a_torch_that_is_too_old(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it builds against a newer one would be refused by import, minutes later."""
    install_torch(tmp_path, "2.9.0", "12.8")
    use(environment, monkeypatch, tmp_path)
    backend = importlib.import_module("build_tools.backend")
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda config_settings: [])
    with pytest.raises(SystemExit) as error:
        backend.get_requires_for_build_wheel()
    assert "torch 2.9.0 is installed, and building needs 2.10 or newer: pip install -U torch" in sentence(error)


@pytest.mark.parametrize("module", ["backend", "commands"])
def test_setuptools_that_is_too_old(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Both that pip asks and that setup.py begins with, before they import what an old one lacks."""
    monkeypatch.setattr("setuptools.__version__", "65.7.0.post1")
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", None)
    with pytest.raises(SystemExit) as error:
        importlib.import_module(f"build_tools.{module}")
    assert sentence(error) == (
        "fused_conv_bn: building needs setuptools 77 or newer, and 65.7.0.post1 is installed: pip install -U setuptools"
    )
    assert f'"setuptools>={environment.MIN_SETUPTOOLS}"' in (ROOT / "pyproject.toml").read_text()


def test_an_editable_installation_compiles_once(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """pip gives each of them a new folder for what is compiled."""
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    commands = importlib.import_module("build_tools.commands")
    extension = importlib.import_module("build_tools.extension")
    used: list[Path] = []
    monkeypatch.setattr(extension, "build", lambda library, tools, directory: used.append(directory) or True)
    for i, editable in enumerate((True, True, False)):
        command = commands.BuildExt(Distribution())
        command.tools, command.editable_mode, command.build_temp = None, editable, str(tmp_path / str(i))
        command.compile("cpu", "_cpu.so")
    in_place = build_ext(Distribution())
    in_place.ensure_finalized()
    assert used == [*[ROOT / in_place.build_temp / "cpu"] * 2, tmp_path / "2" / "cpu"]


def test_make_says_that_it_takes_no_spaces(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    run = subprocess.run(["make", "help"], cwd=folder, capture_output=True, text=True)
    assert (
        run.returncode and f"This folder has a space in its path, which make cannot work with: {folder}" in run.stderr
    )


# ---- the CUDA 12 compiler --------------------------------------------------------------------------------------------


def make_deb(path: Path, files: dict[str, bytes]) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    text = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\nx"), ("data.tar.xz", data.getvalue())):
        text += f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(content):<10}`\n".encode() + content
        text += b"\n" * (len(content) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


def make_spec(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, **change: object) -> Path:
    """A mirror with a toolkit of one package, whose nvcc is a script, and a cuda12.json for it."""
    script = b"#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n"
    deb = make_deb(folder / "mirror" / "pool" / "nvcc_12~1.deb", {"usr/lib/nvcc": script, "usr/lib/x/y.h": b"text"})
    archive = {
        "debian": "pool/nvcc_12~1.deb",
        "sha256": hashlib.sha256(deb.read_bytes()).hexdigest(),
        "take": {"usr/lib/nvcc": "bin/nvcc", "usr/lib/x/": "include/"},
    }
    spec = folder / "cuda12.json"
    spec.write_text(json.dumps({"version": "12.4", "archives": [{**archive, **change}]}))
    monkeypatch.setattr(toolchain, "SPEC", spec)
    monkeypatch.setenv("FUSED_CONV_BN_DEBIAN_MIRROR", (folder / "mirror").as_uri())
    return deb


def test_toolchain_is_set_up_once(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deb = make_spec(toolchain, monkeypatch, tmp_path)
    home = toolchain.ensure()
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == [
        "bin/nvcc",
        "bin/nvcc.profile",
        "include/y.h",
    ]
    assert os.access(home / "bin" / "nvcc", os.X_OK)
    assert list(home.parent.iterdir()) == [home]
    deb.unlink()
    assert toolchain.ensure() == home


@pytest.mark.parametrize(
    ("damage", "change", "message"),
    [
        (lambda deb: deb.write_bytes(deb.read_bytes()[:-1]), {}, "nvcc_12~1.deb is damaged or not the file"),
        (lambda deb: deb.unlink(), {}, "nvcc_12~1.deb could not be downloaded"),
        (lambda deb: None, {"take": {"usr/lib/nvcc": "bin/nvcc", "etc/": "etc/"}}, "nvcc_12~1.deb has no etc/"),
        (lambda deb: None, {"take": {"usr/lib/x/y.h": "bin/nvcc"}}, "its nvcc does not run here"),
    ],
)
def test_toolchain_refuses(
    toolchain: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    damage: object,
    change: dict[str, object],
    message: str,
) -> None:
    deb = make_spec(toolchain, monkeypatch, tmp_path, **change)
    damage(deb)  # type: ignore[operator]
    with pytest.raises(toolchain.ToolchainError) as error:
        toolchain.ensure()
    assert message in sentence(error)
    assert list((tmp_path / "cache" / "fused_conv_bn").iterdir()) == []
