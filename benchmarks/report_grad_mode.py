"""What a run says of problem 73 with grad mode on."""

from __future__ import annotations

from .record import Report
from .report import Table, table
from .report_conv import ratio, us


def print_tables(report: Report) -> None:
    if "grad_mode" in report:
        print(f"grad mode on, forward alone (no_grad: ours under it)\n{table(*forward(report))}\n")
        print(f"the same by KernelBench's rules\n{table(*kernelbench(report))}\n")


def forward(report: Report) -> Table:
    names, ratios = ["copy", "ours", "no_grad", "eager", "compile"], ["ours/no_grad", "eager/ours", "compile/ours"]
    rows = [
        [row["case"], row["grad_fn"], *(us(row, name) for name in names), *(ratio(row, name) for name in ratios)]
        for row in report["grad_mode"]
    ]
    return ["case", "node", *(f"{name} us" for name in names), *ratios], rows


def kernelbench(report: Report) -> Table:
    names, ratios = ["ours", "eager", "compile"], ["eager/ours", "compile/ours"]
    rows = []
    for row in report["grad_mode"]:
        if found := row.get("kernelbench"):
            times = [f"{found['us'][name]['mean']:.1f}" if name in found["us"] else "n/a" for name in names]
            rows.append([row["case"], *times, *(ratio(found, name) for name in ratios)])
    return ["case", *(f"{name} us" for name in names), *ratios], rows
