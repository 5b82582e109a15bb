"""``python -m fused_conv_bn tune MODEL``: measures the fastest algorithms for a model, and keeps them."""

from __future__ import annotations

import argparse
from typing import Any

from . import _choices
from ._bench import add_model_arguments, case_of
from ._cli import UsageError
from ._fuse import fuse
from ._fuse.tune import Case, NamedAlgorithmError, tune_cases
from ._progress import part
from ._table import table


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
            cases = tune_cases(fuse(of.model, of.inputs), of.inputs, args.again)
        except NamedAlgorithmError as error:
            raise UsageError(str(error).removeprefix("tune: ")) from error
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
