"""An AOTInductor package with this package's ops in it, run from Python and by the C++ program of aoti/."""

from __future__ import annotations

import copy
import random
import re
import subprocess
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import assert_no_worse_than_eager
from fused_conv_bn import _loader
from small_network import Network, random_statistics

LIBRARY = _loader.PACKAGE / "_cpu.so"


class WithPools(Network):
    """And with two results, and the ops that fuse() puts in on CUDA alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        pooled = fcb.max_pool2d(x, 3, 2, padding=1)
        return super().forward(pooled), fcb.spatial_mean(pooled)


class Package(NamedTuple):
    path: Path
    plain: nn.Module
    ops: set[str]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    torch.manual_seed(20)
    model = random_statistics(WithPools(), torch.Generator().manual_seed(20))
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), fcb.export_ops():
        fcb.fuse(model)(x)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    path = tmp_path_factory.mktemp("aoti") / "network.pt2"
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    names = (str(node.target) for node in exported.graph.nodes)
    return Package(path, plain, {name.split(".")[1] for name in names if name.startswith("fused_conv_bn.")})


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def call(program: Path, package: Path, x: Tensor, folder: Path) -> list[Tensor]:
    torch.save(x, folder / "x.pt")
    done = run(program, "--out", folder / "y.pt", LIBRARY, package, folder / "x.pt")
    assert done.returncode == 0, done.stderr
    return list(torch.load(folder / "y.pt"))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_python_and_cpp_run_the_same(
    batch: int, package: Package, program: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    assert package.ops == {"bn_scale_cat", "conv_bn_scale", "conv_scale_shift", "gate", "max_pool2d", "spatial_mean"}
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    with torch.no_grad():
        python = torch._inductor.aoti_load_package(str(package.path))(x)
    cpp = call(program, package.path, x, tmp_path)
    assert len(cpp) == len(python) and all(map(torch.equal, cpp, python))


def test_it_is_no_worse_than_eager(package: Package, generator: torch.Generator) -> None:
    """Of so many images that the norm of the smallest result, five numbers each, is no luck."""
    x = torch.randn(64, 3, 32, 32, generator=generator)
    with torch.no_grad():
        got = torch._inductor.aoti_load_package(str(package.path))(x)
        eager, truth = package.plain(x), copy.deepcopy(package.plain).double()(x.double())
    for y, y_eager, y_truth in zip(got, eager, truth, strict=True):
        assert_no_worse_than_eager(y, y_eager, y_truth)


def test_what_the_program_prints(package: Package, program: Path, tmp_path: Path, generator: torch.Generator) -> None:
    loaded = run(program, LIBRARY, package.path)
    assert (loaded.returncode, loaded.stdout) == (0, f"loaded, with {constants(package)} constants\n")
    torch.save(torch.randn(2, 3, 32, 32, generator=generator), tmp_path / "x.pt")
    done = run(program, "--time", 20, LIBRARY, package.path, tmp_path / "x.pt")
    assert re.fullmatch(r"(CPUFloatType\[[\d, ]+\], mean -?[\d.e-]+\n){2}[\d.]+ us\n", done.stdout), done.stdout


def constants(package: Package) -> int:
    return len(torch._inductor.aoti_load_package(str(package.path)).get_constant_fqns())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "a LIBRARY and a PACKAGE are needed: run_package .*"),
        (["--fast", "LIBRARY", "PACKAGE"], 2, "--fast is no option: run_package .*"),
        (["--time", "many", "LIBRARY", "PACKAGE"], 2, "--time is many, expected a number of calls: run_package .*"),
        (["LIBRARY", "PACKAGE", "--out"], 2, "--out needs a value: run_package .*"),
        (["none.so", "PACKAGE"], 1, "the library none.so is not a file"),
        (["PACKAGE", "PACKAGE"], 1, "the library .*network.pt2 is no library, or is not whole"),
        (["CUT", "PACKAGE"], 1, "the library .*cut.so is no library, or is not whole"),
        (["EMPTY:LIBRARY", "PACKAGE"], 1, "the library .*empty.so is no library, or is not whole"),
        (["LIBRARY", "none.pt2"], 1, "the package none.pt2 is not a file"),
        (["LIBRARY", "LIBRARY"], 1, "the package .*_cpu.so cannot be loaded: it is not a ZIP archive.*"),
        (["OTHER", "PACKAGE"], 1, "the package .* cannot be loaded: Could not find schema for fused_conv_bn::.*"),
        (["LIBRARY", "PACKAGE", "none.pt"], 1, "the input none.pt is not a file"),
        (["LIBRARY", "PACKAGE", "PACKAGE"], 1, "the input .*network.pt2 is not a tensor that torch.save wrote"),
        (["--out", "none/y.pt", "LIBRARY", "PACKAGE", "X"], 1, "the results cannot be written to none/y.pt"),
        (["LIBRARY", "PACKAGE", "X", "X"], 1, ".*inputs.* 1.* 2.*"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    arguments: list[str], status: int, message: str, package: Package, program: Path, tmp_path: Path
) -> None:
    files = {"LIBRARY": LIBRARY, "PACKAGE": package.path, "X": tmp_path / "x.pt"}
    files["OTHER"] = Path(torch.__file__).parent / "lib" / "libtorch.so"  # without the ops
    torch.save(torch.randn(2, 3, 32, 32), files["X"])
    for name, size in (("CUT", LIBRARY.stat().st_size // 2), ("EMPTY", 0)):
        files[name] = tmp_path / f"{name.lower()}.so"
        files[name].write_bytes(LIBRARY.read_bytes()[:size])
    words = (":".join(str(files.get(part, part)) for part in word.split(":")) for word in arguments)
    done = run(program, *words)
    assert (done.returncode, done.stdout if status == 2 else "") == (status, ""), done.stdout
    assert re.fullmatch(f"run_package: {message}\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    "damage", ["empty", "text", "no files", "half", "the last byte", *(f"bits {i}" for i in range(8))]
)
def test_a_damaged_package_is_an_error(damage: str, package: Package, program: Path, tmp_path: Path) -> None:
    """Changed bits in machine code would end the process."""
    data, path = bytearray(package.path.read_bytes()), tmp_path / "network.pt2"
    draw = random.Random(damage)
    if damage.startswith("bits"):
        for _ in range(20):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    damaged = {
        "empty": b"",
        "text": b"no package\n" * 100,
        "no files": b"PK\5\6" + bytes(18),
        "half": data[: len(data) // 2],
        "the last byte": data[:-1],
    }
    path.write_bytes(damaged.get(damage, data))
    done = run(program, LIBRARY, path, path)
    assert done.returncode == 1
    assert re.fullmatch(f"run_package: the package {path} cannot be loaded: .*\n", done.stderr), done.stderr
    if damage in damaged:
        with pytest.raises(RuntimeError, match="(?i)zip"):
            torch._inductor.aoti_load_package(str(path))


def test_a_large_package_is_checked_too(
    package: Package, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers stand where those of archives beyond 4 GB do."""
    path = tmp_path / "network.pt2"
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    with zipfile.ZipFile(package.path) as whole, zipfile.ZipFile(path, "w") as copied:
        for part in whole.namelist():
            copied.writestr(part, whole.read(part))
    data = bytearray(path.read_bytes())
    data[-12:-2] = b"\xff" * 10  # how many parts, the directory's size and where it is
    path.write_bytes(data)
    done = run(program, LIBRARY, path)
    assert done.returncode == 0, done.stderr
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "is damaged" in run(program, LIBRARY, path).stderr
