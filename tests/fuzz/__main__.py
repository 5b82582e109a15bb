"""``python -m fuzz``: random calls of every op, for some time, until one breaks a promise."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_conv_bn._count import counted

from .generate import DEVICES, generate
from .problem import OPS, Problem
from .run import Invalid, check
from .shrink import failure_of, shrunk

MOST_FAILURES = 20  # that --keep-going shrinks and prints


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.partition("\n")[0])
    made.add_argument("--seconds", type=float, default=60.0, help="how long to make problems (default: 60)")
    made.add_argument("--device", choices=DEVICES, help="emulator: CUDA's kernels on the CPU (default: cuda or cpu)")
    made.add_argument("--seed", type=int, metavar="N", help="this problem alone")
    made.add_argument("--first", type=int, metavar="N", help="the first seed (default: from the clock)")
    made.add_argument("--count", type=int, metavar="N", help="end after so many problems")
    made.add_argument("--only", metavar="WORD", help=f"ops with this in their name, of {', '.join(OPS)}")
    made.add_argument("--keep-going", action="store_true", help="count failures, do not end at the first one")
    made.add_argument("--shrink-seconds", type=float, default=20.0, help="for each failure (default: 20)")
    made.add_argument("--record", type=Path, metavar="FILE", help="write the summary to FILE as JSON")
    made.add_argument("--commit", help="recorded (default: what git says)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    only = tuple(name for name in OPS if args.seed is not None or args.only is None or args.only in name)
    if not only:
        print(f"fuzz: --only is {args.only!r}, expected a part of one of {', '.join(OPS)}", file=sys.stderr)
        return 2
    # As the tests have it: eager in true float32, and the same algorithms every time.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    first = args.seed if args.seed is not None else args.first if args.first is not None else int(time.time()) << 8
    count = 1 if args.seed is not None else args.count
    summary = fuzz(device, first, count, args.seconds, only, args.keep_going, args.shrink_seconds)
    report(summary)
    if args.record:
        write(args.record, device, args.commit, summary)
    return 1 if summary["failures"] else 0


def fuzz(
    device: str,
    first: int,
    count: int | None,
    seconds: float,
    only: Sequence[str],
    keep_going: bool,
    shrink_seconds: float,
) -> dict[str, Any]:
    """What was run, and the failures. Prints each of them as it is found."""
    print(f"fuzz: on {device}, seeds from {first}", flush=True)
    rows: Counter[tuple[str, str, str]] = Counter()
    refused: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    begin = time.monotonic()
    seed = first
    while time.monotonic() < begin + seconds and (count is None or sum(rows.values()) < count):
        p = generate(seed, device)
        if p.op not in only:  # a seed's problem is the same whatever is looked for
            seed += 1
            continue
        outcome = run(p, device, refused)
        rows[p.op, p.algorithm, outcome] += 1
        if outcome in ("failed", "refused") and is_lost(device):  # which eager refuses then as well
            failures.append({"seed": seed, "problem": str(p), "message": "the GPU takes no more work"})
            print(f"\nfuzz: seed {seed}: the GPU takes no more work after {p}", *p.lines(device), sep="\n", flush=True)
            seed += 1
            break
        if outcome == "failed":
            failures.append({"seed": seed, **found(p, seed, device, shrink_seconds, len(failures) < MOST_FAILURES)})
            if not keep_going:
                seed += 1
                break
        seed += 1
    return {
        "first": first,
        "last": seed - 1,
        "problems": sum(rows.values()),
        "seconds": time.monotonic() - begin,
        "rows": [
            dict(zip(("op", "algorithm", "outcome", "problems"), (*k, n), strict=True)) for k, n in sorted(rows.items())
        ],
        "refused": dict(refused),
        "failures": failures,
    }


def run(p: Problem, device: str, refused: Counter[str]) -> str:
    """held, not covered, refused or failed."""
    try:
        return "held" if check(p, device) else "not covered"
    except Invalid as error:
        refused[str(error).partition("\n")[0][:120]] += 1
        return "refused"
    except Exception:  # of whatever kind: a finding as well
        return "failed"


def is_lost(device: str) -> bool:
    """Whether an access out of bounds has ended all work on the GPU, so that nothing can be tried again."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def found(p: Problem, seed: int, device: str, shrink_seconds: float, in_full: bool) -> dict[str, Any]:
    failure = failure_of(p, device)
    if failure is None:
        print(f"\nfuzz: seed {seed} failed once, and not when it ran again: {p}", flush=True)
        return {"problem": str(p), "message": "failed once, and not when it ran again"}
    print(f"\nfuzz: seed {seed} failed: {failure}\n  {p}", flush=True)
    if not in_full:
        return {"problem": str(p), "message": str(failure)}
    smallest, then = shrunk(p, failure, device, shrink_seconds)
    lines = smallest.lines(device)
    print(f"fuzz: the smallest that fails: {then}", *(f"    {line}" for line in lines), sep="\n", flush=True)
    print(f"fuzz: again with: python -m fuzz --device {device} --seed {seed}", flush=True)
    return {"problem": str(p), "message": str(failure), "smallest": str(smallest), "smallest_message": str(then)}


def report(summary: dict[str, Any]) -> None:
    outcomes = ("held", "not covered", "refused", "failed")
    table: dict[tuple[str, str], Counter[str]] = {}
    for row in summary["rows"]:
        table.setdefault((row["op"], row["algorithm"]), Counter())[row["outcome"]] += row["problems"]
    print(f"\n{'op':22}{'algorithm':12}" + "".join(f"{name:>13}" for name in outcomes))
    for (op, algorithm), counts in table.items():
        print(f"{op:22}{algorithm:12}" + "".join(f"{counts[name]:13}" for name in outcomes))
    for message, number in summary["refused"].items():
        print(f"refused {counted(number, 'time')}: {message}")
    problems, seconds = summary["problems"], summary["seconds"]
    print(
        f"fuzz: {counted(problems, 'problem')} in {seconds:.0f} s ({problems / max(seconds, 1e-9) * 60:.0f} a minute), "
        f"seeds {summary['first']} to {summary['last']}, {len(summary['failures'])} failed",
        flush=True,
    )


def describe(device: str, commit: str | None) -> dict[str, Any]:
    """What ran where, as the benchmarks' records have it."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from benchmarks import record

    return record.describe("cuda" if device == "cuda" else "cpu", commit)


def write(path: Path, device: str, commit: str | None, summary: dict[str, Any]) -> None:
    """As the benchmarks' records: a line that says what ran where, then a line a row."""
    header = describe(device, commit) | {"fuzzed": device}
    header |= {k: v for k, v in summary.items() if k not in ("rows", "failures")}
    rows = [{"part": "problems", **row} for row in summary["rows"]]
    rows += [{"part": "failures", **row} for row in summary["failures"]]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (header, *rows)))


if __name__ == "__main__":
    sys.exit(main())
