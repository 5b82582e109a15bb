"""Classifies a folder of images with a model of torchvision, fused, in one process or several.

    python examples/batch_inference.py IMAGES --out results.jsonl
    torchrun --nproc-per-node 8 examples/batch_inference.py IMAGES --out results.jsonl --weights DEFAULT

Each line of the results is JSON: the image's path in the folder, the model, and its top class with the probability. An
image that cannot be read has "error" instead of these. A run that was stopped, in whatever way, goes on where it was
when it is started again, also with another number of processes. Until a run is at its end, its processes have files of
their own next to the results.

It takes torchvision, which brings Pillow to read images. `--weights DEFAULT` downloads; a file may be given instead.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fused_conv_bn as fcb
from fused_conv_bn._count import counted

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SECONDS = 3.0
"""Between two lines of progress."""


class UsageError(Exception):
    """What is wrong with the call, in one sentence."""


# ---- results ---------------------------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a file, without a line that was being written when its process ended."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "path" in record:
            yield record


class Results:
    """The file of results, and those that processes write to until a run is at its end."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        self.lock: Any = None

    def parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.part-*"))

    def hold(self, alone: bool) -> None:
        """Keeps other runs away from the file, until this process ends."""
        if self.path.is_dir():
            raise UsageError(f"--out {self.path}: is a folder, expected a file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or self.path.with_name(f"{self.path.name}.lock").open("a")
            fcntl.flock(self.lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock = None
            raise UsageError(f"--out {self.path}: another run is at it, whose processes are to end first") from None
        except OSError as error:
            raise UsageError(f"--out {self.path}: {error.strerror}") from None

    def release(self) -> None:
        """Nobody keeps others away any more."""
        if self.lock is not None:
            self.path.with_name(f"{self.path.name}.lock").unlink(missing_ok=True)

    def merge(self) -> dict[str, dict[str, Any]]:
        """Puts everything into the one file, by path and each path once. Stopped anywhere in it, nothing is lost."""
        parts = self.parts()
        found: dict[str, dict[str, Any]] = {}
        for path in (self.path, *parts):
            for record in records(path):
                if record.get("model") != self.model:
                    raise UsageError(
                        f"--out {self.path}: has results of {record.get('model')}, not of {self.model}: another file "
                        f"for these"
                    )
                found.setdefault(record["path"], record)
        if parts:
            new = self.path.with_name(f"{self.path.name}.new")
            new.write_text("".join(f"{json.dumps(found[name])}\n" for name in sorted(found)))
            os.replace(new, self.path)
            for path in parts:
                path.unlink()
        return found


# ---- images ----------------------------------------------------------------------------------------------------------


def images_of(folder: Path) -> list[str]:
    """Paths in the folder, also of what cannot be read."""
    if not folder.is_dir():
        raise UsageError(f"IMAGES {folder}: there is no such folder")
    found = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    images = sorted(path.relative_to(folder).as_posix() for path in found if path.suffix.lower() in SUFFIXES)
    if not images:
        raise UsageError(f"IMAGES {folder}: no image in it, expected files that end in {', '.join(sorted(SUFFIXES))}")
    return images


class Images(Dataset[tuple[str, Tensor | None, str]]):
    """(path, image or None, why it could not be read)."""

    def __init__(self, folder: Path, names: Sequence[str], transform: Any) -> None:
        self.folder, self.names, self.transform = folder, names, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        from PIL import Image

        name = self.names[index]
        try:
            with Image.open(self.folder / name) as image:
                return name, self.transform(image.convert("RGB")), ""
        except Exception as error:  # Pillow's readers raise errors of many classes for a damaged file
            return name, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


# ---- the model -------------------------------------------------------------------------------------------------------


def model_of(args: argparse.Namespace) -> tuple[torch.nn.Module, Any, list[str] | None]:
    """(the fused model, what makes a tensor of an image, names of the classes)."""
    try:
        import torchvision.models as models
    except ModuleNotFoundError:
        raise UsageError("torchvision is not installed: pip install torchvision") from None
    except Exception as error:
        raise UsageError(
            f"torchvision does not load next to torch {torch.__version__}, and needs the build for it: {error}"
        ) from None
    known = models.list_models(module=models)
    if args.model not in known:
        near = difflib.get_close_matches(args.model, known, 3) or known[:3]
        raise UsageError(
            f"--model {args.model}: torchvision has no such classifier, expected one of its {len(known)}, such as "
            f"{', '.join(near)}"
        )
    weights = models.get_model_weights(args.model).DEFAULT
    torch.manual_seed(0)  # random weights are the same in all processes
    model = models.get_model(args.model, weights=weights if args.weights == "DEFAULT" else None)
    if args.weights not in ("DEFAULT", "none"):
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"--weights {args.weights}: not a state_dict of {args.model}: {reason}") from None
    size = {} if args.size is None else {"crop_size": args.size, "resize_size": args.size}
    transform = weights.transforms(**size)
    categories = weights.meta["categories"] if args.weights == "DEFAULT" else None
    layout = torch.channels_last if args.device == "cuda" else torch.contiguous_format
    model = fcb.fuse(model.eval().to(args.place, DTYPES[args.dtype], memory_format=layout))
    return (fcb.graphed(model) if args.device == "cuda" else model), transform, categories


# ---- progress --------------------------------------------------------------------------------------------------------


class Progress(threading.Thread):
    """A line on stderr every few seconds: what all processes have written."""

    def __init__(self, results: Results, todo: int) -> None:
        super().__init__(daemon=True)
        self.results, self.todo = results, todo
        self.began, self.end = time.monotonic(), threading.Event()
        self.read: dict[Path, tuple[int, int]] = {}  # bytes, and lines in them

    def done(self) -> int:
        for path in self.results.parts():
            size, lines = self.read.get(path, (0, 0))
            with path.open("rb") as file:
                file.seek(size)
                new = file.read()
            self.read[path] = size + len(new), lines + new.count(b"\n")
        return sum(lines for _, lines in self.read.values())

    def text(self) -> str:
        done, seconds = self.done(), time.monotonic() - self.began
        return f"{done}/{counted(self.todo, 'image')}, {seconds:.0f} s, {done / seconds:.1f} images/s"

    def run(self) -> None:
        while not self.end.wait(SECONDS):
            print(self.text(), file=sys.stderr, flush=True)


# ---- a run -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def classify(model: Any, batch: Sequence[tuple[str, Tensor | None, str]], args: argparse.Namespace) -> Iterator[Any]:
    """A record for each image. On CUDA all batches are of one shape: that is one graph."""
    images = [image for _, image, _ in batch if image is not None]
    top: Iterator[tuple[float, int]] = iter(())
    if images:
        x = torch.stack(images)
        if args.device == "cuda" and len(images) < args.batch:
            x = torch.cat([x, x.new_zeros(args.batch - len(images), *x.shape[1:])])
        layout = torch.channels_last if args.device == "cuda" else torch.contiguous_format
        y = model(x.to(args.place, DTYPES[args.dtype], memory_format=layout))[: len(images)]
        values, indices = y.float().softmax(1).max(1)
        top = zip(values.tolist(), indices.tolist(), strict=True)
    for name, image, why in batch:
        record: dict[str, Any] = {"path": name, "model": args.label}
        if image is None:
            yield record | {"error": why}
        else:
            probability, index = next(top)
            yield record | {"class": index, "probability": round(probability, 6)}


def work(results: Results, args: argparse.Namespace, names: Sequence[str], rank: int) -> None:
    model, transform, categories = model_of(args)
    loader: Iterable[Any] = DataLoader(
        Images(args.images, names, transform), args.batch, num_workers=args.workers, collate_fn=list
    )
    # No other process has had this name: what another run has left is to be merged, not written over.
    own = results.path.with_name(f"{results.path.name}.part-{time.time_ns()}-{rank}")
    with own.open("a", buffering=1 << 20) as file:
        for batch in loader:
            for record in classify(model, batch, args):
                if "error" in record:
                    print(f"{record['path']}: {record['error']}: skipped", file=sys.stderr, flush=True)
                elif categories is not None and "class" in record:
                    record["label"] = categories[record["class"]]
                file.write(f"{json.dumps(record)}\n")
            file.flush()


def prepare(results: Results, args: argparse.Namespace) -> list[str]:
    """The images that have no result yet. One process asks, for all to have the same answer."""
    images = images_of(args.images)
    results.hold(alone=True)
    done = results.merge()
    results.hold(alone=False)  # together with the other processes
    return [name for name in images if name not in done]


def infer(args: argparse.Namespace, rank: int, world: int) -> int:
    results = Results(args.out, args.label)
    answer: list[Any] = [None, None]
    try:
        if rank == 0:
            try:
                answer[0] = prepare(results, args)
            except (UsageError, OSError) as error:
                answer[1] = str(error)
        if world > 1:
            dist.broadcast_object_list(answer, 0)
        todo, error = answer
        if error is not None:
            raise UsageError(error)
        if rank > 0:
            results.hold(alone=False)
            if todo:
                work(results, args, todo[rank::world], rank)
            dist.barrier()
            return 0
        progress = Progress(results, len(todo))
        try:
            if todo:
                progress.start()
                work(results, args, todo[::world], rank)
            if world > 1:
                dist.barrier()
        finally:
            progress.end.set()
        if todo:
            progress.join()  # it reads the files that are merged now
            print(progress.text(), file=sys.stderr)
        found = results.merge().values()
    finally:
        if rank == 0:
            results.release()
    unreadable = sum("error" in record for record in found)
    print(f"{args.out}: {counted(len(found), 'image')}, {len(todo)} of them now, {unreadable} unreadable")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classifies a folder of images with a fused model of torchvision.")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder; images in folders of it count, too")
    parser.add_argument("--out", type=Path, required=True, help="the file of results, JSON lines")
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision (default: resnet18)")
    parser.add_argument("--weights", default="none", help="DEFAULT, a file, or none for random ones (default: none)")
    parser.add_argument("--batch", type=int, default=32, help="of each process (default: 32)")
    parser.add_argument("--size", type=int, help="of the square that the model gets (default: the weights')")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images, of each (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, least in (("batch", 1), ("workers", 0), ("size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: expected {least} or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no usable GPU")
    args.label = f"{args.model}, weights {args.weights}"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))

    def say(message: str) -> None:
        print(f"{Path(__file__).name}: {message}", file=sys.stderr)

    try:
        args = arguments(argv)
        args.place = torch.device(args.device)
        if args.device == "cuda":
            args.place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(args.place)
        if world > 1:
            dist.init_process_group("gloo")  # nothing but the list of images goes over it
        return infer(args, rank, world)
    except UsageError as error:
        if rank == 0:  # it is that of all
            say(str(error))
        return 2
    except OSError as error:
        say(str(error))
        return 2
    except torch.OutOfMemoryError:
        say("out of memory: a smaller --batch?")
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            say("stopped, and goes on when it is started again")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
