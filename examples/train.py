"""Trains a small residual network twice, of PyTorch's modules and of ConvBnScale2d, and compares both.

The two begin with the same weights and see the same batches in the same order, so that their losses lie on one curve.
Reported are that curve, the time of a step, and the memory that it takes. The images are made here: gratings in ten
orientations, of random width, phase and colour, under noise. Nothing is downloaded.

    python examples/train.py --quick                                  # a few seconds on a CPU
    python examples/train.py --dtype bfloat16 --channels-last --out results
    torchrun --nproc-per-node 2 examples/train.py                     # DistributedDataParallel

In float16 and bfloat16 the weights are float32 and autocast casts; float16 has a GradScaler.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

import fused_conv_bn as fcb
from fused_conv_bn._count import counted

CLASSES = 10
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = ("PyTorch", "ConvBnScale2d")
MB = 1e6


# ---- the network -----------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """What ConvBnScale2d stands for, under the same names."""

    def __init__(self, inputs: int, outputs: int, kernel: int, activation: str = "none", **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, **kwargs)
        self.bn = nn.BatchNorm2d(outputs)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y = y + residual
        return F.relu(y, inplace=True) if self.activation == "relu" else y


def fused(inputs: int, outputs: int, kernel: int, activation: str = "none", **kwargs: Any) -> nn.Module:
    return fcb.ConvBnScale2d(inputs, outputs, kernel, activation=activation, **kwargs)


Block = Callable[..., nn.Module]


class Residual(nn.Module):
    def __init__(self, block: Block, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = block(inputs, outputs, 3, "relu", stride=stride, padding=1, bias=False)
        self.second = block(outputs, outputs, 3, "relu", padding=1, bias=False)
        self.skip = None if inputs == outputs else block(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x if self.skip is None else self.skip(x))


def network(block: Block, width: int) -> nn.Sequential:
    return nn.Sequential(
        block(3, width, 3, "relu", padding=1, bias=False),
        Residual(block, width, width, 1),
        Residual(block, width, 2 * width, 2),
        Residual(block, 2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


# ---- the data --------------------------------------------------------------------------------------------------------


def gratings(count: int, size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(images, their classes). A class is an orientation, to which each image adds a little."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels + 0.5 * (draw(count) - 0.5)) * math.pi / CLASSES
    frequency, phase = 2 * math.pi * (2 + 3 * draw(count)) / size, 2 * math.pi * draw(count)
    colour = draw(count, 3, 1, 1) - 0.5
    rows, columns = (t.float() for t in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    across = angle.cos().view(-1, 1, 1) * columns + angle.sin().view(-1, 1, 1) * rows
    waves = torch.sin(frequency.view(-1, 1, 1) * across + phase.view(-1, 1, 1))
    images = colour * waves.unsqueeze(1)
    images += 0.4 * torch.randn(images.shape, generator=generator)
    return images.to(device), labels.to(device)


def batches(count: int, batch: int, epoch: int, rank: int, world: int, device: torch.device) -> Iterator[Tensor]:
    """The images of each step: every process takes its share of one order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).to(device)
    for start in range(0, count - batch * world + 1, batch * world):
        yield order[start + rank * batch : start + (rank + 1) * batch]


# ---- one of both -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A network in training, and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    kept: int = 0
    accuracy: float = math.nan


@dataclass(frozen=True)
class Trainer:
    args: argparse.Namespace
    device: torch.device
    rank: int
    world: int

    def autocast(self) -> Any:
        dtype = DTYPES[self.args.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def images(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        x, labels = gratings(count, self.args.size, seed, self.device)
        return (x.to(memory_format=torch.channels_last) if self.args.channels_last else x), labels

    def runs(self) -> list[Run]:
        """Both networks, with one state."""
        found: list[Run] = []
        state: dict[str, Any] = {}
        for name, block in zip(NAMES, (Plain, fused), strict=True):
            torch.manual_seed(0)
            model: nn.Module = network(block, self.args.width)
            state = state or {key: t.clone() for key, t in model.state_dict().items()}
            model.load_state_dict(state)
            model.to(self.device)
            if self.args.channels_last:
                model.to(memory_format=torch.channels_last)
            if self.world > 1:
                model = DistributedDataParallel(model, [self.device.index] if self.device.type == "cuda" else None)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
            scaler = torch.amp.GradScaler(self.device.type, enabled=self.args.dtype == "float16")
            found.append(Run(name, model, optimizer, scaler))
        return found

    def step(self, run: Run, x: Tensor, labels: Tensor) -> Tensor:
        run.optimizer.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(run.model(x).float(), labels)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return loss.detach()

    def epoch(self, runs: Sequence[Run], x: Tensor, labels: Tensor, epoch: int, tick: Callable[[str], None]) -> None:
        """Both in turn, step by step, so that neither has the cooler machine."""
        for run in runs:
            run.model.train()
        chosen = batches(len(x), self.args.batch, epoch, self.rank, self.world, self.device)
        for i, indices in enumerate(chosen):
            of_step = x[indices], labels[indices]
            for run in runs if i % 2 == 0 else reversed(runs):
                self.timed_step(run, *of_step)
            tick(f"epoch {epoch + 1}, loss {' and '.join(f'{run.losses[-1]:.3f}' for run in runs)}")

    def timed_step(self, run: Run, x: Tensor, labels: Tensor) -> None:
        before = 0
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        loss = self.step(run, x, labels)
        self.synchronize()
        run.seconds.append(time.perf_counter() - start)
        if self.device.type == "cuda":
            run.peak = max(run.peak, torch.cuda.max_memory_allocated(self.device) - before)
        run.losses.append(loss.item())

    def weigh(self, run: Run, x: Tensor, labels: Tensor) -> None:
        """What the graph of a batch keeps for backward, each memory counted once, without the parameters."""
        memory: dict[int, int] = {}
        known = {p.untyped_storage().data_ptr() for p in run.model.parameters()}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                memory[storage.data_ptr()] = storage.nbytes()
            return t

        model = getattr(run.model, "module", run.model)
        state = {key: t.clone() for key, t in model.state_dict().items()}
        with saved_tensors_hooks(pack, lambda t: t), self.autocast():
            loss = F.cross_entropy(model(x[: self.args.batch]).float(), labels[: self.args.batch])
        del loss
        run.kept = sum(memory.values())
        model.load_state_dict(state)  # the running statistics moved

    @torch.no_grad()
    def evaluate(self, run: Run, x: Tensor, labels: Tensor) -> None:
        run.model.eval()
        right = 0
        with self.autocast():
            for some, of in zip(x.split(self.args.batch), labels.split(self.args.batch), strict=True):
                right += int((run.model(some).argmax(1) == of).sum())
        run.accuracy = right / len(x)


# ---- progress, results -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """Calls of what it gives count the steps: on a bar of tqdm, or a line of its own."""
    if not shown:
        yield lambda text: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        done, width = 0, 0

        def tick(text: str) -> None:
            nonlocal done, width
            done += 1
            line = f"{done}/{total} {text}"
            print(f"\r{line:<{width}}", end="", file=sys.stderr, flush=True)
            width = len(line)

        try:
            yield tick
        finally:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
        return
    with tqdm(total=total, file=sys.stderr, leave=False, dynamic_ncols=True) as bar:

        def advance(text: str) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update()

        yield advance


def table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows
    ]
    return "\n".join("  ".join(line) for line in lines)


def of_epochs(run: Run, steps: int) -> list[float]:
    """The mean loss of each epoch that was finished or begun."""
    return [statistics.mean(run.losses[i : i + steps]) for i in range(0, len(run.losses), steps)]


def summary(runs: Sequence[Run], steps: int) -> str:
    rows = [["", *(run.name for run in runs), "PyTorch / ours"]]
    for epoch, losses in enumerate(zip(*(of_epochs(run, steps) for run in runs), strict=False)):
        rows.append([f"mean loss, epoch {epoch + 1}", *(f"{loss:.4f}" for loss in losses), ""])
    if not any(math.isnan(run.accuracy) for run in runs):
        rows.append(["accuracy, other images", *(f"{run.accuracy:.1%}" for run in runs), ""])
    times = [statistics.median(run.seconds) * 1e3 for run in runs]
    rows.append(["time of a step, median", *(f"{ms:.2f} ms" for ms in times), f"{times[0] / times[1]:.2f}"])
    for what, name in (("peak memory of a step", "peak"), ("kept for backward", "kept")):
        bytes_of = [getattr(run, name) for run in runs]
        if all(bytes_of):
            cells = [f"{b / MB:.1f} MB" for b in bytes_of]
            rows.append([what, *cells, f"{bytes_of[0] / bytes_of[1]:.2f}"])
    apart = [abs(a - b) for a, b in zip(*(run.losses for run in runs), strict=False)]
    differences = f"{max(apart[:10]):.1e} in the first ten steps, {max(apart):.1e} in all"
    return f"{table(rows)}\n\nlargest difference of a step's losses: {differences} (training amplifies roundings)"


def draw(runs: Sequence[Run], path: Path, title: str) -> bool:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run, style in zip(runs, ("-", "--"), strict=True):
        axes.plot(
            range(1, len(run.losses) + 1), run.losses, style, label=run.name, linewidth=2 if style == "-" else 1.5
        )
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


# ---- the program -----------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None, world: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small network of PyTorch's modules and of ConvBnScale2d, and compares both."
    )
    parser.add_argument("--epochs", type=int, help="default: 4; with --quick 2")
    parser.add_argument("--batch", type=int, help="of each process (default: 64, on CUDA 256; with --quick 32)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="16-bit ones by autocast (default: float32)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--channels-last", action="store_true", help="memory format of weights and images")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw the losses into DIR (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="few and small images: a few seconds on a CPU")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no usable GPU")
    if args.device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        parser.error(
            f"--device cuda: more processes than {counted(torch.cuda.device_count(), 'GPU')}: --nproc-per-node"
        )
    on_cuda, quick = args.device == "cuda" and not args.quick, args.quick
    args.epochs = (2 if quick else 4) if args.epochs is None else args.epochs
    args.batch = (32 if quick else 256 if on_cuda else 64) if args.batch is None else args.batch
    args.size, args.images = (16, 256) if quick else (64, 8192) if on_cuda else (32, 2048)
    args.width = 8 if quick else 64 if on_cuda else 16
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: expected 1 or more")
    if not 1 <= args.batch <= args.images // world:
        parser.error(
            f"--batch {args.batch}: expected 1 to {args.images // world}, as there are {counted(args.images, 'image')}"
        )
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {args.out}: {error.strerror}")
    return args


def train(trainer: Trainer) -> int:
    args, first = trainer.args, trainer.rank == 0
    x, labels = trainer.images(1, args.images)
    runs = trainer.runs()
    steps = args.images // (args.batch * trainer.world)
    stopped = False
    try:
        for run in runs:
            trainer.weigh(run, x, labels)
        with progress(args.epochs * steps, first) as tick:
            for epoch in range(args.epochs):
                trainer.epoch(runs, x, labels, epoch, tick)
        for run in runs:
            trainer.evaluate(run, *trainer.images(2, args.images // 2))
    except KeyboardInterrupt:
        stopped = True
    if not first:
        return 130 if stopped else 0
    if stopped:
        print("stopped", file=sys.stderr)
    if not all(run.losses for run in runs):
        return 130
    where = torch.cuda.get_device_name(trainer.device) if args.device == "cuda" else "CPU"
    layout = "channels_last" if args.channels_last else "contiguous"
    count = counted(trainer.world, "process", "processes")
    title = f"{where}, {count}, {args.dtype}, {layout}, batch {args.batch}, {args.size}x{args.size}"
    print(f"{title}\n\n{summary(runs, steps)}")
    if args.out:
        path = args.out / "train.png"
        drawn = draw(runs, path, title)
        print(f"wrote {path}" if drawn else "no picture: it needs matplotlib (pip install matplotlib)")
    return 130 if stopped else 0


def main(argv: Sequence[str] | None = None) -> int:
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    args = arguments(argv, world)
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        return train(Trainer(args, device, rank, world))
    except torch.OutOfMemoryError:
        print(f"{Path(__file__).name}: out of memory: a smaller --batch than {args.batch}?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
