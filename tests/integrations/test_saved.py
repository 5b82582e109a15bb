"""Files with this package's modules or ops in them, read by a process of its own: with the package, without an import of
it, and where it is not installed."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.package import PackageExporter, PackageImporter

import fused_conv_bn as fcb
from common import random_bn


def block(generator: torch.Generator) -> fcb.ConvBnScale2d:
    m = fcb.ConvBnScale2d(4, 6, 3, 1.7, activation="silu").eval()
    statistics = random_bn(6, torch.float32, "cpu", generator)
    for name, value in zip(("running_mean", "running_var", "weight", "bias"), statistics, strict=True):
        getattr(m.bn, name).data.copy_(value)
    return m


def fused(generator: torch.Generator) -> nn.Module:
    m = block(generator)
    return fcb.fuse(nn.Sequential(m.conv, m.bn, nn.ReLU()).eval(), sample(generator))


MODELS = {"ConvBnScale2d": block, "fuse()": fused}


def sample(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 4, 9, 8, generator=generator)


def run(code: str, *arguments: Any) -> str:
    """What Python prints, errors included, in a process that has imported torch alone."""
    code = f"import sys, torch\ndef error_of(call):\n    try:\n        call()\n    except Exception as error:\n        return str(error)\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_torch_save(tmp_path: Path, generator: torch.Generator) -> None:
    """A fused model is saved as what it was; a module of this package asks for it, by name where it is missing."""
    x, expected = sample(generator), []
    for i, make in enumerate(MODELS.values()):
        m = make(generator)
        torch.save(m, tmp_path / f"{i}.pt")
        with torch.no_grad():
            expected.append(m(x))
    torch.save((x, expected), tmp_path / "calls.pt")
    printed = run(
        """
of_module, of_fused, calls = sys.argv[1:]
def load(path):
    return torch.load(path, weights_only=False)
sys.modules["fused_conv_bn"] = None
fused = load(of_fused)
print(error_of(lambda: load(of_module)))
del sys.modules["fused_conv_bn"]
module = load(of_module)
x, expected = torch.load(calls)
with torch.no_grad():
    for model, y in zip((module, fused), expected):
        torch.testing.assert_close(model(x), y)
""",
        *(tmp_path / name for name in ("0.pt", "1.pt", "calls.pt")),
    )
    assert "fused_conv_bn" in printed


@pytest.mark.parametrize("name", MODELS)
def test_torch_package(name: str, generator: torch.Generator) -> None:
    m, x, buffer = MODELS[name](generator), sample(generator), io.BytesIO()
    with PackageExporter(buffer) as exporter:
        exporter.extern("fused_conv_bn.**")
        exporter.save_pickle("model", "model.pkl", m)
    importer = PackageImporter(io.BytesIO(buffer.getvalue()))
    loaded = importer.load_pickle("model", "model.pkl")
    assert type(loaded) is (fcb.ConvBnScale2d if name == "ConvBnScale2d" else nn.Sequential)
    with torch.no_grad():
        assert torch.equal(fcb.fuse(loaded)(x), m(x))


def test_torch_jit_trace(tmp_path: Path, generator: torch.Generator) -> None:
    """PyTorch's ops: what is traced needs nothing of this package."""
    x, expected = sample(generator), []
    for i, make in enumerate(MODELS.values()):
        m = make(generator)
        with torch.no_grad():
            traced = torch.jit.trace(m, x)
            expected.append(m(x))
        assert "fused_conv_bn::" not in str(traced.inlined_graph)
        torch.jit.save(traced, tmp_path / f"{i}.pt")
    torch.save((x, expected), tmp_path / "calls.pt")
    run(
        """
x, expected = torch.load(sys.argv[3])
for path, y in zip(sys.argv[1:3], expected):
    torch.testing.assert_close(torch.jit.load(path)(x), y)
assert "fused_conv_bn" not in sys.modules
""",
        *(tmp_path / name for name in ("0.pt", "1.pt", "calls.pt")),
    )


def test_an_exported_program_names_the_package(tmp_path: Path, generator: torch.Generator) -> None:
    """PyTorch says the op's namespace, which is the name of what to import."""
    m, x, path = block(generator), sample(generator), tmp_path / "program.pt2"
    with torch.no_grad(), fcb.export_ops():
        program = torch.export.export(m, (x,))
    torch.export.save(program, path)
    printed = run(
        """
assert error_of(lambda: torch.export.load(sys.argv[1])) is not None
import fused_conv_bn
torch.export.load(sys.argv[1])
""",
        path,
    )
    assert "torch.ops.fused_conv_bn.conv_bn_scale" in printed


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.pt2"
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad(), fcb.export_ops():
        torch.export.save(torch.export.export(block(generator), (sample(generator),)), path)
    return path


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "the last bytes", "random bytes", "no files"])
def test_a_damaged_program_is_an_error(damage: str, program: Path, tmp_path: Path) -> None:
    data, path = program.read_bytes(), tmp_path / "program.pt2"
    damaged = {
        "empty": b"",
        "text": b"no program\n" * 100,
        "cut": data[: len(data) // 2],
        "the last bytes": data[:-30],
        "random bytes": random.Random(1).randbytes(len(data)),
        "no files": b"PK\5\6" + bytes(18),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(Exception, match="(?i)zip|archive|deserializing"):
        torch.export.load(path)


def test_a_folder_in_the_place_of_a_program(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)directory|\.pt2|archive|zip"):
        torch.export.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fused_conv_bn.conv_bn_scale", "fused_conv_bn.conv_bn_scole"), "conv_bn_scole|deserializing"),
        (("fused_conv_bn.conv_bn_scale", "fused_conv_bn.bn_scale"), "bn_scale|deserializing"),
        (('"as_float": 1.7', '"as_string": "much"'), "much|float|deserializing"),
        (('"silu"', '"selu"'), "activation|deserializing"),
    ],
    ids=["no such op", "another op", "an argument of another type", "an argument of another value"],
)
def test_a_program_that_calls_an_op_wrongly_is_an_error(
    change: tuple[str, str], message: str, program: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    """When it is loaded or when it is called, and no later."""
    path, found = tmp_path / "program.pt2", 0
    with zipfile.ZipFile(program) as whole, zipfile.ZipFile(path, "w") as copied:
        for part in whole.namelist():
            data = whole.read(part)
            if part.endswith(".json") and change[0].encode() in data:
                data, found = data.replace(*(c.encode() for c in change)), found + 1
            copied.writestr(part, data)
    assert found == 1
    with pytest.raises(Exception, match=message), torch.no_grad():
        torch.export.load(path).module()(sample(generator))


def test_changed_bits_of_a_program_end_no_process(program: Path, tmp_path: Path, generator: torch.Generator) -> None:
    """It is loaded, as other numbers are no error to PyTorch, or it is not."""
    torch.save(sample(generator), tmp_path / "x.pt")
    printed = run(
        """
import random, fused_conv_bn
data = open(sys.argv[1], "rb").read()
x = torch.load(sys.argv[2])
for seed in range(25):
    draw, changed = random.Random(seed), bytearray(data)
    for _ in range(8):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    open(sys.argv[3], "wb").write(changed)
    with torch.no_grad():
        print(error_of(lambda: torch.export.load(sys.argv[3]).module()(x)) is None)
""",
        *(program, tmp_path / "x.pt", tmp_path / "program.pt2"),
    )
    assert len(printed.splitlines()) >= 25 and "False" in printed.splitlines()
