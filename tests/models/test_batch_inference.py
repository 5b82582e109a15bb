"""examples/batch_inference.py: killed and started again, in two processes, on unreadable images, and what it refuses."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if importlib.util.find_spec("torchvision") is None and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
    pytest.skip("needs torchvision: pip install --no-deps -r requirements/models.txt", allow_module_level=True)

import vision_ops  # noqa: E402

vision_ops.provide()

from PIL import Image  # noqa: E402
from torchvision.models import get_model, get_model_weights  # noqa: E402

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "batch_inference.py"
LAUNCHER = Path(__file__).with_name("run_program.py")
MODEL, SIZE, COUNT = "shufflenet_v2_x0_5", 32, 90
PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
UNREADABLE = ("empty.png", "folder/cut off.png", "gone.jpg", "text.jpeg")


@pytest.fixture
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("batch_inference", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network() -> nn.Module:
    """With statistics and results that differ from image to image."""
    torch.manual_seed(1)
    model = get_model(MODEL, weights=None).train()
    coarse = 2 * torch.randn(64, 3, 3, 3)
    with torch.no_grad():
        for _ in range(20):
            model(F.interpolate(coarse, (SIZE, SIZE)))
        model.eval().fc.weight.mul_(20.0)
        model.fc.bias.sub_(model(F.interpolate(coarse, (SIZE, SIZE))).mean(0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several modes and sizes, some of which cannot be read, and a file of weights."""
    at = tmp_path_factory.mktemp("batch")
    images = at / "images"
    (images / "folder").mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    for i in range(COUNT):
        pixels = torch.randint(256, (3, 3, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy()).resize((40, 30 + i % 5)).convert(("RGB", "L", "RGBA", "P")[i % 4])
        image.save(images / ("folder" if i % 3 else "") / f"{i:03d}.{'PNG' if i % 2 else 'png'}")
    whole = (images / "000.png").read_bytes()
    (images / "empty.png").touch()
    (images / "folder" / "cut off.png").write_bytes(whole[: len(whole) // 2])
    (images / "gone.jpg").symlink_to(images / "nowhere.jpg")
    (images / "text.jpeg").write_text("no image")
    (images / "notes.txt").write_text("not asked for")
    torch.save(network().state_dict(), at / "weights.pt")
    return at


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[int, float]]:
    """By the plain model in float64, one image at a time."""
    model = network().double()
    transform: Any = get_model_weights(MODEL).DEFAULT.transforms(crop_size=SIZE, resize_size=SIZE)
    found = {}
    for path in (folder / "images").rglob("*"):
        name = path.relative_to(folder / "images").as_posix()
        if path.suffix.lower() == ".png" and name not in UNREADABLE:
            x: Tensor = transform(Image.open(path).convert("RGB"))
            with torch.no_grad():
                probability, index = model(x.double()[None]).softmax(1).max(1)
            found[name] = index.item(), probability.item()
    assert len(found) == COUNT and len({index for index, _ in found.values()}) > 10
    return found


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    weights = f"--weights={folder / 'weights.pt'}"
    return [str(folder / "images"), f"--out={out}", f"--model={MODEL}", weights, f"--size={SIZE}", *more]


def start(arguments: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(LAUNCHER), str(PROGRAM), "--device=cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def kill(process: subprocess.Popen[str]) -> None:
    """With the processes that it has started, and without a warning."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, 9)
    process.communicate()


def assert_complete(out: Path, expected: dict[str, tuple[int, float]]) -> None:
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["path"] for record in records] == sorted([*expected, *UNREADABLE]), "each image once, by path"
    assert sorted(record["path"] for record in records if "error" in record) == sorted(UNREADABLE)
    for record in records:
        if "error" not in record:
            index, probability = expected[record["path"]]
            assert record["class"] == index
            assert record["probability"] == pytest.approx(probability, rel=1e-3)
    assert list(out.parent.glob(f"{out.name}*")) == [out], "nothing is left beside it"


@pytest.mark.parametrize("launchers", [((), PROCESSES), (PROCESSES, None)], ids=["one, then two", "two, then one"])
def test_killed_and_started_again(
    launchers: tuple[tuple[str, ...], tuple[str, ...] | None],
    folder: Path,
    expected: dict[str, tuple[int, float]],
    tmp_path: Path,
    program: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each process comes to a pipe in the place of an image, at which it waits until it is killed."""
    first, second = launchers
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    images = tmp_path / "copy" / "images"
    names = program.images_of(images)
    pipes = names[40:42]
    for name in pipes:
        (images / name).rename(tmp_path / Path(name).name)
        os.mkfifo(images / name)
    out = tmp_path / "new" / "results.jsonl"
    call = arguments(tmp_path / "copy", out)
    process = start([*call, "--batch=1"], first)
    parts: list[Path] = []
    while sum(part.read_bytes().count(b"\n") for part in parts) < 40:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
        parts = list(out.parent.glob("*.part-*"))
    kill(process)
    assert len(parts) == (2 if first else 1) and not out.exists()
    for name in pipes:
        (images / name).unlink()
        (tmp_path / Path(name).name).rename(images / name)
    with parts[0].open("a") as file:  # killed while it wrote
        file.write('{"path": "000.png", "model"')

    if second is None:
        assert program.main(["--device=cpu", *call]) == 0
        said, errors = capsys.readouterr()
    else:
        process = start([*call, "--batch=7"], second)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert_complete(out, expected)
    total = len(names)
    assert f"{total} images, {total - 40} of them now, {len(UNREADABLE)} unreadable" in said
    assert f"{total - 40}/{total - 40} images" in errors, "progress"


def test_a_run_from_the_beginning(
    folder: Path,
    expected: dict[str, tuple[int, float]],
    tmp_path: Path,
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Signs of life, unreadable images by name, and nothing to do when it is started again."""
    assert program.SECONDS <= 5
    monkeypatch.setattr(program, "SECONDS", 0.01)
    out = tmp_path / "results.jsonl"
    call = ["--device=cpu", *arguments(folder, out, "--batch=4")]
    assert program.main(call) == 0
    assert_complete(out, expected)
    said = capsys.readouterr()
    progress = [int(done) for done in re.findall(r"^(\d+)/94 images, \d+ s, [\d.]+ images/s$", said.err, re.MULTILINE)]
    assert len(progress) > 3 and progress == sorted(progress) and progress[-1] == 94
    for name in UNREADABLE:
        assert re.search(rf"^{name}: \w+: .*: skipped$", said.err, re.MULTILINE)
    before = out.read_bytes()
    assert program.main(call) == 0
    assert out.read_bytes() == before
    assert "94 images, 0 of them now, 4 unreadable" in capsys.readouterr().out


def test_images_that_came_later(folder: Path, tmp_path: Path, program: ModuleType) -> None:
    """And what was stopped between the one file and the removal of the others: each image once all the same."""
    out = tmp_path / "results.jsonl"
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(images / f"{i}.png")
        assert program.main([str(images), f"--out={out}", f"--model={MODEL}", "--size=32", "--device=cpu"]) == 0
        (tmp_path / f"results.jsonl.part-{i}-0").write_bytes(out.read_bytes())
    assert program.main([str(images), f"--out={out}", f"--model={MODEL}", "--size=32", "--device=cpu"]) == 0
    assert [json.loads(line)["path"] for line in out.read_text().splitlines()] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=resnet19"], "--model resnet19: torchvision has no such classifier, expected one of its"),
        (["--weights=nothing.pt"], "--weights nothing.pt: not a state_dict of"),
        (["--batch=0"], "--batch 0: expected 1 or more"),
        (["--device=cuda"], "--device cuda: there is no usable GPU"),
        (["--out=/proc/results"], "--out /proc/results: "),
        (["--out=/"], "--out /: is a folder, expected a file"),
    ],
)
def test_bad_arguments(
    more: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([*arguments(folder, tmp_path / "results.jsonl"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch_inference.py: {message}")
    assert list(tmp_path.iterdir()) == []


def test_folders_without_images(tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path, "no image in it, expected files"),
    ):
        assert program.main([str(folder), f"--out={tmp_path / 'results.jsonl'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"batch_inference.py: IMAGES {folder}: {message}")


def test_without_torchvision(
    folder: Path,
    tmp_path: Path,
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert program.main([*arguments(folder, tmp_path / "results.jsonl"), "--device=cpu"]) == 2
    assert capsys.readouterr().err == "batch_inference.py: torchvision is not installed: pip install torchvision\n"


def test_results_of_others(
    folder: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another model, and those that another run is writing."""
    out = tmp_path / "results.jsonl"
    out.write_text('{"path": "000.png", "model": "resnet18, weights DEFAULT", "class": 1, "probability": 0.5}\n')
    call = ["--device=cpu", *arguments(folder, out)]
    assert program.main(call) == 2
    assert "has results of resnet18, weights DEFAULT, not of" in capsys.readouterr().err
    out.unlink()
    with (tmp_path / "results.jsonl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert program.main(call) == 2
    assert "another run is at it" in capsys.readouterr().err
    assert not out.exists() and (tmp_path / "results.jsonl.lock").exists()
