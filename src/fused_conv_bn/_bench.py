"""``python -m fused_conv_bn bench MODEL``: any model, as it is and in the forms that this package gives it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fused_conv_bn as fcb

from ._cli import UsageError, why_not_writable
from ._cli_model import load
from ._count import counted
from ._demo import why_no_gpu
from ._model_times import LARGE, Case, Record, measure
from ._progress import part
from ._table import table

DTYPES = ("float32", "float16", "bfloat16", "float64")
SLOWEST = 10
DEFAULT_BATCH, DEFAULT_SIZE = 1, (3, 224, 224)
# Colours that differ for everybody, those of benchmarks/.
EAGER_COLOUR, OUR_COLOUR, OTHER_COLOUR = "#D55E00", "#0072B2", "#007a5a"


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="check and time a model as it is and fused",
        description="Checks a model as it is, fused, frozen and as a CUDA graph, times all of them in turns, and then "
        "each group of fused layers. Inputs are random, and so are weights, unless MODEL loads its own.",
    )
    add_model_arguments(parser, "training steps, without an optimizer")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the model as it is")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="default: 5 to 50, what takes about 20 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the tables (needs matplotlib)")
    parser.set_defaults(main=bench)


def add_model_arguments(parser: argparse.ArgumentParser, train: str) -> None:
    """Those that :func:`case_of` makes a model and its inputs of. ``train``: what ``--train`` means."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="module:callable or file.py:callable, for example torchvision.models:resnet50. The callable takes no "
        "arguments and returns an nn.Module, or a tuple of one and the inputs to call it with",
    )
    parser.add_argument("--batch", type=_positive, metavar="N", help=f"images (default: {DEFAULT_BATCH})")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="S",
        help="of an input: 224 is 3x224x224; other channels and dimensions as 16x112x112 (default: 224)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--channels-last", action="store_true", help="the model and its inputs in channels_last")
    parser.add_argument("--train", action="store_true", help=train)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1 on")
    return int(text)


def _size(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number, or several with x between them, as 3x224x224")
    sizes = tuple(map(int, parts))
    return (3, *sizes * 2) if len(sizes) == 1 else sizes


def bench(args: argparse.Namespace) -> int:
    check_files(args)
    with part(args.model):
        case = case_of(args)
        with torch.set_grad_enabled(args.train):
            record = {**described(args), **measure(case, args.rounds)}
    if why := record["processors"]["disturbed"]:
        print(f"bench: {why}", file=sys.stderr)
    print(text(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {args.json}")
    if args.chart:
        with part("draw"):
            draw(record, args.chart)
        print(f"wrote {args.chart}")
    return 0 if all(v["problem"] is None or v["name"] == "compile" for v in record["variants"]) else 1


def check_files(args: argparse.Namespace) -> None:
    """Before minutes of measuring."""
    for option, path in (("--json", args.json), ("--chart", args.chart)):
        if path is not None and (why := why_not_writable(path)):
            raise UsageError(f"{option} is {path}, which cannot be written to: {why}")
    if args.chart is not None:
        if args.chart.suffix != ".png":
            raise UsageError(f"--chart is {args.chart}, expected a name that ends in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--chart needs matplotlib: pip install matplotlib")


def case_of(args: argparse.Namespace) -> Case:
    device = args.device
    if device != "cpu":
        why = why_no_gpu()
        if why and device == "cuda":
            raise UsageError(f"--device is cuda: {why}")
        device = "cpu" if why else "cuda"
    args.device = device
    torch.manual_seed(0)
    model, inputs = load(args.model)
    if inputs is None:
        inputs = (torch.randn(args.batch or DEFAULT_BATCH, *(args.size or DEFAULT_SIZE)),)
    elif args.batch or args.size:
        raise UsageError(f"--batch and --size are for models without inputs, and {args.model} comes with its own")
    return Case(model, inputs, device, getattr(torch, args.dtype), args.channels_last, args.train, args.compile)


def described(args: argparse.Namespace) -> Record:
    """What the numbers belong to."""
    on_cuda = args.device == "cuda"
    return {
        "model": args.model,
        "device": torch.cuda.get_device_name() if on_cuda else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "fused_conv_bn": fcb.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if on_cuda else None,
            "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        },
    }


# ---- text ------------------------------------------------------------------------------------------------------------


def _us(value: float) -> str:
    return f"{value:,.0f} us" if value >= 100 else f"{value:.1f} us"


def _percent(spread: float | None) -> str:
    return "" if spread is None else f"{spread:.0%}"


def _shape(sizes: list[int]) -> str:
    return "x".join(map(str, sizes))


def title(record: Record) -> str:
    inputs = ", ".join(map(_shape, record["inputs"]))
    layout = ", channels_last" if record["channels_last"] else ""
    mode = "training steps" if record["mode"] == "train" else "eval"
    device = f"CPU, {counted(record['threads'], 'thread')}" if record["device"] == "CPU" else record["device"]
    return f"{record['model']} on {inputs}, {record['dtype']}{layout}, {mode}, {device}"


def text(record: Record) -> str:
    copy, variants, groups = record["copy"], record["variants"], record["groups"]
    what = "of all gradients together" if record["mode"] == "train" else "the largest one over the largest result"
    against = "eager's" if record["errors against"] == "eager" else record["errors against"]
    rows = [("", "median", "spread", "speed-up", "error")]
    for v in variants:
        error = "" if v["error"] is None else f"{v['error']:.1e}"
        if v["problem"] is None:
            times = _us(v["median_us"]), _percent(v["spread"]), f"{v['speed-up']:.2f}x"
            rows.append((v["name"], *times, error))
        else:
            rows.append((v["name"], "not timed", "", "", error))
    name = f"copy of {copy['bytes'] >> 20} MB, {copy['gb_per_s']:,.0f} GB/s"
    rows.append((name, _us(copy["median_us"]), _percent(copy["spread"]), "", ""))
    parts = [
        f"{title(record)}\nMedians of {counted(record['rounds'], 'round')}; spread: the distance of the quartiles.\n"
        f"Errors are those against {against} results, {what}.",
        table(rows, numbers_from=1),
    ]
    if problems := [f"{v['name']} was not timed: {v['problem']}" for v in variants if v["problem"] is not None]:
        parts.append("\n".join(problems))
    if (variants[0]["error"] or 0.0) > LARGE:
        parts.append(
            "Eager's own error leaves the check little to say: the dtype has too few bits, or layers are random."
        )
    if groups:
        parts += [_groups_head(record), table(_group_rows(groups[:SLOWEST]), numbers_from=3)]
    elif any(v["name"] == "fused" and v["problem"] is None for v in variants):
        parts.append("Nothing was fused: fcb.report(model) says why.")
    return "\n\n".join(parts)


def _groups_head(record: Record) -> str:
    groups = record["groups"]
    fused, plain = (sum(g[name] * g["calls"] for g in groups) for name in ("fused_us", "pytorch_us"))
    counts = ", ".join(f"{n} {kind}" for kind, n in record["report"].items())
    shown = counted(len(groups), "group")
    if len(groups) > SLOWEST:
        shown = f"the {SLOWEST} slowest of {shown}"
    return (
        f"Convolutions and BatchNorms: {counts}. Here {shown}, each by itself.\n"
        f"All groups together: {_us(fused)} as fused ops, {_us(plain)} by PyTorch's ops."
    )


def _group_rows(groups: list[Record]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("group", "ops", "input", "calls", "fused", "PyTorch's", "spread", "speed-up")]
    for g in groups:
        times = _us(g["fused_us"]), _us(g["pytorch_us"]), _percent(g["spread"]), f"{g['speed-up']:.2f}x"
        rows.append((g["group"], g["ops"], _shape(g["shape"]), str(g["calls"]), *times))
    return rows


# ---- chart -----------------------------------------------------------------------------------------------------------


def draw(record: Record, path: Path) -> None:
    """Bars: the whole, and below it the slowest groups."""
    matplotlib: Any = importlib.import_module("matplotlib.figure")
    variants = [v for v in record["variants"] if v["problem"] is None]
    groups = record["groups"][:SLOWEST]
    heights = [len(variants) + 1.2, 1.6 * len(groups) + 1.2] if groups else [len(variants) + 1.2]
    figure = matplotlib.Figure(figsize=(9, 0.7 + 0.32 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    colours = {"eager": EAGER_COLOUR, "compile": OTHER_COLOUR}
    names = [v["name"] for v in variants]
    ms = [v["median_us"] / 1e3 for v in variants]
    bars = panels[0].barh(names, ms, color=[colours.get(name, OUR_COLOUR) for name in names])
    labels = [f"{t:.3g} ms, {v['speed-up']:.2f}x" for t, v in zip(ms, variants, strict=True)]
    panels[0].bar_label(bars, labels, padding=3, fontsize=8)
    panels[0].set_xlabel("time of a call, ms")
    if groups:
        places = range(len(groups))
        of: list[tuple[str, str, str, Callable[[Record], str]]] = [
            ("pytorch_us", "PyTorch's ops", EAGER_COLOUR, lambda g: ""),
            ("fused_us", "fused op", OUR_COLOUR, lambda g: f"{g['speed-up']:.2f}x"),
        ]
        for i, (key, label, colour, text_of) in enumerate(of):
            at = [p + 0.4 * (i - 0.5) for p in places]
            bars = panels[1].barh(at, [g[key] for g in groups], 0.38, color=colour, label=label)
            panels[1].bar_label(bars, [text_of(g) for g in groups], padding=3, fontsize=8)
        ticks = [f"{g['group']}: {g['ops']}\n{_shape(g['shape'])}" for g in groups]
        panels[1].set_yticks(places, ticks, fontsize=7)
        panels[1].set_xlabel("time of a call of a group, µs")
        panels[1].legend(fontsize=8, frameon=False, loc="lower right")
    for axes in panels:
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.suptitle(title(record), fontsize=9)
    figure.savefig(path, dpi=150)
