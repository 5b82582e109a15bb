"""What a run says of KernelBench's problems."""

from __future__ import annotations

from .kernelbench import geometric_mean
from .models import LEFT_OUT
from .record import Report
from .report import Table, table
from .report_conv import ratio, us

NAMES = ["eager", "compile", "fused"]
RATIOS = ["eager/fused", "compile/fused"]


def print_tables(report: Report) -> None:
    if "kernelbench" not in report:
        return
    print(f"KernelBench's problems with a BatchNorm\n{table(*problems(report))}\n")
    print(f"all of them\n{table(*problem_means(report))}\n")
    for row in report["kernelbench"]:
        for name, why in row["missing"].items():
            if why != LEFT_OUT:
                print(f"{row['case']}: n/a for {name}: {why}")


def problems(report: Report) -> Table:
    rows = []
    for row in report["kernelbench"]:
        errors, judged = row["errors"], row["judged"]
        error = f"{errors['ours'] / errors['eager']:.2f}" if errors["eager"] else f"{errors['ours']:.1g}"
        cells = [row["case"], *(us(row, name) for name in NAMES), *(ratio(row, name) for name in RATIOS)]
        rows.append(
            [*cells, error, f"{judged['ours']:.2g}", f"{judged['truth']:.2g}", str(sum(row["groups"].values()))]
        )
    header = ["case", *(f"{name} us" for name in NAMES), *RATIOS]
    return [*header, "error, x eager's", "difference, x 1e-4", "eager's own, x 1e-4", "groups"], rows


def problem_means(report: Report) -> Table:
    """Geometric means, how many are slower than eager, and of how many torch.compile is behind."""
    rows = []
    for train in (True, False):
        of_mode = [row for row in report["kernelbench"] if row["train"] is train]
        if not of_mode:
            continue
        means, behind = [], []
        for name in RATIOS:
            values = [row[name] for row in of_mode if name in row]
            means.append(f"{geometric_mean(values):.2f}" if values else "n/a")
            behind.append(f"{sum(v >= 1 for v in values)} of {len(values)}" if values else "n/a")
        agree = sum(row["judged"]["ours"] <= 1 for row in of_mode)
        rows.append(["train" if train else "eval", *means, *behind, f"{agree} of {len(of_mode)}"])
    return ["mode", *RATIOS, "eager is no faster", "compile is no faster", "within 1e-4 of eager"], rows
