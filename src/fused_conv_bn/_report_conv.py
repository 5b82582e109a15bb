"""What bench.py says of the convolutions, in evaluation ("conv"), in training mode ("train") and with every activation
("activations"): a table a group, geometric means, the rows that are too slow, the README's tables, the roofline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ._report import Charts, Report, Row, legend_below, markdown, short, table

# ---- tables ----------------------------------------------------------------------------------------------------------

RATIOS = ["eager", "best compile", "cudnn", "best rival", "conv", "aten", "pair"]
SLOWER = 1.03  # times what it is held to: such a row has a line of its own
ERRORS = {"norm": "error, x eager's", "element": "by element"}
ERRORS |= {name: name for name in ("running_mean", "running_var")}  # those of the rows in training mode


def groups(report: Report, *parts: str) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for part in parts:
        for row in report.get(part, {"rows": []})["rows"]:
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
    rates = report["conv" if "conv" in report else "train"]["rates"]
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
    rows = [row for part in ("conv", "train", "activations") for row in report.get(part, {"rows": []})["rows"]]
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


# ---- README ----------------------------------------------------------------------------------------------------------

COLUMNS = {"copy": "copy of y", "ours": "**ours**", "eager": "eager", "best compile": "torch.compile"}
COLUMNS |= {"cudnn": "cuDNN fused", "conv": "convolution alone"}
MEANS = {"eager": "eager", "best compile": "torch.compile", "cudnn": "cuDNN fused", "best rival": "best of these"}
MEANS |= {"conv": "convolution alone", "aten": "convolution and one pass"}
TRAIN_COLUMNS = {name: column for name, column in COLUMNS.items() if name != "cudnn"}
TRAIN_MEANS = {name: column for name, column in MEANS.items() if name != "cudnn"}
TRAIN_MEANS |= {"aten": "convolution, one read and one pass"}


def markdown_row(row: Row, columns: Iterable[str]) -> list[str]:
    times = {name: stats["median"] for name, stats in row["us"].items()}
    if "best compile/ours" in row:
        times["best compile"] = row["best compile/ours"] * times["ours"]
    cells = {name: f"{times[name]:.0f}" if name in times else "" for name in columns}
    cells["ours"] = f"**{cells['ours']}**"
    return [row["case"], f"{floor_us(row):.0f}", *cells.values()]


def section(report: Report, part: str) -> str:
    """A row for each layer that is not of a network, and on a GPU the geometric means of all groups."""
    columns, ratios = (TRAIN_COLUMNS, TRAIN_MEANS) if part == "train" else (COLUMNS, MEANS)
    lines, means = [], []
    for group, rows in groups(report, part).items():
        is_network = any(row["count"] > 1 for row in rows)
        lines += [] if is_network else [markdown_row(row, columns) for row in rows]
        means.append([group, str(len(rows)), *(mean_ratio(rows, name) for name in ratios), f"{slowest(rows):.2f}"])
    tables = [markdown(["us", "floor", *columns.values()], lines)]
    if report["device"]["kind"] == "cuda":
        tables.append(markdown(["speed-up, geometric mean", "layers", *ratios.values(), "slowest layer"], means))
    return "\n\n".join(tables)


# ---- roofline --------------------------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
PANELS = {"float16 channels_last": ("float16", "channels_last"), "float32 NCHW": ("float32", "nchw")}


def draw_roofline(report: Report, plt: Any) -> Any:
    """Each layer by its FLOP per byte: what it reaches with ours and with the best rival, below what the device can."""
    rates = report["conv"]["rates"]
    names = list(dict.fromkeys(group.split(",")[0] for group in groups(report, "conv")))
    colours = dict(zip(names, COLOURS, strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.8), sharey=True)
    for axes, (title, kind) in zip(panels, PANELS.items(), strict=True):
        peak = rates["matrix_tflop_per_s"].get(kind[0])
        rows = [
            row for row in report["conv"]["rows"] if (row["dtype"], row["layout"]) == kind and not row["allow_tf32"]
        ]
        for row in rows:
            intensity = row["flop"] / row["bytes"]
            ours = row["flop"] / row["us"]["ours"]["median"] / 1e6
            rival = ours / row["best rival/ours"]
            group = row["group"].split(",")[0]
            axes.plot([intensity] * 2, [ours, rival], color=colours[group], linewidth=0.7, zorder=1)
            axes.plot(intensity, rival, "o", markerfacecolor="white", color=colours[group], markersize=4, zorder=2)
            axes.plot(intensity, ours, "o", color=colours[group], markersize=5, label=group, zorder=3)
        axes.plot([], [], "o", markerfacecolor="white", color="#777777", markersize=4, label="the best rival")
        if peak:
            intensities = [1.0, 1e3 * peak / rates["copy_gb_per_s"], 2048.0]
            roof = [min(peak, i * rates["copy_gb_per_s"] / 1e3) for i in intensities]
            axes.plot(intensities, roof, color="#222222", linewidth=1.2, label="copy rate, matrix rate", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda number, _: f"{number:g}")
        axes.grid(True, color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("FLOP per byte that has to be moved")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("TFLOP/s")
    legend_below(figure, panels)
    figure.suptitle(f"Convolutions, fused_conv_bn and the best rival, on {report['device']['name']}", fontsize=11)
    return figure


CHARTS: Charts = {"conv_roofline.png": ("conv", draw_roofline)}
