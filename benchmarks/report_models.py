"""What a run says of whole models."""

from __future__ import annotations

from .models import LEFT_OUT, OURS
from .record import Report, Row
from .report import Table, table
from .report_conv import us

NAMES = [*("eager", "eager graphed", "cudnn graphed", "jax", "fused", "graphed", "frozen")]
NAMES += ["compile", "compile freezing", "compile graphed", "autotune graphed"]


def print_tables(report: Report) -> None:
    if "models" not in report:
        return
    print(f"whole models\n{table(*models(report))}\n")
    for row in report["models"]:
        for name, why in row["missing"].items():
            print(f"{row['case']}: n/a for {name}: {why}")
    print()


def cell(row: Row, name: str) -> str:
    return "left out" if row["missing"].get(name) == LEFT_OUT else us(row, name)


def models(report: Report) -> Table:
    rows = []
    for row in report["models"]:
        best = next(name for name in OURS if name in row["us"])
        times = {name: of["median"] for name, of in row["us"].items()}
        speed_up = f"{times['eager'] / times[best]:.2f}" if "eager" in times else "n/a"
        ahead = f"{row['best rival/ours']:.2f}" if "best rival/ours" in row else "n/a"
        error = max(of for name, of in row["errors"].items() if name in OURS) / row["errors"]["eager"]
        cells = [row["case"], *(cell(row, name) for name in NAMES), speed_up, ahead, row.get("best rival", "n/a")]
        rows.append([*cells, f"{error:.2f}", str(sum(row["groups"].values()))])
    header = ["case", *(f"{name} us" for name in NAMES), "speed-up", "best rival / ours", "best rival"]
    return [*header, "error, x eager's", "groups"], rows
