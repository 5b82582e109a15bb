"""The tables of README.md and docs/performance.md, rendered from the records in results/.

A document names a table and its records in a marker, ``<!-- conv h200_conv -->``, and ends it with
``<!-- /conv h200_conv -->``. What is between the two is rendered; the rest is its author's.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from fused_conv_bn._count import counted

from . import record
from .bn_scale import PROBLEM_73
from .record import Report, Row
from .report import LAYOUTS, Table, cat_gate_table, host_table, pools_table, short
from .report_conv import floor_us, groups, mean_ratio, slowest
from .report_grad_mode import forward, kernelbench
from .report_kernelbench import problem_means, problems
from .report_layers import layer_table, slower, worst
from .report_layers import means as layer_means
from .report_models import models
from .report_steps import layer_steps, step_means, steps, worst_step

# Of README: its words, the part and the case.
SUMMARY = {
    "problem 73, evaluation, float32": ("conv", "3x3 8->64 128x128 batch 128 float32 nchw"),
    "problem 73, evaluation, float16": ("conv", "3x3 8->64 128x128 batch 128 float16 channels_last"),
    "problem 73, training mode, float32": ("train", "3x3 8->64 128x128 batch 128 float32 nchw train"),
    "problem 73, training mode, float16": ("train", "3x3 8->64 128x128 batch 128 float16 channels_last train"),
    "7x7/2 first layer, ReLU, float16": ("conv", "7x7/2 3->64 224x224 relu batch 32 float16 channels_last"),
    "3x3 depthwise, 144 channels, ReLU6, float16": (
        "conv",
        "3x3 144 depthwise 56x56 relu6 batch 64 float16 channels_last",
    ),
    "`bn_scale`, 520 MB, float32": ("bn_scale", "float32 nchw 128x64x126x126"),
    "`bn_scale_train`, 520 MB, float32": ("bn_scale_train", "float32 nchw 128x64x126x126 train"),
}

COLUMNS = {"copy": "copy of y", "ours": "**ours**", "eager": "eager", "best compile": "torch.compile"}
COLUMNS |= {"cudnn": "cuDNN fused", "conv": "convolution alone"}
MEANS = {"eager": "eager", "best compile": "torch.compile", "cudnn": "cuDNN fused", "best rival": "best of these"}
MEANS |= {"conv": "convolution alone", "aten": "convolution and one pass"}
TRAIN_COLUMNS = {name: column for name, column in COLUMNS.items() if name != "cudnn"}
TRAIN_MEANS = {name: column for name, column in MEANS.items() if name != "cudnn"}
TRAIN_MEANS |= {"aten": "convolution, one read and one pass"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *others])


def times(row: Row) -> dict[str, float]:
    """Medians by name, the fastest mode of torch.compile among them."""
    found = {name: float(stats["median"]) for name, stats in row["us"].items()}
    if "best compile/ours" in row:
        found["best compile"] = row["best compile/ours"] * found["ours"]
    return found


# ---- where and of what -----------------------------------------------------------------------------------------------


def origin(report: Report) -> str:
    device, versions, validation = report["device"], report["versions"], report["validation"]
    where = f"{device['name']}, {counted(device['threads'], 'thread')}"
    if device["kind"] == "cuda":
        where = f"{device['name']}, driver {versions['driver']}, CUDA {versions['cuda']}, cuDNN {versions['cudnn']}"
    commit = (report["commit"] or "unknown")[:7]
    nearest = validation["nearest"]
    checks = counted(validation["count"], "check")
    checks += f" of accuracy, the nearest at {nearest['ours'] / nearest['limit']:.2f} of its"
    return f"({where}; torch {versions['torch']}; commit {commit}, {report['date'][:10]}; {checks} limit)"


def summary(*reports: Report) -> str:
    rows = []
    for words, (part, case) in SUMMARY.items():
        row = next(row for report in reports for row in report.get(part, []) if row["case"] == case)
        us = times(row)
        compiled = us.get("best compile", us.get("compile"))
        cells = [f"{us['copy']:.0f}", f"**{us['ours']:.0f}**", f"{us['eager']:.0f}"]
        rows.append([words, *cells, f"{compiled:.0f}" if compiled else "", f"{row['eager/ours']:.1f}"])
    return markdown(["us", "copy of y", "**ours**", "eager", "torch.compile", "eager / ours"], rows)


# ---- bn_scale, bn_scale_train ----------------------------------------------------------------------------------------


def bn_scale(report: Report) -> str:
    """Problem 73's size, or the largest where that was not measured."""
    names = ["copy", "ours", "eager", "compile", "naive"]
    every = [row for row in report["bn_scale"] if row["main"]]
    sizes = {row["nominal_bytes"] for row in every}
    size = PROBLEM_73 if PROBLEM_73 in sizes else max(sizes)
    rows = []
    for row in every:
        if row["nominal_bytes"] == size:
            us = [f"{row['us'][name]['median']:.0f} us" if name in row["us"] else "" for name in names]
            us[1] = f"**{us[1]}**"
            rows.append([f"{row['dtype']}, {LAYOUTS[row['layout']]}", *us])
    header = [f"`bn_scale`, {short(size / 1e6)} MB", "copy", "**ours**", "eager", "torch.compile", "naive kernel"]
    return markdown(header, rows)


def bn_scale_train(report: Report) -> str:
    """Every case, by the time of a copy."""
    rows = []
    for row in report["bn_scale_train"]:
        us = [f"{row['us'][name]['median']:.0f} us" if name in row["us"] else "" for name in ("eager", "compile")]
        of_row = [f"{row['us']['copy']['median']:.0f} us", f"**{row['us']['ours']['median']:.0f} us**", *us]
        case = f"{row['dtype']}, {LAYOUTS[row['layout']]}, {'x'.join(map(str, row['shape']))}"
        rows.append([case, *of_row, f"{row['ours/copy']:.2f}", f"{row['eager/ours']:.2f}"])
    header = ["`bn_scale_train`", "copy", "**ours**", "eager", "torch.compile", "ours / copy", "eager / ours"]
    return markdown(header, rows)


# ---- convolutions ----------------------------------------------------------------------------------------------------


def layer_row(row: Row, columns: Iterable[str]) -> list[str]:
    us = times(row)
    cells = {name: f"{us[name]:.0f}" if name in us else "" for name in columns}
    cells["ours"] = f"**{cells['ours']}**"
    return [row["case"], f"{floor_us(row):.0f}", *cells.values()]


def layers(part: str, report: Report) -> str:
    columns = TRAIN_COLUMNS if part == "train" else COLUMNS
    return markdown(["us", "floor", *columns.values()], [layer_row(row, columns) for row in report[part]])


def means(part: str, report: Report) -> str:
    """The geometric means of all groups."""
    ratios = TRAIN_MEANS if part == "train" else MEANS
    rows = [
        [group, str(len(rows)), *(mean_ratio(rows, name) for name in ratios), f"{slowest(rows):.2f}"]
        for group, rows in groups(report, part).items()
    ]
    return markdown(["speed-up, geometric mean", "layers", *ratios.values(), "slowest layer"], rows)


def algorithm(row: Row) -> str:
    """Its name alone, as the record has it."""
    return str(row["algorithm"] or "CPU").split()[0]


def algorithms(report: Report) -> str:
    """How many layers each algorithm computed, by the names of the record."""
    counts = Counter(algorithm(row) for row in report["conv"]).most_common()
    named = ", ".join(f"{count} `{name}`" for name, count in counts)
    factor = 1 / slowest(report["conv"])
    return (
        f"Of {counted(len(report['conv']), 'layer')} none takes more than {factor:.3f} times the better one of eager "
        f"and\n"
        f"PyTorch's convolution with one pass behind it. They ran as {named}."
    )


def activations(report: Report) -> str:
    """Ours over ours with ReLU, from the least to the most of the layers that an algorithm computed; several images."""
    factors: dict[str, dict[str, list[float]]] = {}
    for row in report["activations"]:
        if row["shape"][0] > 1:
            column = f"`{algorithm(row)}`, {'float32' if row['dtype'] == 'float32' else '16 bits'}"
            factors.setdefault(row["activation"], {}).setdefault(column, []).append(row["ours/relu"])
    columns = sorted({column for of_activation in factors.values() for column in of_activation})
    rows = [
        [f"`{name}`", *(f"{min(found[c]):.2f} to {max(found[c]):.2f}" if c in found else "" for c in columns)]
        for name, found in factors.items()
    ]
    return markdown(["ours / ours with ReLU", *columns], rows)


# ---- rendering -------------------------------------------------------------------------------------------------------


def of_table(table: Callable[[Report], Table], report: Report) -> str:
    """Without the columns that no row has anything in."""
    header, rows = table(report)
    rows = [["" if cell == "n/a" else cell for cell in row] for row in rows]
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return markdown([header[i] for i in used], [[row[i] for i in used] for row in rows])


SECTIONS: dict[str, Callable[..., str]] = {
    "origin": origin,
    "summary": summary,
    "bn_scale": bn_scale,
    "bn_scale_train": bn_scale_train,
    "conv": functools.partial(layers, "conv"),
    "conv_means": functools.partial(means, "conv"),
    "train": functools.partial(layers, "train"),
    "train_means": functools.partial(means, "train"),
    "algorithms": algorithms,
    "activations": activations,
    "grad_mode": functools.partial(of_table, forward),
    "kernelbench": functools.partial(of_table, kernelbench),
    "steps": functools.partial(of_table, steps),
    "layer_steps": functools.partial(of_table, layer_steps),
    "step_means": functools.partial(of_table, step_means),
    "worst_step": worst_step,
    "models": functools.partial(of_table, models),
    "problems": functools.partial(of_table, problems),
    "problem_means": functools.partial(of_table, problem_means),
    "layers": lambda report: of_table(lambda found: layer_table(found["layers"]), report),
    "layer_means": functools.partial(of_table, layer_means),
    "worst_layers": functools.partial(of_table, worst),
    "slower_layers": slower,
    "cat_gate": functools.partial(of_table, cat_gate_table),
    "pools": functools.partial(of_table, pools_table),
    "host": functools.partial(of_table, host_table),
}

NAMES = r"\w+(?: \w+)+"  # a section and its records
MARKER = re.compile(rf"<!-- (/?{NAMES}) -->")
BLOCK = re.compile(rf"<!-- ({NAMES}) -->.*?<!-- /\1 -->", re.DOTALL)


def section(names: str) -> str:
    name, *stems = names.split()
    if name not in SECTIONS:
        raise SystemExit(f"benchmarks: a marker names {name}, expected one of {', '.join(SECTIONS)}")
    paths = [record.RESULTS / f"{stem}.jsonl" for stem in stems]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise SystemExit(f"benchmarks: the marker {names} needs {missing[0]}, and there is no such file")
    return SECTIONS[name](*map(record.read, paths))


def render(text: str) -> str:
    """The document, with each table between the two markers of its name."""
    markers = MARKER.findall(text)
    if not markers:
        raise SystemExit("benchmarks: the file has no markers such as <!-- conv h200_conv -->")
    for begin, end in zip(markers[::2], [*markers[1::2], ""], strict=False):
        if begin.startswith("/") or end != f"/{begin}":
            name = begin.removeprefix("/")
            raise SystemExit(f"benchmarks: the file must have <!-- {name} --> and then <!-- /{name} -->")
    return BLOCK.sub(lambda block: f"<!-- {block[1]} -->\n{section(block[1])}\n<!-- /{block[1]} -->", text)
