"""What a run says of steps, forward and backward: problem 73, the layers of networks, and what those come to."""

from __future__ import annotations

import math

from fused_conv_bn._count import counted

from .layers import EAGER_COMPILED, OURS_COMPILED
from .record import Report, Row
from .report import Table, table
from .report_conv import SLOWER, geomean, network_us, ratio, us

BOTH_COMPILED = f"{EAGER_COMPILED}/{OURS_COMPILED}"
NAMES = ("ours", "eager", EAGER_COMPILED, OURS_COMPILED)
RATIOS = ("eager/ours", f"{EAGER_COMPILED}/ours", BOTH_COMPILED)
HEADER = ["case", *(f"{name} us" for name in NAMES), *RATIOS, "ours MB", "eager MB", "error, x eager's"]


def rows_of(report: Report, in_network: bool) -> list[Row]:
    """Records from before steps had a part of their own have problem 73's in the rows of grad_mode."""
    if "steps" in report or in_network:
        return [row for row in report.get("steps", []) if row["in_network"] == in_network]
    return [
        {**step, "case": f"{row['case']}, {what}", "missing": {}}
        for row in report.get("grad_mode", [])
        for what, step in row.get("step", {}).items()
    ]


def error_ratio(row: Row) -> str:
    """The largest, over the gradients, of ours' error to eager's."""
    found = [of["ours"] / (of["eager"] or math.inf) for of in row.get("errors", {}).values()]
    return f"{max(found):.2f}" if found else "n/a"


def cells(row: Row) -> list[str]:
    peaks = [f"{row['peak_mb'][name]:.0f}" if name in row["peak_mb"] else "n/a" for name in ("ours", "eager")]
    factors = [ratio(row, name) for name in RATIOS]
    return [row["case"], *(us(row, name) for name in NAMES), *factors, *peaks, error_ratio(row)]


def steps(report: Report) -> Table:
    return HEADER, [cells(row) for row in rows_of(report, in_network=False)]


def layer_steps(report: Report) -> Table:
    return HEADER, [cells(row) for row in rows_of(report, in_network=True)]


def step_means(report: Report) -> Table:
    """Of each group: geometric means (of so many rows where not of all), the slowest layer, and all layers' times."""
    groups: dict[str, list[Row]] = {}
    for row in report.get("steps", []):
        groups.setdefault(row["group"], []).append(row)
    lines = []
    for group, rows in groups.items():
        means = []
        for name in RATIOS:
            found = [row[name] for row in rows if name in row]
            some = f" ({len(found)})" if len(found) < len(rows) else ""
            means.append(f"{geomean(found):.2f}{some}" if found else "n/a")
        slowest = min(row["eager/ours"] for row in rows)
        sums = [f"{network_us(rows, name):.0f}" if rows[0]["in_network"] else "" for name in ("ours", "eager")]
        lines.append([group, str(len(rows)), *means, f"{slowest:.2f}", *sums])
    header = ["geometric mean", "rows", *RATIOS, "least eager/ours", "all layers, ours us", "eager us"]
    return header, lines


def worst_step(report: Report) -> str:
    """Whether any step takes longer than eager's."""
    rows = report["steps"]
    worst = min(rows, key=lambda row: float(row["eager/ours"]))
    factor, slower = 1 / worst["eager/ours"], sum(row["eager/ours"] < 1 / SLOWER for row in rows)
    many = f"{slower or 'None'} of {counted(len(rows), 'step')} {'take' if slower > 1 else 'takes'}"
    return f"{many} more than {SLOWER} times eager's; the largest factor is {factor:.3f}, {worst['case']}."


def print_tables(report: Report) -> None:
    if "steps" not in report:
        return
    for what, rows in (("problem 73", steps(report)), ("layers in training mode", layer_steps(report))):
        if rows[1]:
            print(f"steps, forward and backward (MB: peak): {what}\n{table(*rows)}\n")
    print(f"{table(*step_means(report))}\n\n{worst_step(report)}\n")
