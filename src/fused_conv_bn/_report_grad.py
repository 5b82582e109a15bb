"""What bench.py says of problem 73 with grad mode on."""

from __future__ import annotations

from ._report import Report, table
from ._report_conv import ratio, us


def print_tables(report: Report) -> None:
    rows = report.get("grad_mode", {"rows": []})["rows"]
    if not rows:
        return
    names, ratios = ["copy", "ours", "no_grad", "eager", "compile"], ["ours/no_grad", "eager/ours", "compile/ours"]
    lines = [
        [row["case"], row["grad_fn"], *(us(row, name) for name in names), *(ratio(row, name) for name in ratios)]
        for row in rows
    ]
    header = ["case", "node", *(f"{name} us" for name in names), *ratios]
    print(f"grad mode on, forward alone (no_grad: ours under it)\n{table(header, lines)}\n")

    timed = [(row["case"], row["kernelbench"]) for row in rows if "kernelbench" in row]
    names, ratios = ["ours", "eager", "compile"], ["eager/ours", "compile/ours"]
    lines = []
    for case, found in timed:
        times = [f"{found['us'][name]['mean']:.1f}" if name in found["us"] else "n/a" for name in names]
        lines.append([case, *times, *(ratio(found, name) for name in ratios)])
    print(f"the same by KernelBench's rules\n{table(['case', *(f'{name} us' for name in names), *ratios], lines)}\n")

    lines = []
    for row in rows:
        for what, step in row["step"].items():
            peak_mb = step["peak_mb"]
            peaks = [f"{peak_mb[name]:.0f}" if name in peak_mb else "n/a" for name in ("ours", "eager")]
            times = [us(step, name) for name in ("ours", "eager")]
            lines.append([f"{row['case']}, {what}", *times, ratio(step, "eager/ours"), *peaks])
    header = ["case", "ours us", "eager us", "eager/ours", "ours MB", "eager MB"]
    print(f"forward and backward, without or with x's gradient (MB: peak)\n{table(header, lines)}\n")
