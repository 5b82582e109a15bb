"""Files with this package's modules or ops in them, read by a process of its own: with the package, without an import of
it, and where it is not installed."""

from __future__ import annotations

import io
import subprocess
import sys
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


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_program_is_an_error(damage: str, tmp_path: Path, generator: torch.Generator) -> None:
    path = tmp_path / "program.pt2"
    with torch.no_grad(), fcb.export_ops():
        torch.export.save(torch.export.export(block(generator), (sample(generator),)), path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no program\n" * 100, "cut": data[: len(data) // 2]}[damage])
    with pytest.raises(Exception, match="zip|archive"):
        torch.export.load(path)
