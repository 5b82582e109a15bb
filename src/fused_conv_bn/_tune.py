"""``python -m fused_conv_bn tune MODEL``: measures the fastest algorithms for a model, and keeps them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import _choices
from ._bench import add_model_arguments, case_of
from ._cli import UsageError
from ._fuse import fuse
from ._fuse.tune import Case, NamedAlgorithmError, tune_cases
from ._progress import part
from ._stopwatch import Processors
from ._table import table

SPREADS = {
    True: "the distance of the quartiles, over the median.",
    False: "from the least, which is shown, to the lower quartile.",
}
"""By whether it is CUDA."""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure the fastest algorithm for each convolution of a model, and keep it",
        description="Times this package's algorithms and PyTorch's own for each convolution of a model, on this "
        "device. The fastest runs from then on, also in later processes.",
    )
    add_model_arguments(parser, "the model in training mode")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.set_defaults(main=tune, compile=False)


def tune(args: argparse.Namespace) -> int:
    with part(args.model):
        of = case_of(args)
        try:
            processors = Processors(of.on_cuda)
            cases = tune_cases(fuse(of.model, of.inputs), of.inputs, args.again, processors)
        except NamedAlgorithmError as error:
            raise UsageError(str(error).removeprefix("tune: ")) from error
    if not cases:
        print("There is nothing to choose: one algorithm alone covers each of the model's convolutions.")
        return 0
    if why := processors.why_disturbed("run it with --again"):
        print(f"tune: {why}", file=sys.stderr)
    algorithms = list(dict.fromkeys(name for case in cases for name in case.algorithms))
    head = ["convolution", "calls", *algorithms, "spread", "by rule", "chosen"]
    print(table([head, *(_row(case, algorithms) for case in cases)]))
    if any(case.times for case in cases):
        print("\nspread: the largest one of the row's times, " + SPREADS[of.on_cuda])
    if any(not case.is_decided for case in cases):
        print(
            "undecided: times vary by more than they differ, or other programs ran. The rule's runs; nothing is kept."
        )
    if any(case.times and case.is_decided and _choices.are_kept(case.device) for case in cases):
        print(f"Kept in {_choices.path()}")
    return 0


def _row(case: Case, algorithms: list[str]) -> list[str]:
    us = [f"{case.times[name].us:,.0f} us" if name in case.times else "" for name in algorithms]
    spread = f"{max(figure.spread for figure in case.times.values()):.0%}" if case.times else ""
    choice = "none" if not case.choice else case.choice if case.times else f"{case.choice}, known"
    if not case.is_decided:
        choice += ", undecided"
    return [case.text(), str(sum(case.calls.values())), *us, spread, case.rule, choice]
