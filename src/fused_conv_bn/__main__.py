"""``python -m fused_conv_bn {info,demo,bench,tune}``: what is installed, checks with timings, measured choices."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import __version__, _bench, _cli, _tune
from ._demo import demo
from ._info import info


def main(argv: Sequence[str] | None = None) -> int:
    return _cli.run("python -m fused_conv_bn", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = _cli.Parser(prog="python -m fused_conv_bn", description="fused_conv_bn from the command line.")
    parser.add_argument("--version", action="version", version=f"fused_conv_bn {__version__}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="what is installed, loaded and usable").set_defaults(main=info)
    demo_parser = commands.add_parser("demo", help="check and time a small model against PyTorch, within a minute")
    demo_parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    demo_parser.set_defaults(main=demo)
    _bench.add_command(commands)
    _tune.add_command(commands)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return _cli.run(args.command, lambda: int(args.main(args)))


if __name__ == "__main__":
    sys.exit(main())
