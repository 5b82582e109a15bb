"""``python -m fused_conv_bn {info,demo,bench,tune}``: what is installed, checks with timings, measured choices."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import _bench, _tune
from ._demo import demo
from ._info import info


class _Parser(argparse.ArgumentParser):
    """Says what is wrong without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m fused_conv_bn", description="fused_conv_bn from the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, loaded and usable").set_defaults(main=info)
    demo_parser = commands.add_parser("demo", help="check and time a small model against PyTorch, within a minute")
    demo_parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    demo_parser.set_defaults(main=demo)
    _bench.add_command(commands)
    _tune.add_command(commands)
    args = parser.parse_args(argv)
    return int(args.main(args))


if __name__ == "__main__":
    sys.exit(main())
