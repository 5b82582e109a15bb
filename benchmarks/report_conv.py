"""What a run says of the convolutions, in evaluation ("conv"), in training mode ("train") and with every activation
("activations"): a table a group, geometric means, the rows that are too slow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .record import Report, Row
from .report import short, table

RATIOS = ["eager", "best compile", "cudnn", "folded", "best rival", "conv", "aten", "pair"]
SLOWER = 1.03  # times what it is held to: such a row has a line of its own
ERRORS = {"norm": "error, x eager's", "element": "by element"}
ERRORS |= {name: name for name in ("running_mean", "running_var")}  # those of the rows in training mode


def groups(report: Report, *parts: str) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for part in parts:
        for row in report.get(part, []):
            rows.setdefault(row["group"], []).append(row)
    return rows


def floor_us(row: Row) -> float:
    return float(max(row["floor_us"].values()))


def us(row: Row, name: str) -> str:
    return f"{row['us'][name]['median']:.1f}" if name in row["us"] else "n/a"


def ratio(row: Row, name: str) -> str:
    return f"{row[name]:.2f}" if name in row else "n/a"


def group_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["us"] if name != "copy"))
    ratios = [f"{name}/ours" for name in RATIOS if any(f"{name}/ours" in row for row in rows)]
    header = ["case", "algorithm", "floor us", "share %", "copy us", "ours/copy", *(f"{name} us" for name in names)]
    measures = [measure for measure in ERRORS if measure in rows[0]["errors"]["ours"]]
    header += [*ratios, *(ERRORS[measure] for measure in measures)]
    lines = []
    for row in rows:
        floor = [f"{floor_us(row):.1f}", f"{row['share_of_floor_percent']:.0f}"]
        times = [us(row, "copy"), ratio(row, "ours/copy"), *(us(row, name) for name in names)]
        errors = [row["errors"]["ours"][m] / (row["errors"]["eager"][m] or math.inf) for m in measures]
        factors = [*(ratio(row, name) for name in ratios), *(f"{error:.2f}" for error in errors)]
        lines.append([row["case"], row["algorithm"] or "CPU", *floor, *times, *factors])
    return table(header, lines)


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def slowest(rows: list[Row]) -> float:
    """The least of the ratios of the better one of eager and PyTorch's convolution with one pass behind it to ours."""
    return float(min(row[f"{name}/ours"] for row in rows for name in ("eager", "aten") if f"{name}/ours" in row))


def mean_ratio(rows: list[Row], name: str) -> str:
    """The geometric mean, and of how many rows where not of all."""
    values = [row[f"{name}/ours"] for row in rows if f"{name}/ours" in row]
    if not values:
        return "n/a"
    return f"{geomean(values):.2f}" + (f" ({len(values)})" if len(values) < len(rows) else "")


def network_us(rows: list[Row], name: str) -> float:
    """Of all layers, each as often as the network has it."""
    return float(sum(row["count"] * row["us"][name]["median"] for row in rows))


def print_tables(report: Report) -> None:
    print_groups(report)
    print_activations(report)
    print_slower(report)


def print_groups(report: Report) -> None:
    every = groups(report, "conv", "train")
    if not every:
        return
    rates = report["rates"]
    matrix = ", ".join(f"{name} {short(rate)}" for name, rate in rates["matrix_tflop_per_s"].items())
    print(f"convolutions; copy rate {rates['copy_gb_per_s']:.0f} GB/s, matrix rates in TFLOP/s: {matrix}\n")
    for group, rows in every.items():
        print(f"{group}\n{group_table(rows)}\n")
    lines = []
    for group, rows in every.items():
        share = geomean([row["share_of_floor_percent"] for row in rows])
        means = [mean_ratio(rows, name) for name in RATIOS]
        sums = [f"{network_us(rows, name):.0f}" for name in ("ours", "eager")]
        lines.append([group, str(len(rows)), f"{share:.0f}", *means, f"{slowest(rows):.2f}", *sums])
    header = ["geometric means (of so many rows)", "rows", "share of floor %", *(f"{name}/ours" for name in RATIOS)]
    header += ["least of eager, aten/ours", "all layers, ours us", "eager us"]
    print(table(header, lines), end="\n\n")


def print_activations(report: Report) -> None:
    """A line a layer: its times by activation, then their ratios to relu's and to one pass behind the convolution."""
    layers: dict[str, list[Row]] = {}
    for row in groups(report, "activations").get("activations", []):
        layer = row["case"].replace(f" {row['activation']} batch ", " batch ")
        layers.setdefault(layer, []).append(row)
    if not layers:
        return
    names = list(dict.fromkeys(row["activation"] for rows in layers.values() for row in rows))
    for title, cell in (
        ("us, ours", lambda row: us(row, "ours")),
        ("ours / ours with relu", lambda row: ratio(row, "ours/relu")),
        ("us, the bare convolution with one pass behind it", lambda row: us(row, "aten")),
        ("ours / the bare convolution with one pass behind it", lambda row: ratio(row, "ours/aten")),
    ):
        if all(cell(row) == "n/a" for rows in layers.values() for row in rows):
            continue
        lines = []
        for layer, rows in layers.items():
            cells = {row["activation"]: cell(row) for row in rows}
            lines.append([layer, rows[0]["algorithm"] or "CPU", *(cells.get(name, "n/a") for name in names)])
        print(f"activations: {title}\n{table(['case', 'algorithm', *names], lines)}\n")


def slower_rows(rows: Iterable[Row], rival: str, ours: str = "ours") -> list[tuple[float, Row]]:
    """Those with both, by how many times as long ours takes; the worst first."""
    found = []
    for row in rows:
        if rival in row["us"] and ours in row["us"]:
            found.append((row["us"][ours]["median"] / row["us"][rival]["median"], row))
    return sorted(found, key=lambda pair: -pair[0])


def print_slower(report: Report) -> None:
    rows = [row for part in ("conv", "train", "activations") for row in report.get(part, [])]
    for rival, what in (
        ("aten", "the bare convolution with one pass behind it"),
        ("pair", "conv_scale_shift with a fold made before"),
    ):
        found = slower_rows(rows, rival)
        lines = [
            [row["case"], row["algorithm"] or "CPU", us(row, "ours"), us(row, rival), f"{factor:.2f}"]
            for factor, row in found
            if factor > SLOWER
        ]
        if not found:
            continue
        worst = f"the largest of {len(found)} is {found[0][0]:.3f}, {found[0][1]['case']}"
        if lines:
            header = ["case", "algorithm", "ours us", f"{rival} us", f"ours/{rival}"]
            print(f"slower than {SLOWER} times {what}; {worst}\n{table(header, lines)}\n")
        else:
            print(f"No row is slower than {SLOWER} times {what}; {worst}.\n")
