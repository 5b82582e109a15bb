"""Building from source and packing wheels: what is decided, what is refused, and what the user reads. Compiles nothing."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fused_conv_bn import _loader

pytest.importorskip("setuptools.command.bdist_wheel", reason="building needs setuptools 77 or newer")

ROOT = Path(__file__).resolve().parents[2]
MATRIX = json.loads((ROOT / "wheels" / "matrix.json").read_text())
CUDA_LIBRARIES = [name for name in MATRIX["libraries"] if name != "cpu"]
CSRC = ROOT / "csrc"
CUDA_SOURCES = sorted(
    str(path.relative_to(CSRC).with_suffix(""))
    for path in CSRC.rglob("*.cu")
    if path.name.endswith("_cuda.cu") or path.name.startswith("instantiate_")
)
KERNELS = [(kernels, name) for kernels in MATRIX["kernels"] for name in CUDA_LIBRARIES]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What looks for torch and the compilers, with none of its environment variables set."""
    return load("build_tools.environment", monkeypatch)


@pytest.fixture
def libraries(environment: ModuleType) -> ModuleType:
    return importlib.import_module("build_tools.libraries")


@pytest.fixture
def flags(environment: ModuleType) -> ModuleType:
    return importlib.import_module("build_tools.flags")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load("build", monkeypatch)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    return module


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load("toolchain", monkeypatch)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable in [*filter(re.compile("FUSED_CONV_BN_").match, os.environ), "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(ROOT / "wheels")
    monkeypatch.syspath_prepend(ROOT)
    for module in [*sys.modules]:  # each test has its own
        if module.partition(".")[0] in ("build_tools", "build", "toolchain", "nvcc"):
            monkeypatch.delitem(sys.modules, module)
    return importlib.import_module(name)


def sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of an error, which has to be one sentence."""
    message = str(error.value)
    assert "\n" not in message and not message.endswith(".") and ". " not in message, message
    return message


# ---- the matrix ------------------------------------------------------------------------------------------------------


def test_matrix_is_consistent() -> None:
    assert MATRIX["tag"] == f"py3-none-{MATRIX['platform']}"
    for name, library in MATRIX["libraries"].items():
        assert library["file"] == f"_{name}.so"
        if name != "cpu":
            assert library["cuda"].split(".")[0] == name[2:]
            assert sum("+PTX" in arch for arch in library["archs"]) == 1 and "+PTX" in library["archs"][-1]
    for name, wheel in MATRIX["wheels"].items():
        assert wheel["local"] == (None if name == "fat" else name)
        assert wheel["libraries"][0] == "cpu" and set(wheel["libraries"]) <= set(MATRIX["libraries"])
        for library in wheel["libraries"][1:]:
            assert name == "fat" or name == f"cu{MATRIX['libraries'][library]['cuda'].replace('.', '')}"
    assert MATRIX["wheels"]["fat"]["libraries"] == list(MATRIX["libraries"])


def test_every_entry_for_kernels_names_files_of_its_own() -> None:
    patterns = [pattern for kernels in MATRIX["kernels"] for pattern in kernels["sources"]]
    named = [fnmatch.filter(CUDA_SOURCES, pattern) for pattern in patterns]
    assert all(named), (patterns, named)
    assert len(sum(named, [])) == len(set(sum(named, [])))


@pytest.mark.parametrize(("kernels", "name"), KERNELS)
def test_archs_of_kernels_are_some_of_the_library(kernels: dict[str, list[str]], name: str) -> None:
    """Either all from one on, so that no newer GPU is left out, or those that have a letter: code for no other GPU."""
    assert kernels.keys() == {"sources", *CUDA_LIBRARIES}
    archs, of_library = kernels[name], MATRIX["libraries"][name]["archs"]
    if any(arch[-1] in "af" for arch in archs):
        assert all(any(other.startswith(arch[:-1]) for other in of_library) for arch in archs)
    else:
        for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)]:
            oldest = tuple(map(int, archs[0].split(".")))
            assert _loader.covers(capability, " ".join(archs)) is (capability >= oldest)
        assert set(archs) <= set(of_library)


def test_loader_finds_the_files_of_the_matrix(tmp_path: Path) -> None:
    for library in MATRIX["libraries"].values():
        (tmp_path / library["file"]).touch()
    assert set(_loader.shipped(tmp_path)) == set(MATRIX["libraries"])
    for name in CUDA_LIBRARIES:
        assert _loader.library_names(MATRIX["libraries"][name]["cuda"], tmp_path) == ["cpu", name]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_every_gpu_is_covered(capability: tuple[int, int]) -> None:
    for name in CUDA_LIBRARIES:
        assert _loader.covers(capability, " ".join(MATRIX["libraries"][name]["archs"]))


def test_versions_are_the_same_everywhere(environment: ModuleType) -> None:
    torch = "torch>={}.{}".format(*_loader.MIN_TORCH)
    assert environment.MIN_TORCH == _loader.MIN_TORCH
    assert MATRIX["requires_dist"] == [torch]
    assert f'dependencies = ["{torch}"]' in (ROOT / "pyproject.toml").read_text()
    assert f"CUDA_TOOLKIT ?= {environment.CUDA_REQUIREMENT}\n" in (ROOT / "Makefile").read_text()
    assert environment.CUDA_REQUIREMENT.endswith(f"=={MATRIX['libraries']['cu13']['cuda']}.*")
    spec = json.loads((ROOT / "wheels" / "cuda12.json").read_text())
    assert spec["version"] == MATRIX["libraries"]["cu12"]["cuda"]


# ---- compute capabilities --------------------------------------------------------------------------------------------


def test_archs_are_those_of_the_matrix(libraries: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CUDA_LIBRARIES:
        assert libraries.archs(name) == MATRIX["libraries"][name]["archs"]
        flags = [flag for arch in libraries.archs(name) for flag in libraries.gencode(arch)]
        assert len(flags) == len(libraries.archs(name)) + 1
        for source in CUDA_SOURCES:
            named = [k for k in MATRIX["kernels"] if any(fnmatch.fnmatch(source, pattern) for pattern in k["sources"])]
            assert libraries.archs(name, f"{source}.cu") == (named[0][name] if named else libraries.archs(name))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert libraries.archs("cu13") == ["8.0", "9.0a", "12.0+PTX"]
    assert libraries.gencode("9.0a") == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert libraries.gencode("12.0+PTX")[1] == "-gencode=arch=compute_120,code=compute_120"


@pytest.mark.parametrize(
    ("setting", "conv", "hopper"),
    [
        ("9.0", ["9.0"], ["9.0a"]),
        ("9.0a", ["9.0a"], ["9.0a"]),
        ("7.5;9.0+PTX", ["9.0+PTX"], ["9.0a"]),
        ("8.6 12.0+PTX", ["8.6", "12.0+PTX"], ["8.6", "12.0"]),
        ("7.5,8.0", ["8.0"], ["7.5", "8.0"]),
        ("7.5+PTX", ["7.5"], ["7.5"]),
    ],
)
def test_arch_list_and_kernels_that_not_every_gpu_runs(
    libraries: ModuleType, monkeypatch: pytest.MonkeyPatch, setting: str, conv: list[str], hopper: list[str]
) -> None:
    kernels = [
        {"sources": ["ops/conv_h_cuda"], "cu12": ["9.0a"]},
        {"sources": ["ops/conv_*"], "cu12": ["8.0", "9.0+PTX"]},
    ]
    monkeypatch.setitem(libraries.MATRIX, "kernels", kernels)
    assert libraries.archs("cu12", "ops/conv_h_cuda.cu") == ["9.0a"]
    assert libraries.archs("cu12", "ops/conv_x_cuda.cu") == ["8.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    assert libraries.archs("cu12", "ops/conv_h_cuda.cu") == hopper
    assert libraries.archs("cu12", "ops/conv_x_cuda.cu") == conv
    assert libraries.archs("cu12", "ops/scale_shift_cuda.cu") == libraries.archs("cu12") == re.split("[ ;,]", setting)


@pytest.mark.parametrize(
    ("setting", "old"),
    [
        ("", False),
        ("9.0", False),
        ("8.0;9.0+PTX", False),
        ("8.0+PTX", True),
        ("7.5+PTX 9.0", True),
        ("10.0+PTX", False),
    ],
)
def test_ptx_of_older_gpus_is_told_to_the_code(
    flags: ModuleType, monkeypatch: pytest.MonkeyPatch, setting: str, old: bool
) -> None:
    """Newer GPUs run it, and it does not wait for the kernel before."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    for library in ("cu12", "cu13"):
        assert ("-DFCB_OLD_PTX" in flags.source_flags(library, "ops/scale_shift_cuda.cu")) == old


def edges(extension: ModuleType, tools: object, directory: Path, library: str, sources: list[str]) -> dict[str, str]:
    """What torch's writer, with ours around it, has in build.ninja for these sources, by source."""
    with extension.torch_for(library, tools):
        extension.cpp_extension._write_ninja_file(
            path=str(directory / "build.ninja"),
            sources=[str(CSRC / source) for source in sources],
            objects=[str(directory / source) + ".o" for source in sources],
            **{name: ["-c"] for name in ("cflags", "cuda_cflags")},
            post_cflags=["-DX='a$b'"],
            cuda_post_cflags=["-gencode=arch=compute_75,code=sm_75", "-O3"],
            **dict.fromkeys(("cuda_dlink_post_cflags", "sycl_cflags", "sycl_post_cflags", "sycl_dlink_post_cflags")),
            **dict.fromkeys(("ldflags", "library_target")),
            with_cuda=library != "cpu",
            with_sycl=False,
        )
    return dict(zip(sources, (directory / "build.ninja").read_text().split("\nbuild ")[1:], strict=True))


@pytest.fixture
def extension(flags: ModuleType) -> ModuleType:
    return importlib.import_module("build_tools.extension")


@pytest.fixture
def tools(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Those of a torch without CUDA, with a CUDA 12 toolkit in a folder whose name needs quotes."""
    tools = environment.Tools()
    tools.cuda = {12: environment.Cuda(install_nvcc(tmp_path / "cuda $12", "12.4"))}
    return tools


def test_each_file_has_flags_of_its_own(extension: ModuleType, tools: object, tmp_path: Path) -> None:
    sources = ["portable.cpp", *(f"ops/{name}_cuda.cu" for name in ("scale_shift", "conv_depthwise"))]
    found = edges(extension, tools, tmp_path, "cu12", sources)
    assert list(found) == sources and "cuda_post_cflags" not in found["portable.cpp"]
    for source in sources[1:]:
        line = found[source].splitlines()[1]
        assert (
            line == f"  cuda_post_cflags = $cuda_post_cflags {' '.join(extension.flags.source_flags('cu12', source))}"
        )
    assert found[sources[2]].splitlines()[1].split()[3:5] == [
        "-Xfatbin=--ident=ops/conv_depthwise_cuda.cu",
        "-gencode=arch=compute_80,code=sm_80",
    ]
    assert "\ncuda_post_cflags = -O3\n" in (tmp_path / "build.ninja").read_text()


def test_what_is_newer_compiles_again(extension: ModuleType, tools: object, tmp_path: Path) -> None:
    """Headers, those of torch among them, are in dependency files also of .cu, and the compilers among the inputs."""
    found = edges(extension, tools, tmp_path, "cu12", ["portable.cpp", "ops/scale_shift_cuda.cu"])
    text = (tmp_path / "build.ninja").read_text()
    for rule in ("compile", "cuda_compile"):
        assert re.search(rf"^rule {rule}\n(  .*\n)*  depfile = \$out\.d$", text, re.MULTILINE)
        assert re.search(rf"^rule {rule}\n(  .*\n)*  deps = gcc$", text, re.MULTILINE)
    assert "  command = $cxx -MD -MF $out.d " in text
    for line in (found["portable.cpp"], found["ops/scale_shift_cuda.cu"]):
        assert os.path.relpath(tools.compiler, tmp_path) in line.partition(" | ")[2]  # type: ignore[attr-defined]
    nvcc = found["ops/scale_shift_cuda.cu"].splitlines()[0].partition(" | ")[2]
    assert "cuda$ $$12/bin/nvcc" in nvcc and "wheels/nvcc.py" in nvcc


def test_paths_and_flags_are_quoted(extension: ModuleType, tools: object, tmp_path: Path) -> None:
    tools.cxx = ["ccache", "/my compilers/c++"]  # type: ignore[attr-defined]
    edges(extension, tools, tmp_path, "cu12", ["portable.cpp", "ops/scale_shift_cuda.cu"])
    text = (tmp_path / "build.ninja").read_text()
    assert "\ncxx = ccache '/my compilers/c++'\n" in text
    assert f"\nnvcc = '{tmp_path}/cuda $$12/bin/nvcc'\n" in text
    assert "\npost_cflags = -DX='a$$b'\n" in text


def test_torch_is_left_as_it_was(extension: ModuleType, tools: object) -> None:
    torch, cpp_extension = extension.torch, extension.cpp_extension

    def state() -> tuple[object, ...]:
        return torch.version.cuda, cpp_extension.CUDA_HOME, cpp_extension._write_ninja_file, dict(os.environ)

    before = state()
    with extension.torch_for("cu12", tools):
        assert (torch.version.cuda, cpp_extension.CUDA_HOME) == ("12.4", str(tools.cuda[12].home))  # type: ignore
        cpp_extension._check_cuda_version("g++", torch.torch_version.TorchVersion("11.4"))
        assert os.environ["PYTORCH_NVCC"].endswith("nvcc'")
    assert state() == before


@pytest.mark.parametrize("library", ["cpu", "cu12"])
def test_declaration_is_torchs_without_its_libraries(
    extension: ModuleType, tools: object, library: str, tmp_path: Path
) -> None:
    with extension.torch_for(library, tools):
        declared = extension.declare(library, tools, tmp_path)
    assert declared.name == f"_{library}" and declared.py_limited_api
    assert declared.libraries == declared.include_dirs == []
    assert [flag for flag in declared.extra_link_args if flag.startswith("-l") and "torch" in flag] == ["-ltorch"]


def test_sources_are_found_in_every_folder(
    libraries: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("a_cpu.cpp", "a_cuda.cu", "a/x_cuda.cu", "b/x_cuda.cu", "b/c/instantiate_f32.cu", "b/other.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(libraries, "CSRC", tmp_path)
    monkeypatch.setitem(libraries.MATRIX, "kernels", [{"sources": ["b/*"], "cu13": ["9.0a"]}])
    assert libraries.sources("cpu") == ["portable.cpp", "bindings.cpp", "a_cpu.cpp"]
    found = ["a/x_cuda.cu", "a_cuda.cu", "b/c/instantiate_f32.cu", "b/x_cuda.cu"]
    assert libraries.cuda_sources() == found and libraries.sources("cu13") == ["portable.cpp", *found]
    own = [source for source in found if libraries.archs("cu13", source) == ["9.0a"]]
    assert own == ["b/c/instantiate_f32.cu", "b/x_cuda.cu"]


@pytest.mark.parametrize("arch", ["sm_90", "9", "9.0+ptx", "Hopper"])
def test_arch_that_is_none(libraries: ModuleType, arch: str) -> None:
    with pytest.raises(SystemExit) as error:
        libraries.gencode(arch)
    assert repr(arch) in sentence(error)


def test_flags_follow_the_compiler(flags: ModuleType) -> None:
    cuda = flags.Cuda.__new__(flags.Cuda)
    for version in ((12, 4), (12, 9)):
        cuda.version = version
        assert "-Xfatbin=-compress-all" in flags.nvcc_flags("cu12", cuda)
        assert "--compress-mode=size" not in flags.nvcc_flags("cu12", cuda)
    cuda.version = (13, 0)
    assert "--compress-mode=size" in flags.nvcc_flags("cu13", cuda)


# ---- what is installed -----------------------------------------------------------------------------------------------


def install_torch(directory: Path, version: str, cuda: str | None, *, headers: bool = True) -> Path:
    """Fakes as much of a torch as a build looks at."""
    package = directory / "torch"
    include = package / "include" / "torch" / "csrc" / "stable"
    include.mkdir(parents=True)
    if headers:
        (include / "library.h").touch()
    (package / "version.py").write_text(f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n")
    return directory


def install_nvcc(home: Path, release: str) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    nvcc.chmod(0o755)
    (home / "lib").mkdir()
    (home / "lib" / "libcudart_static.a").touch()
    return home


def use(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    """Lets a build see these packages only, and no compiler of the machine."""
    monkeypatch.setattr(environment, "site_packages", lambda: list(directories))
    which = environment.shutil.which
    monkeypatch.setattr(environment.shutil, "which", lambda name, **kw: None if name == "nvcc" else which(name, **kw))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not path.is_relative_to("/usr/local/cuda") and exists(path))


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
        (("2.9.0", "12.8"), False, "", {"torch", "cuda-toolkit"}),
        (None, False, "0", {"torch"}),
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
        ".ci/run",
    ]
    for pattern in (
        "csrc/**/*.*",
        "wheels/*.*",
        "build_tools/*.py",
        "src/**/*.py",
        "tests/**/*.py",
        "benchmarks/**/*.*",
        "requirements/*",
    ):
        wanted += [str(file.relative_to(ROOT)) for file in ROOT.glob(pattern) if file.is_file()]
    assert len(wanted) > 50
    assert [name for name in wanted if name not in have and "__pycache__" not in name] == []
    assert [name for name in have if name.endswith((".so", ".whl", ".pyc"))] == []
