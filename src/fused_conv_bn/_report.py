"""What bench.py says: the machine it ran on, and tables and charts of the dict that its --json writes."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SOURCE_ROOT = Path(__file__).resolve().parents[2]  # in a source tree, that is

cudnn: Any = torch.backends.cudnn  # which has types only in part

Report = dict[str, Any]
Row = dict[str, Any]
Charts = dict[str, tuple[str, Callable[[Report, Any], Any]]]  # by file: the part of a report it shows, what draws it

HEADER = ["case", "MB", "copy us", "ours us", "ours/copy", "share %", "eager us", "eager/ours"]
HEADER += ["compile us", "compile/ours", "naive us", "bytes moved", "GB/s"]
TRAIN_HEADER = ["floor %" if name == "share %" else name for name in HEADER if name != "naive us"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *others])


def short(number: float) -> str:
    """Three digits, or all of the integer part."""
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def cells(row: Row) -> list[str]:
    def us(name: str) -> str:
        return f"{row['us'][name]['median']:.1f}" if name in row["us"] else "n/a"

    def ratio(name: str) -> str:
        return f"{row[name]:.2f}" if name in row else "n/a"

    share = row.get("share_of_floor_percent", row["share_of_copy_percent"])
    ours = [us("copy"), us("ours"), ratio("ours/copy"), f"{share:.0f}"]
    naive = [] if "share_of_floor_percent" in row else [us("naive")]
    rivals = [us("eager"), ratio("eager/ours"), us("compile"), ratio("compile/ours"), *naive]
    moved = [f"{row['bytes_moved']:,}", short(row["gb_per_s"]["ours"])]
    return [row["case"], short(row["tensor_bytes"] / 1e6), *ours, *rivals, *moved]


def print_head(report: Report) -> None:
    device, versions, checks = report["device"], report["versions"], report["validation"]
    where = device["name"] if device["kind"] == "cuda" else f"{device['name']}, {device['threads']} threads"
    print(f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    commit = f"{report['commit'] or 'unknown'}{' with changes' if report['dirty'] else ''}"
    print(f"commit {commit}, {report['date']}, {report['seconds']:.0f} s\n")
    if checks:
        worst = max(checks, key=lambda c: float(c["ours"] / c["limit"]))
        print(f"accuracy: {len(checks)} checks, each within max(2 * eager's error, rounding); the nearest to that:")
        print(f"{worst['case']}: ours {worst['ours']:.2g}, eager {worst['eager']:.2g}, limit {worst['limit']:.2g}\n")


def print_tables(report: Report) -> None:
    """bn_scale's, bn_scale_train's, the host's times, and what is to be said of the numbers of all tables."""
    rows, train_rows = (report.get(part, []) for part in ("bn_scale", "bn_scale_train"))
    if rows:
        print(f"bn_scale (MB: one tensor; GB/s: ours)\n{table(HEADER, [cells(row) for row in rows])}\n")
    if train_rows:
        lines = table(TRAIN_HEADER, [cells(row) for row in train_rows])
        print(f"bn_scale_train (MB: one tensor; floor: two reads, one write; GB/s: ours)\n{lines}\n")
    short_rows = report.get("short_planes", [])
    if short_rows:
        names = ["copy", "ours", "batch_norm"]
        of_rows = [
            [row["case"], *(f"{row['us'][n]['median']:.1f}" for n in names), f"{row['ours/batch_norm']:.2f}"]
            for row in short_rows
        ]
        header = ["case", "copy us", "ours us", "F.batch_norm us", "ours/F.batch_norm"]
        print(f"bn_scale_train on the CPU, short planes\n{table(header, of_rows)}\n")
    if "host_us" in report:
        numbers = ["us", "min", "over torch.mul", "eager/ours", "over op"]
        host = [[name, *(f"{h[n]:.2f}" if n in h else "" for n in numbers)] for name, h in report["host_us"].items()]
        header = ["call", "us", "least us", "/ torch.mul", "eager/ours", "/ op"]
        print(f"host time of one call, input (1, 4, 2, 2)\n{table(header, host)}\n")
        print(f"import fused_conv_bn, after torch: {report['import_ms']['median']:.0f} ms")
    parts = ("conv", "train", "activations", "grad_mode")
    of_convolutions = [row for part in parts for row in report.get(part, {"rows": []})["rows"]]
    every = of_convolutions + rows + train_rows + short_rows
    for name, why in sorted({pair for row in every for pair in row["missing"].items()}):
        print(f"n/a for {name}: {why}")
    limited = sorted({f"{row['case']} ({name})" for row in every for name, s in row["us"].items() if s["host_limited"]})
    if limited:
        print(f"the host did not keep ahead of the device, and these times are too long: {', '.join(limited)}")


# ---- README ----------------------------------------------------------------------------------------------------------


def section(report: Report) -> str:
    """bn_scale's largest size but one, which is problem 73's."""
    names = ["copy", "ours", "eager", "compile", "naive"]
    every = [row for row in report["bn_scale"] if row["main"]]
    size = sorted({row["nominal_bytes"] for row in every})[-2:][0]
    rows = []
    for row in every:
        if row["nominal_bytes"] == size:
            us = [f"{row['us'][name]['median']:.0f} us" if name in row["us"] else "" for name in names]
            us[1] = f"**{us[1]}**"
            rows.append([f"{row['dtype']}, {LAYOUTS[row['layout']]}", *us])
    header = [f"`bn_scale`, {short(size / 1e6)} MB", "copy", "**ours**", "eager", "torch.compile", "naive kernel"]
    return markdown(header, rows)


def train_section(report: Report) -> str:
    """bn_scale_train's every case, by the time of a copy."""
    rows = []
    for row in report["bn_scale_train"]:
        us = [f"{row['us'][name]['median']:.0f} us" if name in row["us"] else "" for name in ("eager", "compile")]
        times = [f"{row['us']['copy']['median']:.0f} us", f"**{row['us']['ours']['median']:.0f} us**", *us]
        case = f"{row['dtype']}, {LAYOUTS[row['layout']]}, {'x'.join(map(str, row['shape']))}"
        rows.append([case, *times, f"{row['ours/copy']:.2f}", f"{row['eager/ours']:.2f}"])
    header = ["`bn_scale_train`", "copy", "**ours**", "eager", "torch.compile", "ours / copy", "eager / ours"]
    return markdown(header, rows)


def render(readme: str, sections: dict[str, str]) -> str:
    """The README with each section between the two markers of its name."""
    for name, text in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found_begin, rest = readme.partition(begin)
        _, found_end, tail = rest.partition(end)
        if not found_begin or not found_end or begin in rest or end in tail:
            raise SystemExit(f"bench: the file must have {begin} and then {end}, once each")
        readme = f"{head}{begin}\n{text}\n{end}{tail}"
    return readme


# ---- the machine -----------------------------------------------------------------------------------------------------


def describe(device: str, commit: str | None) -> Report:
    """The code and the machine that the numbers belong to."""
    from . import __version__

    dirty = None
    if commit is None:
        commit, dirty = git_state()
    hardware: dict[str, Any] = {"kind": device, "name": cpu_name(), "threads": torch.get_num_threads()}
    versions = {"fused_conv_bn": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        hardware.update(name=gpu.name, multiprocessors=gpu.multi_processor_count, cpu=cpu_name())
        hardware["l2_bytes"] = getattr(gpu, "L2_cache_size", None)
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
        versions.update(cuda=str(torch.version.cuda), cudnn=str(cudnn.version()), driver=driver or "unknown")
    return {
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": hardware,
        "versions": versions,
        "flags": {
            "cudnn.allow_tf32": cudnn.allow_tf32,
            "cudnn.benchmark": cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
    }


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def git_state() -> tuple[str | None, bool | None]:
    """HEAD, and whether what is measured differs from it. (None, None) where the package is not in its own checkout."""
    if not (SOURCE_ROOT / ".git").exists() or not (SOURCE_ROOT / "src" / "fused_conv_bn").exists():
        return None, None
    git = ["git", "-C", str(SOURCE_ROOT)]
    status = output_of([*git, "status", "--porcelain", "--", "src", "csrc", "setup.py"])
    return output_of([*git, "rev-parse", "HEAD"]), None if status is None else bool(status)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# ---- charts ----------------------------------------------------------------------------------------------------------

LAYOUTS = {"nchw": "contiguous (NCHW)", "channels_last": "channels_last"}
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


def legend_below(figure: Any, panels: Any) -> None:
    """One legend for both panels, each label once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(len(entries), 4 if len(entries) > 6 else 3)
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=columns, frameon=False, fontsize=9)
    rows = -(-len(entries) // columns)
    figure.tight_layout(rect=(0, 0.01 + 0.05 * rows, 1, 0.97))


CHARTS: Charts = {"bn_scale_time.png": ("bn_scale", draw_times), "bn_scale_share.png": ("bn_scale", draw_shares)}


def draw_charts(report: Report, directory: Path, charts: Charts) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (part, draw) in charts.items():
        if report.get(part):
            figure = draw(report, plt)
            paths.append(directory / name)
            figure.savefig(paths[-1], dpi=200)
            plt.close(figure)
    return paths
