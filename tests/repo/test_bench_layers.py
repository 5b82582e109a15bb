"""The benchmark's layers of ten networks: the list, the rows, the limit of time, what is wrong or fails; and graphs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benching import SMALL, call
from benchmarks import conv, documents, graph_watch, network_layers, networks, record, report_layers
from benchmarks.graph_watch import GraphWatch
from benchmarks.layers import Layer, mobilenet_v2_layers, resnet18_layers, resnet50_layers
from benchmarks.networks import NETWORKS, NetworkLayer
from benchmarks.networks import network_layers as all_layers

ONE, OTHER = (("ResNet-50", 2),), (("ResNet-50", 1), ("VGG11-BN", 1))
FEW = [NetworkLayer(SMALL[0], ONE), NetworkLayer(SMALL[1], OTHER), NetworkLayer(Layer(8, 8, (1, 3), 9, 1, (0, 1)), ONE)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those instead of all, and rates that nobody measured."""
    matrix = dict.fromkeys(("float16", "float32", "TF32"), 1.0)
    monkeypatch.setattr(network_layers, "network_layers", lambda: FEW)
    monkeypatch.setattr(conv, "measure_rates", lambda *_: {"copy_gb_per_s": 10.0, "matrix_tflop_per_s": matrix})


def run(path: Path, device: str, *arguments: str) -> int:
    own = ["--only=layers", f"--device={device}", "--coarse", "--repeats=1", f"--record={path}", "--batches", "1", "2"]
    return call(*own, *arguments)


# ---- the list --------------------------------------------------------------------------------------------------------


def test_every_network_has_its_layers() -> None:
    layers = all_layers()
    assert len(layers) == len({of.layer for of in layers}) == len({str(of.layer) for of in layers}) > 250
    counts = {name: sum(dict(of.networks).get(name, 0) for of in layers) for name in NETWORKS}
    assert counts["DenseNet-121"] == 59 and counts["Inception-v3"] == 94 and min(counts.values()) == 8
    for name, known in (
        ("ResNet-50", resnet50_layers()),
        ("ResNet-18", resnet18_layers()),
        ("MobileNetV2", mobilenet_v2_layers()),
    ):
        listed = [layer for of in layers for layer in [of.layer] * dict(of.networks).get(name, 0)]
        assert sorted(map(str, listed)) == sorted(map(str, known)), name
        assert set(listed) <= {of.layer for of in layers}


def test_the_file_has_a_line_a_layer() -> None:
    lines = [json.loads(line) for line in networks.FILE.read_text().splitlines()]
    assert list(dict.fromkeys(line["network"] for line in lines)) == list(NETWORKS)
    assert all(line["count"] > 0 for line in lines)


def test_kernels_that_are_not_square() -> None:
    layer = Layer(8, 4, (1, 7), 10, 1, (0, 3), activation="relu")
    assert str(layer) == "1x7 8->4 10x10 relu" and layer.output_side == 10
    assert layer.weight_shape == (4, 8, 1, 7) and layer.elements == 8 * 100 + 4 * 100
    assert str(Layer(8, 4, 3, 10, 1, 1, groups=2)) == "3x3 8->4 in 2 groups 10x10"


def arguments(**values: Any) -> argparse.Namespace:
    own = {"layers": None, "batches": [1, 8], "layer_kinds": ["float16"], "quick": False}
    return argparse.Namespace(**own | values)


def test_layers_are_chosen_by_network_and_by_name() -> None:
    every = network_layers.layer_cases(arguments())
    assert len({str(of.case) for of in every}) == len(every) == 2 * len(all_layers())
    mobile = network_layers.layer_cases(arguments(layers=["mobilenetv2"], batches=[8]))
    assert sum(dict(of.networks)["MobileNetV2"] for of in mobile) == 52
    depthwise = network_layers.layer_cases(arguments(layers=["depthwise"]))
    assert depthwise and all(of.case.layer.groups > 1 for of in depthwise)
    kinds = network_layers.layer_cases(arguments(layers=["ResNet-18"], layer_kinds=list(network_layers.KINDS)))
    assert len({str(of.case) for of in kinds}) == len(kinds) == 2 * 15 * len(network_layers.KINDS)
    assert len(network_layers.layer_cases(arguments(quick=True))) == 2 * 3
    assert network_layers.layer_cases(arguments(layers=["nothing"])) == []


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows(device: str, few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    kinds = ["float16", "tf32", "tf32_nchw"] if device == "cuda" else ["float32"]
    assert run(path, device, "--layer-kinds", *kinds) == 0
    found = record.read(path)
    rows = found["layers"]
    assert len(rows) == 3 * 2 * len(kinds) and found["layers_left_out"] == {} and "failed" not in found
    assert found["settings"]["network_layers"] == {"ResNet-50": 3, "VGG11-BN": 1}
    for row in rows:
        own = {"ours", "eager", "conv"}
        if device == "cuda":
            own |= {"aten", *(("cudnn",) if " relu " in row["case"] else ())}
        assert row["us"].keys() == own and row["missing"] == {}
        times = {name: of["median"] for name, of in row["us"].items()}
        rivals = {name: times[name] for name in network_layers.RIVALS if name in times}
        assert row["best rival"] == min(rivals, key=rivals.__getitem__)
        assert row["best rival/ours"] == pytest.approx(rivals[row["best rival"]] / times["ours"], rel=0.01)
        assert row["errors"].keys() == own - {"conv", "cudnn"}
        assert bool(row["algorithm"]) == (device == "cuda") and row["calls"] == network_layers.MOST_CALLS
        assert max(row["floor_us"].values()) > 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("networks' layers, ") for line in lines) == 2 * len(kinds)
    header = next(i for i, line in enumerate(lines) if line.startswith("geometric means (of so many rows)"))
    names = [line.split("  ")[0] for line in lines[header + 2 : header + 5]]
    assert names == ["ResNet-50", "VGG11-BN", "all, each layer once"]
    said = f"1 of {len(rows)} rows takes", f"of {len(rows)} rows take"
    assert any(f"{words} more than 1.03 times the best rival's time" in "\n".join(lines) for words in said)


def test_documents_and_the_chart(few: None, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    assert run(path, "cpu", "--layer-kinds", "float32") == 0
    found = record.read(path)
    sections = {
        name: documents.SECTIONS[name](found).splitlines()
        for name in ("layers", "layer_means", "worst_layers", "slower_layers")
    }
    assert {name: len(lines) for name, lines in sections.items()} == {
        "layers": 2 + 6,
        "layer_means": 2 + 2 * 3,
        "worst_layers": 2 + 6,
        "slower_layers": 1,
    }
    means = [line.split(" | ") for line in sections["layer_means"][2:]]
    assert means[0][-1] != " |" and means[2][-1].strip(" |") == "", "a network's sums, and no sum of all layers"
    if importlib.util.find_spec("matplotlib"):
        assert call("--from-record", str(path), "--charts", str(tmp_path)) == 0
        assert (tmp_path / "layers_roofline.png").read_bytes().startswith(b"\x89PNG")


def test_sums_are_of_whole_networks() -> None:
    rows = [{"networks": {"a": 2, "b": 1}, "us": {"ours": {"median": 3.0}, "eager": {"median": 5.0}}}]
    of_row = {"group": "g", "batch": 1, "best rival": "eager", "best rival/ours": 5 / 3, "eager/ours": 5 / 3}
    rows[0] |= of_row | {"share_of_floor_percent": 50.0, "floor_us": {"memory": 1.5}}  # type: ignore[dict-item]
    report = {"layers": rows, "settings": {"network_layers": {"a": 1, "b": 2}}}
    header, lines = report_layers.means(report)
    assert [line[-3:] for line in lines] == [["3", "6", "10"], ["n/a"] * 3, ["n/a"] * 3]
    assert header[-3:] == ["all layers, floor us", "ours us", "best rivals us"]


def test_the_limit_of_time_leaves_rows_out(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    assert run(path, "cpu", "--layer-kinds=float32", "--limit-s=0") == 0
    found = record.read(path)
    assert found["layers_left_out"] == {"float32 channels_last batch 1": 3, "float32 channels_last batch 2": 3}
    assert "layers" not in found
    assert call("--from-record", str(path)) == 0
    assert "No layer was measured. Left out by the limit of time: 3 of float32" in capsys.readouterr().out


def test_what_is_wrong_or_fails_is_named_and_the_rest_measured(
    few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    op = conv.Problem.op

    def wrong(self: conv.Problem, *inputs: Any) -> Any:
        if self.case.layer == FEW[1].layer:
            raise RuntimeError("no kernel\nfor this")
        y = op(self, *inputs)
        return y * 1.001 if self.case.batch == 2 else y

    monkeypatch.setattr(conv.Problem, "op", wrong)
    path = tmp_path / "record.jsonl"
    assert run(path, "cpu", "--layer-kinds=float32") == 1
    found = record.read(path)
    assert [row["batch"] for row in found["layers"]] == [1, 1]
    reasons = sorted(why.split(", allowed")[0].split(": ", 1)[1] for why in found["failed"].values())
    assert reasons == ["no kernel", "no kernel", "relative error 0.001", "relative error 0.001"]
    assert capsys.readouterr().err.count("benchmarks: not measured: ") == 4


def test_a_device_that_is_lost_ends_the_part(few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(self: conv.Problem, *inputs: Any) -> Any:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(conv.Problem, "op", fails)
    monkeypatch.setattr(network_layers.LayerBench, "is_lost", lambda self: True)
    path = tmp_path / "record.jsonl"
    assert run(path, "cpu", "--layer-kinds=float32") == 1
    found = record.read(path)
    assert len(found["failed"]) == 1 and sum(found["layers_left_out"].values()) == 5


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_calls_have_numbers_and_turns() -> None:
    seen: list[tuple[str, int]] = []

    def rival(name: str) -> Callable[[int], object]:
        return lambda i: seen.append((name, i))

    def fails(i: int) -> None:
        raise RuntimeError("not today")

    stats, missing = GraphWatch("cpu", 2).compare({"a": rival("a"), "bad": fails, "b": rival("b")}, 2)
    assert stats.keys() == {"a", "b"} and missing == {"bad": "RuntimeError: not today"}
    both = {name: [(name, 0), (name, 1)] for name in "ab"}
    warm_up, turns = [("a", 0), ("b", 0)], [*both["b"], *both["a"], *both["a"], *both["b"], *both["b"], *both["a"]]
    assert seen == warm_up + turns
    assert all(0 < of["min"] <= of["median"] <= of["max"] and not of["host_limited"] for of in stats.values())


def test_graphs_take_turns_behind_a_spinning_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is held back long enough only at the second attempt."""
    log: list[str] = []
    spun: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = float(len(log))

        def query(self) -> bool:
            return len(spun) == 1  # the device had no more to do: the host is too late

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Side:
        def __init__(self, device: torch.device) -> None:
            pass

        def aside(self) -> Any:
            return contextlib.nullcontext()

        def capture(self, work: Callable[[], object]) -> tuple[Any, object]:
            result = work()
            return SimpleNamespace(replay=lambda: log.append("replay")), result

    fake = SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        _sleep=spun.append,
        memory_reserved=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(total_memory=1),
        empty_cache=lambda: None,
        current_device=lambda: 0,
    )
    monkeypatch.setattr(graph_watch, "cuda", fake)
    monkeypatch.setattr(graph_watch, "Cuda", Side)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    called: list[int] = []
    watch = GraphWatch("cuda", 3)
    stats, missing = watch.compare({"ours": called.append, "eager": lambda i: None}, 4)
    assert called == [0, 0, 1, 2, 3] and missing == {} and watch.keeper is not None
    assert len(log) == 2 * (1 + 1 + 3), "each once a turn, and again in the first turn"
    assert len(spun) == 1 + 1 + 3 and spun[1] >= 2 * spun[0]
    assert stats["ours"]["median"] == 1e3 / 4 and not stats["ours"]["host_limited"]
