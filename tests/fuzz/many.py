"""``python -m fuzz.many``: the fuzzer in several processes at a time, and under one of compute-sanitizer's tools if it is named.

Each process has seeds of its own, and goes on behind a failure. A tool but racecheck looks at this package's kernels alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_conv_bn._count import counted

from .__main__ import report, write
from .generate import DEVICES

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 66
"""A tool's exit status when it has found something, which no process has by itself."""
FIRST_PORT = 49152
MOST_LINES = 80  # of a process's findings
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fuzz.many", description=__doc__.partition("\n")[0])
    made.add_argument("--device", choices=DEVICES, default="cuda", help="default: cuda")
    made.add_argument("--count", type=int, metavar="N", default=100_000, help="problems (default: 100000)")
    made.add_argument("--seconds", type=float, default=3600.0, help="at most so long (default: 3600)")
    made.add_argument("--processes", type=int, metavar="N", default=os.cpu_count() or 1, help="default: all processors")
    made.add_argument("--first", type=int, metavar="N", help="the first seed (default: from the clock)")
    made.add_argument("--only", metavar="WORD", help="ops with this in their name")
    made.add_argument("--sanitizer", choices=TOOLS, metavar="TOOL", help=f"of compute-sanitizer: {', '.join(TOOLS)}")
    made.add_argument("--record", type=Path, metavar="FILE", help="write the summary to FILE as JSON")
    made.add_argument("--commit", help="recorded (default: what git says)")
    return made


def sanitizer(tool: str, index: int) -> list[str]:
    options = ["--tool", tool, "--port", str(FIRST_PORT + 16 * index)]
    # Between kernels that racecheck watches, those of cuDNN that it does not end in illegal accesses (CUDA 13.0).
    options += [] if tool == "racecheck" else ["--kernel-name", "kns=fused_conv_bn"]
    return ["compute-sanitizer", *options, "--error-exitcode", str(FOUND), "--print-limit", "20"]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.sanitizer and shutil.which("compute-sanitizer") is None:
        print("fuzz.many: --sanitizer needs compute-sanitizer, which a CUDA toolkit brings", file=sys.stderr)
        return 2
    processes = max(1, min(args.processes, args.count))
    first = args.first if args.first is not None else int(time.time()) << 20
    share = -(-args.count // processes)
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if args.sanitizer in ("memcheck", "initcheck"):  # what PyTorch keeps of memory looks alive, and written
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(processes):
            command = sanitizer(args.sanitizer, i) if args.sanitizer else []
            command += [sys.executable, "-m", "fuzz", "--device", args.device, "--keep-going", "--commit", "none"]
            # Seeds lie close: an op's share of them is looked for among all.
            command += ["--first", str(first + i * 16 * share), "--count", str(share), "--seconds", str(args.seconds)]
            command += ["--record", f"{folder}/{i}.jsonl"] + (["--only", args.only] if args.only else [])
            log = open(f"{folder}/{i}.log", "w")  # noqa: SIM115
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running.append((process, log))
        statuses = wait(running, begin)
        logs = [Path(f"{folder}/{i}.log").read_text() for i in range(processes)]
        records = [read(Path(f"{folder}/{i}.jsonl")) for i in range(processes)]
    summary = merged([r for r in records if r is not None])
    summary |= {"seconds": time.monotonic() - begin, "processes": processes}
    if args.sanitizer:
        found = [line for log in logs for line in SUMMARY.findall(log)]
        summary |= {"sanitizer": args.sanitizer, "findings": dict(Counter(found))}
        print(f"fuzz.many: {args.sanitizer}: " + "; ".join(f"{n} x {line}" for line, n in Counter(found).items()))
    lost = sum(r is None for r in records) + sum(bool(args.sanitizer) and not SUMMARY.search(log) for log in logs)
    bad = any(status == FOUND for status in statuses) or lost > 0
    for status, log, record in zip(statuses, logs, records, strict=True):
        if record is None or (status == FOUND and args.sanitizer):
            found = [line for line in log.splitlines() if line.startswith("=====")]
            print(f"--- a process ended with {status}:", *(found[:MOST_LINES] or [log[-4000:]]), sep="\n")
    for failure in summary["failures"]:
        print(f"--- seed {failure['seed']}: {failure['message']}\n    {failure['problem']}")
    report(summary)
    if args.record:
        write(args.record, args.device, args.commit, summary | {"lost_processes": lost})
    return 1 if bad or summary["failures"] else 0


def wait(running: list[tuple[subprocess.Popen[bytes], Any]], begin: float) -> list[int]:
    """Their exit statuses. Says every few seconds how many still run."""
    said = begin
    while any(process.poll() is None for process, _ in running):
        time.sleep(0.2)
        if time.monotonic() > said + 5:
            said = time.monotonic()
            left = sum(process.poll() is None for process, _ in running)
            print(f"fuzz.many: {counted(left, 'process', 'processes')} at work, {said - begin:.0f} s", flush=True)
    for _, log in running:
        log.close()
    return [process.returncode for process, _ in running]


def read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    parts: dict[str, list[dict[str, Any]]] = {"problems": [], "failures": []}
    for row in rows:
        parts[row.pop("part")].append(row)
    return header | {"rows": parts["problems"], "failures": parts["failures"]}


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    rows: Counter[tuple[str, str, str]] = Counter()
    refused: Counter[str] = Counter()
    for r in records:
        for row in r["rows"]:
            rows[row["op"], row["algorithm"], row["outcome"]] += row["problems"]
        refused.update(r["refused"])
    return {
        "first": min((r["first"] for r in records), default=0),
        "last": max((r["last"] for r in records), default=0),
        "problems": sum(rows.values()),
        "rows": [
            dict(zip(("op", "algorithm", "outcome", "problems"), (*k, n), strict=True)) for k, n in sorted(rows.items())
        ],
        "refused": dict(refused),
        "failures": [failure for r in records for failure in r["failures"]],
    }


if __name__ == "__main__":
    sys.exit(main())
