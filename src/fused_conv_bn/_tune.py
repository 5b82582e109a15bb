"""``python -m fused_conv_bn tune MODEL``: measures the fastest algorithms for a model, and keeps them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import _choices
from ._bench import DEFAULT_BATCH, DTYPES, _positive, _size, case_of
from ._cli_model import UsageError
from ._fuse import fuse
from ._fuse.tune import Case, tune_cases
from ._table import table


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure the fastest algorithm for each convolution of a model, and keep it",
        description="Times this package's algorithms and PyTorch's own for each convolution of a model, on this "
        "device. The fastest runs from then on, also in later processes.",
    )
    parser.add_argument("model", metavar="MODEL", help="as of the command bench")
    parser.add_argument("--batch", type=_positive, metavar="N", help=f"images (default: {DEFAULT_BATCH})")
    parser.add_argument("--size", type=_size, metavar="S", help="of an input, as of bench (default: 224)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--channels-last", action="store_true", help="the model and its inputs in channels_last")
    parser.add_argument("--train", action="store_true", help="the model in training mode")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.set_defaults(main=tune, compile=False)


def tune(args: argparse.Namespace) -> int:
    try:
        of = case_of(args)
        cases = tune_cases(fuse(of.model, of.inputs), of.inputs, args.again)
    except UsageError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    if not cases:
        print("There is nothing to choose: one algorithm alone covers each of the model's convolutions.")
        return 0
    algorithms = list(dict.fromkeys(name for case in cases for name in case.algorithms))
    head = ["convolution", "calls", *algorithms, "by rule", "chosen"]
    print(table([head, *(_row(case, algorithms) for case in cases)]))
    if any(case.times for case in cases):
        print(f"\nKept in {_choices.path()}")
    return 0


def _row(case: Case, algorithms: list[str]) -> list[str]:
    us = [f"{case.times[name]:,.0f} us" if name in case.times else "" for name in algorithms]
    choice = "none" if not case.choice else case.choice if case.times else f"{case.choice}, known"
    return [case.text(), str(sum(case.calls.values())), *us, case.rule, choice]
