"""Building from source: the matrix of wheels, compute capabilities, flags. Compiles nothing."""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

from building import CSRC, CUDA_LIBRARIES, CUDA_SOURCES, KERNELS, MATRIX, ROOT, install_nvcc, sentence
from fused_conv_bn import _loader

pytest.importorskip("setuptools.command.bdist_wheel", reason="building needs setuptools 77 or newer")


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
    """Either all from one on, so that no newer GPU is left out, or one that has a letter: code for no other GPU."""
    assert kernels.keys() == {"sources", *CUDA_LIBRARIES}
    archs, of_library = kernels[name], MATRIX["libraries"][name]["archs"]
    numbers = [re.sub(r"[af]?(\+PTX)?$", "", arch) for arch in archs]
    assert set(numbers) <= {arch.removesuffix("+PTX") for arch in of_library}
    if archs[0][-1] in "af":
        assert len(archs) == 1
    else:
        for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)]:
            oldest = tuple(map(int, numbers[0].split(".")))
            assert _loader.covers(capability, " ".join(archs)) is (capability >= oldest)


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
    ("setting", "conv", "newest", "both"),
    [
        ("9.0", ["9.0"], ["9.0a"], ["9.0a"]),
        ("9.0a", ["9.0a"], ["9.0a"], ["9.0a"]),
        ("7.5;9.0+PTX", ["9.0+PTX"], ["9.0a"], ["9.0a"]),
        ("8.6 12.0+PTX", ["8.6", "12.0+PTX"], ["8.6", "12.0"], ["8.6", "12.0+PTX"]),
        ("7.5,8.0", ["8.0"], ["7.5", "8.0"], ["8.0"]),
        ("7.5+PTX", ["7.5"], ["7.5"], ["7.5"]),
    ],
)
def test_arch_list_and_kernels_that_not_every_gpu_runs(
    libraries: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    conv: list[str],
    newest: list[str],
    both: list[str],
) -> None:
    kernels = [
        {"sources": ["ops/conv_h_cuda"], "cu12": ["9.0a"]},
        {"sources": ["ops/conv_w_cuda"], "cu12": ["8.0+PTX", "9.0a"]},
        {"sources": ["ops/conv_*"], "cu12": ["8.0", "9.0+PTX"]},
    ]
    monkeypatch.setitem(libraries.MATRIX, "kernels", kernels)
    assert libraries.archs("cu12", "ops/conv_h_cuda.cu") == ["9.0a"]
    assert libraries.archs("cu12", "ops/conv_x_cuda.cu") == ["8.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    assert libraries.archs("cu12", "ops/conv_h_cuda.cu") == newest
    assert libraries.archs("cu12", "ops/conv_x_cuda.cu") == conv
    assert libraries.archs("cu12", "ops/conv_w_cuda.cu") == both
    assert libraries.archs("cu12", "ops/scale_shift_cuda.cu") == libraries.archs("cu12") == re.split("[ ;,]", setting)


@pytest.mark.parametrize(
    ("setting", "old"),
    [
        ("", False),
        ("9.0", False),
        ("8.0;9.0+PTX", False),
        ("8.0+PTX", True),
        ("7.5+PTX 9.0", False),  # those that wait have their own code
        ("8.0+PTX 10.0", True),
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
    depthwise = "kernels/conv/depthwise/instantiate_depthwise.cu"
    sources = ["portable.cpp", "ops/scale_shift_cuda.cu", depthwise]
    found = edges(extension, tools, tmp_path, "cu12", sources)
    assert list(found) == sources and "cuda_post_cflags" not in found["portable.cpp"]
    for source in sources[1:]:
        line = found[source].splitlines()[1]
        assert (
            line == f"  cuda_post_cflags = $cuda_post_cflags {' '.join(extension.flags.source_flags('cu12', source))}"
        )
    assert found[sources[2]].splitlines()[1].split()[3:5] == [
        f"-Xfatbin=--ident={depthwise}",
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
