"""``python -m benchmarks``: checks the ops against float64, then times them against a copy and their rivals.

One run does all of it, on the GPU if there is one, else on the CPU. It writes a record, prints its tables and draws its
charts; from the records in results/ it writes the tables of README.md and docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_conv_bn import _cli
from fused_conv_bn._cli import UsageError, why_not_writable
from fused_conv_bn._demo import why_no_gpu
from fused_conv_bn._progress import part

from . import (
    charts,
    documents,
    kernelbench,
    models,
    network_layers,
    record,
    report,
    report_conv,
    report_grad_mode,
    report_kernelbench,
    report_layers,
    report_models,
    report_steps,
)
from .common import InaccurateError
from .run import COMPILE_BUDGETS, CPU_MAX_MB, PARTS, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"measure these parts of {', '.join(PARTS)}; conv is all behind it, of which train has the batch's "
        "statistics (default: all but models, kernelbench and layers; on the CPU bn_scale, bn_scale_train, host, "
        "problem_73, train)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="three sizes, fp32 and fp16, two convolutions a part, no torch.compile"
    )
    parser.add_argument(
        "--max-mb", type=_megabytes, metavar="MB", help=f"leave out larger tensors (default on the CPU: {CPU_MAX_MB})"
    )
    parser.add_argument("--repeats", type=_positive, metavar="N", default=5, help="timings per number (default: 5)")
    parser.add_argument(
        "--conv-batch", type=_positive, metavar="N", help="batch of all convolutions (default: each part's)"
    )
    parser.add_argument(
        "--compile-budget",
        type=float,
        metavar="S",
        help="no torch.compile after S seconds of it, for each of these ("
        + ", ".join(f"{part}: {budget}" for part, budget in COMPILE_BUDGETS.items())
        + ")",
    )
    network_layers.add_arguments(parser)
    models.add_arguments(parser)
    kernelbench.add_arguments(parser)
    parser.add_argument("--commit", help="recorded (default: what git says)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write every number to FILE, JSON a line each")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="draw PNGs into DIR (needs matplotlib)")
    parser.add_argument("--from-record", type=Path, metavar="FILE", help="measure nothing, take what a run recorded")
    parser.add_argument(
        "--render",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing, write the tables that the markers in FILE name, from benchmarks/results",
    )


def _megabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return number


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1 on")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _cli.Parser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    add_arguments(parser)
    return _cli.run("benchmarks", lambda: _main(parser.parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    if args.render:
        for path in args.render:
            path.write_text(documents.render(path.read_text()))
        return 0
    check_files(args)
    if args.from_record:
        try:
            found = record.read(args.from_record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"--from-record is {args.from_record}, expected a file that --record wrote") from error
    else:
        if args.device == "cuda" and (why := why_no_gpu()):
            raise UsageError(f"--device is cuda: {why}")
        try:
            with part("benchmarks"):
                found = measure(args)
        except InaccurateError as error:
            print(f"benchmarks: stopped before any timing: {error}", file=sys.stderr)
            return 1
        if args.record:
            record.write(found, args.record)
    report.print_head(found)
    report_conv.print_tables(found)
    report_grad_mode.print_tables(found)
    report_steps.print_tables(found)
    report_models.print_tables(found)
    report_kernelbench.print_tables(found)
    report_layers.print_tables(found)
    report.print_tables(found)
    if args.charts:
        for path in charts.draw(found, args.charts):
            print(f"wrote {path}")
    for case, why in found.get("failed", {}).items():
        print(f"benchmarks: not measured: {case}: {why}", file=sys.stderr)
    return 1 if found.get("failed") else 0


def check_files(args: argparse.Namespace) -> None:
    """Before minutes of measuring. Creates folders that are missing."""
    if args.charts and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--charts needs matplotlib: pip install matplotlib")
    for option, path in (
        ("--record", None if args.from_record else args.record),
        ("--charts", args.charts and args.charts / "chart.png"),
    ):
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            why = why_not_writable(path)
        except OSError as error:
            why = _cli.reason(error)
        if why:
            raise UsageError(f"{option} is {getattr(args, option[2:])}, which cannot be written to: {why}")


if __name__ == "__main__":
    sys.exit(main())
