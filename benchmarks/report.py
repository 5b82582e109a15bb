"""What a run says in text: the machine that it ran on, the tables of bn_scale, bn_scale_train and the host's times."""

from __future__ import annotations

from collections.abc import Sequence

from fused_conv_bn._count import counted
from fused_conv_bn._table import table as columns

from .record import Report, Row

LAYOUTS = {"nchw": "contiguous (NCHW)", "channels_last": "channels_last"}
Table = tuple[list[str], list[list[str]]]  # header, rows

HEADER = ["case", "MB", "copy us", "ours us", "ours/copy", "share %", "eager us", "eager/ours"]
HEADER += ["compile us", "compile/ours", "naive us", "bytes moved", "GB/s"]
TRAIN_HEADER = ["floor %" if name == "share %" else name for name in HEADER if name != "naive us"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["-" * max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return columns([header, rule, *rows], numbers_from=1)


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
    where = device["name"] if device["kind"] == "cuda" else f"{device['name']}, {counted(device['threads'], 'thread')}"
    print(f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    commit = f"{report['commit'] or 'unknown'}{' with changes' if report['dirty'] else ''}"
    print(f"commit {commit}, {report['date']}, {report['seconds']:.0f} s\n")
    if nearest := checks["nearest"]:
        count = counted(checks["count"], "check")
        print(f"accuracy: {count}, each within max(2 * eager's error, rounding); the nearest to that:")
        errors = f"ours {nearest['ours']:.2g}, eager {nearest['eager']:.2g}, limit {nearest['limit']:.2g}"
        print(f"{nearest['case']}: {errors}\n")


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
    joined_rows = report.get("cat_gate", [])
    if joined_rows:
        print(f"bn_scale_cat and gate\n{table(*cat_gate_table(report))}\n")
    pool_rows = report.get("pools", [])
    if pool_rows:
        print(f"max_pool2d and spatial_mean\n{table(*pools_table(report))}\n")
    if "host" in report:
        print(f"host time of one call, input (1, 4, 2, 2)\n{table(*host_table(report))}\n")
        print(f"import fused_conv_bn, after torch: {report['import_ms']['median']:.0f} ms")
    of_convolutions = [
        row for part in ("conv", "layers", "train", "activations", "grad_mode", "steps") for row in report.get(part, [])
    ]
    every = of_convolutions + rows + train_rows + short_rows + joined_rows + pool_rows
    for name, why in sorted({pair for row in every for pair in row["missing"].items()}):
        print(f"n/a for {name}: {why}")
    limited = sorted({f"{row['case']} ({name})" for row in every for name, s in row["us"].items() if s["host_limited"]})
    if limited:
        print(f"the host did not keep ahead of the device, and these times are too long: {', '.join(limited)}")


def cat_gate_table(report: Report) -> Table:
    names, ratios = ["copy", "ours", "eager", "compile"], ["ours/copy", "eager/ours", "compile/ours"]
    return _of_each(report["cat_gate"], names, ratios)


def pools_table(report: Report) -> Table:
    return _of_each(report["pools"], ["copy", "ours", "eager"], ["ours/copy", "eager/ours"])


def _of_each(of_part: Sequence[Row], names: list[str], ratios: list[str]) -> Table:
    rows = [
        [
            row["case"],
            *(f"{row['us'][name]['median']:.1f}" if name in row["us"] else "n/a" for name in names),
            *(f"{row[name]:.2f}" if name in row else "n/a" for name in ratios),
        ]
        for row in of_part
    ]
    return ["case", *(f"{name} us" for name in names), *ratios], rows


def host_table(report: Report) -> Table:
    numbers = ["us", "min", "over torch.mul", "eager/ours", "over op"]
    rows = [[row["case"], *(f"{row[n]:.2f}" if n in row else "" for n in numbers)] for row in report["host"]]
    return ["call", "us", "least us", "/ torch.mul", "eager/ours", "/ op"], rows
