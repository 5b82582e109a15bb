"""What a run says of whole models."""

from __future__ import annotations

from .record import Report
from .report import Table, table
from .report_conv import us

NAMES = ("eager", "eager graphed", "fused", "graphed", "frozen", "compile", "compile freezing")


def print_tables(report: Report) -> None:
    if "models" in report:
        print(f"whole models\n{table(*models(report))}\n")


def models(report: Report) -> Table:
    rows = []
    for row in report["models"]:
        best = "graphed" if "graphed" in row["us"] else "frozen"
        worst = max(error for name, error in row["errors"].items() if not name.startswith("eager"))
        cells = [row["case"], *(us(row, name) for name in NAMES)]
        speed_up = f"{row['us']['eager']['median'] / row['us'][best]['median']:.2f}"
        groups = sum(row["groups"].values())
        rows.append([*cells, speed_up, f"{worst / row['errors']['eager']:.2f}", str(groups)])
    return ["case", *(f"{name} us" for name in NAMES), "speed-up", "error, x eager's", "groups"], rows
