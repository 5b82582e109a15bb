"""The charts of a run: bn_scale's times and share of the copy's rate by size, the convolutions and the
networks' layers below their roofline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .networks import NETWORKS
from .record import Report, Row
from .report import LAYOUTS
from .report_conv import groups

# By name: label, colour, style. The later ones are drawn over the earlier ones.
RIVALS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "naive": ("naive kernel", "#E69F00", {"marker": "v"}),
    "eager": ("eager", "#D55E00", {"marker": "s"}),
    "ours": ("fused_conv_bn", "#0072B2", {"marker": "o"}),
    "copy": ("device copy", "#111111", {"linestyle": "--", "linewidth": 1.3}),
    "compile": ("torch.compile", "#007a5a", {"marker": "D", "markerfacecolor": "none", "linestyle": "none"}),
}
DTYPES = {"float32": "#0072B2", "float16": "#D55E00", "bfloat16": "#E69F00", "float64": "#009E73"}
OTHER_SHAPES = {256: ("P", "C = 256, 14x14"), 2048: ("X", "C = 2048, 7x7")}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
MORE_COLOURS = ["#56B4E9", "#8c564b", "#7f7f7f", "#9467bd", "#a6b81e"]
PANELS = {"float16 channels_last": ("float16", "channels_last"), "float32 NCHW": ("float32", "nchw")}


def series(report: Report, layout: str, dtype: str) -> list[Row]:
    rows = [r for r in report["bn_scale"] if (r["layout"], r["dtype"], r["main"]) == (layout, dtype, True)]
    return sorted(rows, key=lambda r: int(r["tensor_bytes"]))


def size_axis(axes: Any, report: Report) -> None:
    sizes = [r["tensor_bytes"] for r in report["bn_scale"]]
    ticks = {2**12: "4 KB", 2**16: "64 KB", 2**20: "1 MB", 2**24: "16 MB", 2**28: "256 MB"}
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    axes.set_xticks([t for t in ticks if min(sizes) / 1.6 <= t <= max(sizes) * 1.6])
    axes.set_xticklabels([label for t, label in ticks.items() if min(sizes) / 1.6 <= t <= max(sizes) * 1.6])
    axes.minorticks_off()
    axes.tick_params(labelsize=9)
    axes.set_xlabel("size of the tensor")
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_times(report: Report, plt: Any) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.6), sharey=True)
    for axes, (layout, title) in zip(panels, LAYOUTS.items(), strict=True):
        for dtype in DTYPES:
            rows = series(report, layout, dtype)
            if dtype != "float32" and rows:
                points = ([r["tensor_bytes"] for r in rows], [r["us"]["ours"]["median"] for r in rows])
                axes.plot(*points, color="#9cc9e6", linewidth=1, label="fused_conv_bn, other dtypes")
        for name, (label, colour, style) in RIVALS.items():
            rows = [r for r in series(report, layout, "float32") if name in r["us"]]
            if rows:
                points = ([r["tensor_bytes"] for r in rows], [r["us"][name]["median"] for r in rows])
                axes.plot(*points, **{"color": colour, "label": label, "markersize": 5, "linewidth": 1.6, **style})
        size_axis(axes, report)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda us, _: f"{us:g}")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("time of a call, µs")
    legend_below(figure, panels)
    figure.suptitle(f"bn_scale, float32, on {report['device']['name']}", fontsize=11)
    return figure


def draw_shares(report: Report, plt: Any) -> Any:
    shares = [r["share_of_copy_percent"] for r in report["bn_scale"]]
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.6), sharey=True)
    for axes, (layout, title) in zip(panels, LAYOUTS.items(), strict=True):
        axes.axhline(100, color="#222222", linestyle="--", linewidth=1.2, label="device copy")
        for dtype, colour in DTYPES.items():
            rows = series(report, layout, dtype)
            if rows:
                points = ([r["tensor_bytes"] for r in rows], [r["share_of_copy_percent"] for r in rows])
                axes.plot(*points, color=colour, marker="o", markersize=4, linewidth=1.6, label=dtype)
        others = [r for r in report["bn_scale"] if r["layout"] == layout and not r["main"]]
        for row in others:
            style = {"marker": OTHER_SHAPES[row["shape"][1]][0], "color": DTYPES[row["dtype"]], "linestyle": "none"}
            axes.plot(row["tensor_bytes"], row["share_of_copy_percent"], markersize=7, markeredgecolor="white", **style)
        for marker, label in OTHER_SHAPES.values() if others else ():
            axes.plot([], [], marker=marker, color="#777777", linestyle="none", markersize=7, label=label)
        size_axis(axes, report)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(max(0, min(shares) // 20 * 20 - 20), max(110, 1.05 * max(shares)))
    panels[0].set_ylabel("copy time / our time, %")
    legend_below(figure, panels)
    figure.suptitle(f"bn_scale's share of the copy's rate, on {report['device']['name']}", fontsize=11)
    return figure


def legend_below(figure: Any, panels: Any, share: float = 0.05) -> None:
    """One legend for all panels, each label once. ``share``: of the figure's height, that a line of it takes."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(len(entries), 4 if len(entries) > 6 else 3)
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=columns, frameon=False, fontsize=9)
    rows = -(-len(entries) // columns)
    figure.tight_layout(rect=(0, 0.01 + share * rows, 1, 0.97))


def draw_roofline(report: Report, plt: Any) -> Any:
    """Each layer by its FLOP per byte: what it reaches with ours and with the best rival, below what the device can."""
    names = list(dict.fromkeys(group.split(",")[0] for group in groups(report, "conv")))
    colours = dict(zip(names, COLOURS, strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.8), sharey=True)
    for axes, (title, kind) in zip(panels, PANELS.items(), strict=True):
        rows = [row for row in report["conv"] if (row["dtype"], row["layout"]) == kind and not row["allow_tf32"]]
        roofline(axes, report, rows, kind[0], lambda row: row["group"].split(",")[0], colours)
        axes.set_xlabel("FLOP per byte that has to be moved")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("TFLOP/s")
    legend_below(figure, panels)
    figure.suptitle(f"Convolutions, fused_conv_bn and the best rival, on {report['device']['name']}", fontsize=11)
    return figure


def draw_layers_roofline(report: Report, plt: Any) -> Any:
    """The same of the networks' layers in the record's first dtype, a panel a batch. A layer of several networks has
    the first one's colour."""
    group = report["layers"][0]["group"]
    batches = sorted({row["batch"] for row in report["layers"] if row["group"] == group})
    colours = dict(zip(NETWORKS, [*COLOURS, *MORE_COLOURS], strict=True))
    columns = min(2, len(batches))
    lines = -(-len(batches) // columns)
    shape = {"figsize": (8, 1.6 + 3.4 * lines), "sharex": True, "sharey": True, "squeeze": False}
    figure, panels = plt.subplots(lines, columns, **shape)
    for axes in panels.flat[len(batches) :]:
        axes.set_visible(False)
    kind = "TF32" if "TF32" in group else group.split()[0]
    for axes, batch in zip(panels.flat, batches, strict=False):
        rows = [row for row in report["layers"] if (row["group"], row["batch"]) == (group, batch)]
        roofline(axes, report, rows, kind, lambda row: next(iter(row["networks"])), colours)
        axes.set_title(f"batch {batch}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("FLOP per byte that has to be moved")
    for axes in panels[:, 0]:
        axes.set_ylabel("TFLOP/s")
    legend_below(figure, panels.flat, share=0.24 / figure.get_figheight())
    name = report["device"]["name"]
    figure.suptitle(f"Layers of ten networks, {group}, fused_conv_bn and the best rival, on {name}", fontsize=11)
    return figure


def roofline(
    axes: Any, report: Report, rows: list[Row], kind: str, label: Callable[[Row], str], colours: dict[str, str]
) -> None:
    """``kind``: whose matrix rate is the roof."""
    rates = report["rates"]
    peak = rates["matrix_tflop_per_s"].get(kind)
    for row in rows:
        intensity = row["flop"] / row["bytes"]
        ours = row["flop"] / row["us"]["ours"]["median"] / 1e6
        rival = ours / row["best rival/ours"]
        colour = colours[label(row)]
        axes.plot([intensity] * 2, [ours, rival], color=colour, linewidth=0.7, zorder=1)
        axes.plot(intensity, rival, "o", markerfacecolor="white", color=colour, markersize=4, zorder=2)
        axes.plot(intensity, ours, "o", color=colour, markersize=5, label=label(row), zorder=3)
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


# By file: the part of a report it shows, what draws it.
CHARTS: dict[str, tuple[str, Callable[[Report, Any], Any]]] = {
    "bn_scale_time.png": ("bn_scale", draw_times),
    "bn_scale_share.png": ("bn_scale", draw_shares),
    "conv_roofline.png": ("conv", draw_roofline),
    "layers_roofline.png": ("layers", draw_layers_roofline),
}


def draw(report: Report, directory: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (part, draw_figure) in CHARTS.items():
        if report.get(part):
            figure = draw_figure(report, plt)
            paths.append(directory / name)
            figure.savefig(paths[-1], dpi=200)
            plt.close(figure)
    return paths
