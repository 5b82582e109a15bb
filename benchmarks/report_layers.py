"""What a run says of the networks' layers: a table a dtype and batch, geometric means by network, the worst rows."""

from __future__ import annotations

from collections.abc import Iterator

from fused_conv_bn._count import counted

from .record import Report, Row
from .report import Table, table
from .report_conv import SLOWER, floor_us, geomean, mean_ratio, ratio, us

NAMES = ("ours", "aten", "eager", "cudnn", "conv")
RATIOS = ("eager", "aten", "cudnn", "best rival", "conv")
WORST = 10
ALL = "all, each layer once"


def times_best(row: Row) -> float:
    """How many times the best rival's time ours takes."""
    return 1 / float(row["best rival/ours"])


def batches(report: Report) -> dict[tuple[str, int], list[Row]]:
    """The rows of each dtype and batch."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in report.get("layers", []):
        found.setdefault((row["group"], row["batch"]), []).append(row)
    return found


def layer_table(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        networks = ", ".join(f"{count} {name}" for name, count in row["networks"].items())
        cells = [row["case"], networks, row["algorithm"] or "CPU", f"{floor_us(row):.1f}"]
        cells += [f"{row['share_of_floor_percent']:.0f}", *(us(row, name) for name in NAMES)]
        lines.append([*cells, *(ratio(row, f"{name}/ours") for name in ("eager", "aten", "best rival"))])
    header = ["case", "networks", "algorithm", "floor us", "share %", *(f"{name} us" for name in NAMES)]
    return [*header, "eager/ours", "aten/ours", "best rival/ours"], lines


def of_networks(rows: list[Row]) -> Iterator[tuple[str, list[Row], list[int]]]:
    """Each network with its rows, and how often it has them; at the end all rows."""
    for name in dict.fromkeys(name for row in rows for name in row["networks"]):
        own = [row for row in rows if name in row["networks"]]
        yield name, own, [row["networks"][name] for row in own]
    yield ALL, rows, []


def means(report: Report) -> Table:
    """Geometric means by network; the times of all its layers, each as often as it has it."""
    of_each = report["settings"].get("network_layers", {})
    lines = []
    for (group, batch), rows in batches(report).items():
        for name, own, counts in of_networks(rows):
            share = geomean([row["share_of_floor_percent"] for row in own])
            slower = sum(times_best(row) > SLOWER for row in own)
            sums = ["n/a", "n/a", "n/a"]
            if len(own) == of_each.get(name):  # else there are rows of some of its layers alone
                of_best = [row["us"][row["best rival"]]["median"] for row in own]
                of_ours = [row["us"]["ours"]["median"] for row in own]
                columns = map(floor_us, own), of_ours, of_best
                sums = [f"{sum(n * t for n, t in zip(counts, column, strict=True)):.0f}" for column in columns]
            cells = [name, group, str(batch), str(len(own)), f"{share:.0f}"]
            lines.append([*cells, *(mean_ratio(own, rival) for rival in RATIOS), str(slower), *sums])
    header = ["geometric means (of so many rows)", "dtype, layout", "batch", "rows", "share of floor %"]
    header += [*(f"{name}/ours" for name in RATIOS), f"rows over {SLOWER} x the best rival"]
    return [*header, "all layers, floor us", "ours us", "best rivals us"], lines


def worst(report: Report) -> Table:
    """The rows whose best rival is the furthest ahead."""
    lines = []
    for row in sorted(report.get("layers", []), key=times_best, reverse=True)[:WORST]:
        names, algorithm = ", ".join(row["networks"]), row["algorithm"] or "CPU"
        times = [f"{floor_us(row):.1f}", us(row, "ours"), us(row, row["best rival"])]
        lines.append([row["case"], names, algorithm, *times, row["best rival"], f"{times_best(row):.2f}"])
    header = ["the worst", "networks", "algorithm", "floor us", "ours us", "best rival us", "best rival"]
    return [*header, "ours / best rival"], lines


def slower(report: Report) -> str:
    """How many rows are behind, and what there is no row of."""
    rows = report.get("layers", [])
    out = [f"{count} of {name}" for name, count in report.get("layers_left_out", {}).items()]
    left_out = f" Left out by the limit of time: {', '.join(out)}." if out else ""
    if not rows:
        return f"No layer was measured.{left_out}"
    count, largest = sum(times_best(row) > SLOWER for row in rows), max(rows, key=times_best)
    found = f"{count} of {counted(len(rows), 'row')} {'takes' if count == 1 else 'take'} more than {SLOWER} times "
    found += "the best rival's time; the largest factor is "
    found += f"{times_best(largest):.3f}, {largest['case']}."
    return found + left_out


def print_tables(report: Report) -> None:
    if "layers_left_out" not in report:
        return
    rates = report["rates"]
    for (group, batch), rows in batches(report).items():
        print(f"networks' layers, {group}, batch {batch}\n{table(*layer_table(rows))}\n")
    if report.get("layers"):
        print(f"networks' layers; floor by the copy's {rates['copy_gb_per_s']:.0f} GB/s\n{table(*means(report))}\n")
        print(f"{table(*worst(report))}\n")
    print(f"{slower(report)}\n")
