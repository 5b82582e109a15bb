"""``python -m fused_conv_bn tune``: measures which algorithms are the fastest for a model, and keeps the result."""

from __future__ import annotations

import argparse

import torch

from . import _choices
from ._cli_model import MODEL_HELP, load_model
from ._demo import choose_device
from ._fuse import fuse
from ._fuse.tune import Case
from ._fuse.tune import tune as tune_model
from ._table import table

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--batch", type=int, default=1, help="images in the input; default: 1")
    parser.add_argument("--size", type=int, default=224, help="height and width of the input; default: 224")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of model and input")
    parser.add_argument("--channels-last", action="store_true", help="the memory format of model and input")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--train", action="store_true", help="in training mode; default: in evaluation mode")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.set_defaults(main=tune)


def _row(case: Case, algorithms: list[str]) -> list[str]:
    us = [f"{case.times[name]:,.0f} us" if name in case.times else "" for name in algorithms]
    choice = "none" if not case.choice else case.choice if case.times else f"{case.choice}, known"
    return [case.text(), str(sum(case.calls.values())), *us, case.rule, choice]


def tune(args: argparse.Namespace) -> int:
    for name in ("batch", "size"):
        if getattr(args, name) < 1:
            raise SystemExit(f"tune: --{name} is {getattr(args, name)}, expected 1 or more")
    model = load_model(args.model)
    device = choose_device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device, DTYPES[args.dtype]).to(memory_format=layout).train(args.train)  # type: ignore[call-overload]
    x = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    x = x.to(device, DTYPES[args.dtype]).contiguous(memory_format=layout)
    cases = tune_model(fuse(model, x), (x,), args.again)
    if not cases:
        print("There is nothing to choose: one algorithm covers each of the model's convolutions.")
        return 0
    algorithms = list(dict.fromkeys(name for case in cases for name in case.algorithms))
    head = ["convolution", "calls", *algorithms, "by rule", "chosen"]
    print(table([head, *(_row(case, algorithms) for case in cases)]))
    if any(case.times for case in cases):
        print(f"\nKept in {_choices.path()}")
    return 0
