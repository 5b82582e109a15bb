"""The layers of ten networks of torchvision: every convolution with a BatchNorm behind it, and what else fuse() has in
its group. ``python -m benchmarks.networks`` lists them anew in networks.jsonl, which is what the benchmark reads."""

from __future__ import annotations

import copy
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._fuse.guard import STATE
from fused_conv_bn._fuse.root import is_root

from .layers import Extent, Layer

FILE = Path(__file__).with_suffix(".jsonl")
NETWORKS = {  # by name: torchvision's, and the side of its images
    "ResNet-50": ("resnet50", 224),
    "ResNet-18": ("resnet18", 224),
    "MobileNetV2": ("mobilenet_v2", 224),
    "MobileNetV3-L": ("mobilenet_v3_large", 224),
    "EfficientNet-B0": ("efficientnet_b0", 224),
    "DenseNet-121": ("densenet121", 224),
    "VGG11-BN": ("vgg11_bn", 224),
    "RegNetY-1.6GF": ("regnet_y_1_6gf", 224),
    "ResNeXt-50": ("resnext50_32x4d", 224),
    "Inception-v3": ("inception_v3", 299),
}


@dataclass(frozen=True)
class NetworkLayer:
    layer: Layer
    networks: tuple[tuple[str, int], ...]  # those that have it, and how often


def network_layers() -> list[NetworkLayer]:
    """Each once, in the order of the file."""
    found: dict[Layer, dict[str, int]] = {}
    for line in FILE.read_text().splitlines():
        of_layer: dict[str, Any] = json.loads(line)
        network, count = of_layer.pop("network"), of_layer.pop("count")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in of_layer.items()}
        layer = Layer(**values)
        found.setdefault(layer, {})[network] = count
    return [NetworkLayer(layer, tuple(networks.items())) for layer, networks in found.items()]


# ---- the file --------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module, side: int) -> Iterator[Layer]:
    """In the order in which they are called, for an image of that side."""
    x = torch.randn(1, 3, side, side)
    fused = fcb.fuse(copy.deepcopy(model).eval(), x)
    found: list[Layer] = []

    def noted(call: Any, group: Any, block: Any) -> Any:
        def run(x: Any, residual: Tensor | None = None) -> Tensor:
            y: Tensor = call(x, residual)
            if block.conv is not None and block.bn is not None:
                found.append(layer_of(block.conv, group, x, y, residual is not None))
            return y

        return run

    for m in fused.modules():
        if is_root(m):
            for entry in (e for of_key in m.__dict__[STATE].entries.values() for e in of_key):
                groups = zip(entry.quick, entry.groups, entry.blocks, strict=True)
                entry.quick = [noted(call, group, block) for call, group, block in groups]
    with torch.no_grad():
        fused(x)
    yield from found


def layer_of(conv: nn.Conv2d, group: Any, x: Tensor, y: Tensor, residual: bool) -> Layer:
    def one(values: Any) -> Extent:
        height, width = values
        return height if height == width else (height, width)

    layer = Layer(
        *(conv.in_channels, conv.out_channels, one(conv.kernel_size), x.shape[2]),
        *(conv.stride[0], one(conv.padding), conv.groups, conv.bias is not None),
        *(group.factor, group.activation, residual),
    )
    rest = conv.stride, tuple(x.shape[2:]), tuple(y.shape), conv.dilation, group.residual_last
    expected = (layer.stride,) * 2, (layer.side,) * 2, (1, layer.outputs, *(layer.output_side,) * 2), (1, 1), False
    if rest != expected:
        raise ValueError(f"{layer} is not all of the layer: stride, sides, dilation, residual_last are {rest}")
    return layer


def lines(names: Iterable[str] = NETWORKS) -> Iterator[str]:
    """Of the file, for these networks. What is at its default is left out."""
    defaults = {field.name: field.default for field in fields(Layer)}
    vision = importlib.import_module("torchvision.models")
    for name in names:
        function, side = NETWORKS[name]
        # Inception's own initialisation takes a minute, and the side branch is for training.
        own = {"init_weights": False} if function == "inception_v3" else {}
        model = getattr(vision, function)(weights=None, **own)
        for layer, count in Counter(layers_of(model, side)).items():
            values = {key: value for key, value in asdict(layer).items() if value != defaults[key]}
            yield json.dumps({"network": name, **values, "count": count})


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()))
