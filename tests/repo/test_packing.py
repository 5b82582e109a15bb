"""Objects, wheels and the sdist: the same bytes in every folder, and nothing that does not belong. Compiles nothing."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from building import CSRC, MATRIX, ROOT, load

pytest.importorskip("setuptools.command.bdist_wheel", reason="building needs setuptools 77 or newer")


# ---- reproducible objects ----------------------------------------------------------------------------------------------

FAKE_NVCC = """#!/bin/sh
{
  echo '#$ GREETING=hello'
  echo "#\\$ sh preprocess.sh -o \\"$4/a.cpp4.ii\\" "
  echo "#\\$ sh cudafe.sh --gen_module_id_file \\"$4/a.module_id\\" --orig_src_path_name \\"$PWD/a.cu\\" \\"$4/a.cpp4.ii\\" "
} >&2
"""


def test_object_does_not_depend_on_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvcc's commands run with its variables, but without what it would name symbols after."""
    nvcc = load("nvcc", monkeypatch)
    results = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        (folder / "nvcc").write_text(FAKE_NVCC)
        (folder / "nvcc").chmod(0o755)
        (folder / "preprocess.sh").write_text('touch "$5"')  # -o FILE -MD -MF FILE
        (folder / "cudafe.sh").write_text('{ echo "$GREETING $*"; cat "$1"; } > a.o')
        assert nvcc.main("./nvcc", "-MD", "-MF", "a.o.d", "-c", "-c", "a.cu", "-o", "a.o", "-O3", "-Xx=b.cu") == 0
        assert sorted(path.name for path in folder.iterdir() if "a.o" in path.name) == ["a.o", "a.o.d"]
        results.append((folder / "a.o").read_text())
    assert results[0] == results[1]
    assert results[0].startswith("hello ") and results[0].endswith(nvcc.module_id("a.cu"))
    assert "--gen_module_id_file" not in results[0] and "--orig_src_path_name a.cu" in results[0]
    assert nvcc.name_in_tree(str(CSRC / "ops" / ".." / "a.cu")) == "csrc/a.cu" and nvcc.name_in_tree("a.cu") == "a.cu"
    long = ("--generate-dependencies-with-compile", "--dependency-output", "a.o.d", "-O3", "-c", "a.cu", "-o", "a.o")
    assert nvcc.split(long) == (["-O3"], "a.o.d", "a.cu", "a.o")
    assert len({nvcc.module_id(source) for source in ("a.cu", "b.cu", "x/a.cu")}) == 3


PTX = """\
.version 8.4
.target sm_90
.extern .shared .align 16 .b8 shared[];
.visible .entry _Z1kI13__nv_bfloat16S0_EvT_(
	.param .u64 p
)
.maxntid 256, 1, 1
{
	{ mov.b32 %r1, shared; }
	// begin inline asm
	{
ret;
}
	// end inline asm
	ret;
}
.global .align 1 .b8 between[1];
.visible .entry _Z1jI6__halfEvT_(
)
{
	ret;
}
	// .globl	_Z1kI6__halfS1_EvT_
.visible .entry _Z1kI6__halfS1_EvT_(
)
{
	ret;
}
"""


def test_twins_become_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing gets lost, and what kernels may refer to stays before them."""
    nvcc = load("nvcc", monkeypatch)
    ptx = nvcc.gather(PTX)
    assert sorted(ptx.splitlines()) == sorted(PTX.splitlines())
    assert re.findall(r"\.entry (\w+)", ptx) == [
        "_Z1jI6__halfEvT_",
        "_Z1kI13__nv_bfloat16S0_EvT_",
        "_Z1kI6__halfS1_EvT_",
    ]
    assert ptx.index(".shared") < ptx.index("between") < ptx.index(".entry")
    assert "\n.maxntid 256, 1, 1\n{\n\t{ mov.b32 %r1, shared; }\n" in ptx
    assert "ret;\n}\n\t// end inline asm\n\tret;\n}\n" in ptx


# ---- packing ---------------------------------------------------------------------------------------------------------


def fake_libraries(build: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Instead of compiling, hands out files for these libraries and has no compiler for the others."""

    def compile_library(name: str) -> Path:
        if name not in names:
            raise build.toolchain.ToolchainError("there is no network")
        path = folder / MATRIX["libraries"][name]["file"]
        path.write_text(name)
        return path

    monkeypatch.setattr(build, "compile_library", compile_library)


def test_complete_wheels(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_libraries(build, monkeypatch, tmp_path, *MATRIX["libraries"])
    build.main(["fat", "cu124", "--out", str(tmp_path / "out")])
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for name in ("fat", "cu124"):
        full = version[1] + ("" if name == "fat" else f"+{name}")
        with zipfile.ZipFile(tmp_path / "out" / f"fused_conv_bn-{full}-{MATRIX['tag']}.whl") as wheel:
            names = wheel.namelist()
            metadata = wheel.read(f"fused_conv_bn-{full}.dist-info/METADATA").decode()
            assert {f"{info.external_attr >> 16:o}" for info in wheel.infolist() if info.filename[-3:] == ".py"} == {
                "100644"
            }
        files = [MATRIX["libraries"][library]["file"] for library in MATRIX["wheels"][name]["libraries"]]
        assert sorted(n for n in names if n.endswith(".so")) == sorted(f"fused_conv_bn/{file}" for file in files)
        assert sorted(path.name for path in (ROOT / "src" / "fused_conv_bn").rglob("*.py")) == sorted(
            Path(n).name for n in names if n.endswith(".py")
        )
        assert f"\nVersion: {full}\n" in metadata and "\nRequires-Dist: torch>=2.10\n" in metadata


def test_wheel_is_reproducible(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_libraries(build, monkeypatch, tmp_path, *MATRIX["libraries"])
    digests = set()
    for umask in (0o022, 0o077):
        previous = os.umask(umask)
        try:
            build.main(["--out", str(tmp_path / str(umask))])
        finally:
            os.umask(previous)
        (wheel,) = (tmp_path / str(umask)).iterdir()
        digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_libraries_of_an_earlier_build_are_not_packed(tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").write_text("new")
    package = tmp_path / "lib" / "fused_conv_bn"
    package.mkdir(parents=True)
    (package / "_cu13.so").write_text("old")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path / 'lib'}"],
        cwd=ROOT,
        env={**os.environ, "FUSED_CONV_BN_LIBRARIES": str(tmp_path / "_cpu.so")},
        check=True,
        capture_output=True,
    )
    assert [path.name for path in package.iterdir()] == ["_cpu.so"]


def test_incomplete_wheel_does_not_look_complete(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_libraries(build, monkeypatch, tmp_path, "cpu", "cu13")
    with pytest.raises(SystemExit) as error:
        build.main(["fat", "cu124", "--out", str(tmp_path / "out")])
    assert error.value.code not in (None, 0)
    said = capsys.readouterr().err
    assert "there is no library cu12, for want of its compiler: there is no network" in said
    assert "the cu124 wheel was not built" in said
    (wheel,) = (tmp_path / "out").iterdir()
    assert "+partial-" in wheel.name
    monkeypatch.setattr(build, "pack", lambda *arguments: wheel)
    build.main(["fat", "--out", str(tmp_path / "out"), "--allow-missing"])


def test_wheel_of_other_archs_does_not_look_complete(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_libraries(build, monkeypatch, tmp_path, *MATRIX["libraries"])
    locals_ = []
    monkeypatch.setattr(build, "pack", lambda name, libraries, local, out: locals_.append(local) or tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build.main(["all"])
    assert locals_ == ["partial", "cpu", "cu124.partial", "cu130.partial"]


# ---- the sdist -------------------------------------------------------------------------------------------------------


def test_the_index_s_page_has_no_links_into_the_tree(tmp_path: Path) -> None:
    """A package index shows README.md without the files beside it."""
    readme = importlib.import_module("build_tools.readme")
    text = "[a b](docs/x.md#y) [c](#here) [d](https://e.f/g.md) and\n![of\nlines](benchmarks/h.png) [i](j.md)"
    assert readme.without_links(text) == "a b [c](#here) [d](https://e.f/g.md) and\n i"
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path], cwd=ROOT, check=True)
    page = (tmp_path / "fused_conv_bn.egg-info" / "PKG-INFO").read_text()
    assert "# fused_conv_bn" in page and "\nAuthor: the fused_conv_bn authors\n" in page
    assert "\nDescription-Content-Type: text/markdown\n" in page
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert [link for link in links if not link.startswith(("#", "https://"))] == []


def test_sdist_has_the_whole_tree(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        have = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = [
        "setup.py",
        "build_tools/backend.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "mkdocs.yml",
        ".ci/run",
    ]
    for pattern in (
        "csrc/**/*.*",
        "wheels/*.*",
        "build_tools/*.py",
        "src/**/*.py",
        "tests/**/*.py",
        "benchmarks/**/*.*",
        "docs/**/*.*",
        "requirements/*",
    ):
        wanted += [str(file.relative_to(ROOT)) for file in ROOT.glob(pattern) if file.is_file()]
    assert len(wanted) > 50
    assert [name for name in wanted if name not in have and "__pycache__" not in name] == []
    assert [name for name in have if name.endswith((".so", ".whl", ".pyc"))] == []
