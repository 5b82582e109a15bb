"""KernelBench's problems of level 2 and 3 that have a BatchNorm: thirty models, with their layers, sizes and inputs.

https://github.com/ScalingIntelligence/KernelBench. Each is described here in this project's words: which layers, of
which sizes, in which order, and what is a function or in place where that decides what can be fused. Weights are as
PyTorch makes them. Inputs are uniform between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[int, ...]]
"""A model and the shape of its input."""


@dataclass(frozen=True)
class Sizes:
    """``small``: by what widths and images are divided; 1 is KernelBench's own sizes."""

    small: int = 1

    def width(self, channels: int, multiple: int = 8) -> int:
        """Of channels and features, never below ``multiple``."""
        return channels if self.small == 1 else max(multiple, channels // self.small // multiple * multiple)

    def side(self, pixels: int, least: int = 8) -> int:
        return pixels if self.small == 1 else max(least, pixels // self.small)

    def batch(self, count: int, most: int = 4) -> int:
        return count if self.small == 1 else min(count, most)


@dataclass(frozen=True)
class Problem:
    level: int
    number: int
    name: str
    build: Callable[[Sizes], Made]

    def __str__(self) -> str:
        return f"{self.level}-{self.number} {self.name}"

    def make(self, small: int = 1) -> Made:
        """The model in training mode and the shape of its input, with sizes divided by ``small``."""
        return self.build(Sizes(small))


class Model(nn.Module):
    """Layers, parameters and numbers by name, and a function of them and of the input."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


# ---- level 2: a layer, its BatchNorm and a few ops -------------------------------------------------------------------


def transposed_tanh(s: Sizes) -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.group_norm(m.pool(m.tanh(m.bn(m.conv(x)))))
        return y

    c = s.width(128)
    parts = dict(conv=nn.ConvTranspose2d(s.width(64), c, 5, padding=1), bn=nn.BatchNorm2d(c), tanh=nn.Tanh())
    parts |= dict(pool=nn.MaxPool2d(2, 2), group_norm=nn.GroupNorm(8, c))
    side = s.side(32)
    return Model(run, **parts), (s.batch(512), s.width(64), side, side)


def transposed_centred(s: Sizes) -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.bn(m.conv(x))
        return y - torch.mean(y, dim=(2, 3, 4), keepdim=True)

    c = s.width(32)
    conv = nn.ConvTranspose3d(s.width(16), c, 3, stride=2, padding=1)
    shape = (s.batch(16), s.width(16), s.side(16, 4), s.side(32, 4), s.side(32, 4))
    return Model(run, conv=conv, bn=nn.BatchNorm3d(c)), shape


def transposed_pooled(s: Sizes) -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.pool2(m.pool1(m.bn(m.conv(x))))
        return y

    c = s.width(16)
    parts = dict(conv=nn.ConvTranspose3d(3, c, 3, stride=2, padding=1), bn=nn.BatchNorm3d(c))
    return Model(run, **parts, pool1=nn.AvgPool3d(2), pool2=nn.AvgPool3d(2)), (s.batch(64), 3, *[s.side(32)] * 3)


def transposed_scaled(s: Sizes) -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.pool(m.bn(m.conv(x) * m.factor))
        return y

    c = s.width(128)
    parts: dict[str, Any] = dict(conv=nn.ConvTranspose3d(s.width(64), c, 5), bn=nn.BatchNorm3d(c), factor=2.0)
    shape = (s.batch(16), s.width(64), s.side(16, 4), s.side(32, 4), s.side(32, 4))
    return Model(run, **parts, pool=nn.AdaptiveAvgPool3d((1, 1, 1))), shape


def gemm(
    batch: int, features: int, run: Callable[..., Tensor], **parts: Callable[[int], Any]
) -> Callable[[Sizes], Made]:
    """``parts``: beside the linear layer and its BatchNorm, made of the number of features."""

    def make(s: Sizes) -> Made:
        n = s.width(features)
        own = {name: part(n) for name, part in parts.items()}
        return Model(run, linear=nn.Linear(n, n), bn=nn.BatchNorm1d(n), **own), (s.batch(batch, 64), n)

    return make


def scaled_before(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.bn(m.linear(x) * m.scale)
    return y


def gelu_relu(m: Any, x: Tensor) -> Tensor:
    return torch.relu(F.gelu(m.bn(m.linear(x))))


def scaled_softmax(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.softmax(m.scale * m.bn(m.linear(x)))
    return y


def biased_swish(m: Any, x: Tensor) -> Tensor:
    y: Tensor = (m.bn(m.linear(x)) + m.bias) / m.divisor
    return y * torch.sigmoid(y)


def random_scale(features: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(features))


def mish_in_front(s: Sizes) -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y = torch.multiply(torch.tanh(F.softplus(y)), y)
        z: Tensor = m.bn(y)
        return z

    c = s.width(128)
    return Model(run, conv=nn.Conv2d(s.width(64), c, 3), bn=nn.BatchNorm2d(c)), image(s, 64, s.width(64), 128)


def scaled(s: Sizes) -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.bn(m.conv(x)) * m.factor
        return y

    c = s.width(64)
    return Model(run, conv=nn.Conv2d(8, c, 3), bn=nn.BatchNorm2d(c), factor=2.0), image(s, 128, 8, 128)


def image(s: Sizes, batch: int, channels: int, side: int, least: int = 8) -> tuple[int, int, int, int]:
    return s.batch(batch), channels, s.side(side, least), s.side(side, least)


# ---- what the networks of level 3 are made of ------------------------------------------------------------------------


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Padded so that a stride of 1 keeps the image, without a bias."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """``body(x) += shortcut(x)``, and what follows."""

    def __init__(self, body: Sequence[nn.Module], shortcut: Sequence[nn.Module] = (), then: Any = None) -> None:
        super().__init__()
        self.body, self.shortcut, self.then = nn.Sequential(*body), nn.Sequential(*shortcut), then

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        y += self.shortcut(x)
        return y if self.then is None else self.then(y)


class Classified(nn.Module):
    """Features, their mean over the image, and a linear layer. ``pool``: how the mean is taken."""

    def __init__(self, features: Sequence[nn.Module], channels: int, classes: int, pool: Any = None) -> None:
        super().__init__()
        self.features, self.pool, self.classifier = nn.Sequential(*features), pool, nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1)) if self.pool is None else self.pool(x)
        y: Tensor = self.classifier(torch.flatten(x, 1))
        return y


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def relu6() -> nn.Module:
    return nn.ReLU6(inplace=True)


def basic_block(inputs: int, outputs: int, stride: int, changes: bool) -> nn.Module:
    body = [*conv_bn(inputs, outputs, 3, stride), relu(), *conv_bn(outputs, outputs, 3)]
    return Residual(body, conv_bn(inputs, outputs, 1, stride) if changes else (), relu())


def bottleneck(inputs: int, width: int, stride: int, changes: bool) -> nn.Module:
    body = [*conv_bn(inputs, width), relu(), *conv_bn(width, width, 3, stride), relu(), *conv_bn(width, 4 * width)]
    return Residual(body, conv_bn(inputs, 4 * width, 1, stride) if changes else (), relu())


def one_basic_block(s: Sizes) -> Made:
    return basic_block(3, s.width(64), 1, True), image(s, 10, 3, 224)


def stem(channels: int) -> list[nn.Module]:
    return [*conv_bn(3, channels, 7, 2), relu(), nn.MaxPool2d(3, 2, 1)]


def resnet(
    batch: int, block: Callable[..., nn.Module], expansion: int, depths: Sequence[int]
) -> Callable[[Sizes], Made]:
    def make(s: Sizes) -> Made:
        inputs = s.width(64)
        layers = stem(inputs)
        for stage, depth in enumerate(depths):
            width = s.width(64 << stage)
            for i in range(depth):
                changes = i == 0 and (stage > 0 or expansion > 1)
                layers.append(block(inputs, width, 2 if i == 0 and stage > 0 else 1, changes))
                inputs = width * expansion
        return Classified(layers, inputs, 1000, nn.AdaptiveAvgPool2d((1, 1))), image(s, batch, 3, 224, 64)

    return make


class DenseBlock(nn.Module):
    """Each layer reads all that came before it, concatenated."""

    def __init__(self, inputs: int, growth: int, depth: int) -> None:
        super().__init__()
        layers = []
        for i in range(depth):
            c = inputs + i * growth
            conv = nn.Conv2d(c, growth, 3, padding=1, bias=False)
            layers.append(nn.Sequential(nn.BatchNorm2d(c), relu(), conv, nn.Dropout(0.0)))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(x))
            x = torch.cat(features, 1)
        return x


def transition(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    return [nn.BatchNorm2d(inputs), relu(), conv, nn.AvgPool2d(2, 2)]


def one_transition(s: Sizes) -> Made:
    return nn.Sequential(*transition(s.width(32), s.width(64))), image(s, 128, s.width(32), 256)


def one_dense_block(s: Sizes) -> Made:
    return DenseBlock(s.width(32), s.width(32), 6), image(s, 10, s.width(32), 224)


def densenet(depths: Sequence[int]) -> Callable[[Sizes], Made]:
    def make(s: Sizes) -> Made:
        growth, c = s.width(32), s.width(64)
        layers = stem(c)
        for i, depth in enumerate(depths):
            layers.append(DenseBlock(c, growth, depth))
            c += depth * growth
            if i < len(depths) - 1:
                layers += transition(c, c // 2)
                c //= 2
        return Classified([*layers, nn.BatchNorm2d(c), relu()], c, 10), image(s, 10, 3, 224, 64)

    return make


def mobilenet_v1(s: Sizes) -> Made:
    c = s.width(32)
    layers = [*conv_bn(3, c, 3, 2), relu()]
    pairs = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for outputs, stride in pairs:
        layers += [*conv_bn(c, c, 3, stride, groups=c), relu(), *conv_bn(c, s.width(outputs)), relu()]
        c = s.width(outputs)
    shape = image(s, 10, 3, 224, 64)
    return Classified(layers, c, 1000, nn.AvgPool2d(shape[2] // 32)), shape


def mobilenet_v2(s: Sizes) -> Made:
    """Without residuals, as KernelBench has it."""
    c = s.width(32)
    layers = [*conv_bn(3, c, 3, 2), relu6()]
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, width, depth, stride in stages:
        for i in range(depth):
            layers.append(nn.Sequential(*inverted(c, s.width(width), 3, stride if i == 0 else 1, expansion)))
            c = s.width(width)
    layers += [*conv_bn(c, s.width(1280)), relu6()]
    pool = nn.AdaptiveAvgPool2d((1, 1))
    return Classified(layers, s.width(1280), 1000, pool), image(s, 10, 3, 224, 64)


def inverted(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    expansion: int,
    activation: Callable[[], nn.Module] = relu6,
    always_expands: bool = False,
    gate: Sequence[nn.Module] = (),
) -> list[nn.Module]:
    """Wider by a 1x1 convolution, depthwise, then narrow again. ``gate``: behind the depthwise one."""
    width = inputs * expansion
    layers = [*conv_bn(inputs, width), activation()] if expansion > 1 or always_expands else []
    layers += [*conv_bn(width, width, kernel, stride, groups=width), activation(), *gate]
    return layers + conv_bn(width, outputs)


def one_inverted(s: Sizes) -> Made:
    layers = inverted(s.width(112), s.width(192), 5, 2, 6)
    return nn.Sequential(*layers), image(s, 10, s.width(112), 224)


def efficientnet_b0(s: Sizes) -> Made:
    layers = [*conv_bn(3, s.width(32), 3, 2), nn.ReLU()]
    blocks = [(32, 16, 3, 1, 1), (16, 24, 3, 2, 6), (24, 24, 3, 1, 6), (24, 40, 5, 2, 6), (40, 40, 5, 1, 6)]
    blocks += [(40, 80, 3, 2, 6), (80, 80, 3, 1, 6), (80, 112, 5, 1, 6), (112, 112, 5, 1, 6), (112, 192, 5, 2, 6)]
    blocks += [(192, 192, 5, 1, 6), (192, 192, 5, 1, 6), (192, 320, 3, 1, 6)]
    for inputs, outputs, kernel, stride, expansion in blocks:
        body = inverted(s.width(inputs), s.width(outputs), kernel, stride, expansion)
        layers.append(Residual(body) if stride == 1 and inputs == outputs else nn.Sequential(*body))
    layers += [*conv_bn(s.width(320), s.width(1280)), nn.ReLU()]
    return Classified(layers, s.width(1280), 1000), image(s, 10, 3, 224, 64)


def efficientnet_b1(s: Sizes) -> Made:
    layers = [*conv_bn(3, s.width(32), 3, 2), nn.ReLU()]
    blocks = [(32, 16, 1, 1), (16, 24, 2, 6), (24, 40, 2, 6), (40, 80, 2, 6), (80, 112, 1, 6), (112, 192, 2, 6)]
    for inputs, outputs, stride, expansion in [*blocks, (192, 320, 1, 6)]:
        body = inverted(s.width(inputs), s.width(outputs), 3, stride, expansion, always_expands=True)
        layers.append(nn.Sequential(*body))
    layers += [*conv_bn(s.width(320), s.width(1280)), nn.ReLU()]
    return Classified(layers, s.width(1280), 1000), image(s, 10, 3, 240, 64)


def efficientnet_b2(s: Sizes) -> Made:
    """Where others have the gate of a squeeze-and-excite block, its values alone go on: images of one pixel."""
    layers = [*conv_bn(3, s.width(32), 3, 2), relu()]
    blocks = [(32, 96, 1, 3), (96, 144, 2, 6), (144, 192, 2, 6), (192, 288, 2, 6), (288, 384, 1, 6)]
    for inputs, outputs, stride, expansion in blocks:
        c = s.width(inputs) * expansion
        gate = [nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(c, c // 4, 1, bias=False), relu()]
        gate += [nn.Conv2d(c // 4, c, 1, bias=False), nn.Sigmoid()]
        body = inverted(s.width(inputs), s.width(outputs), 3, stride, expansion, relu, gate=gate)
        layers.append(nn.Sequential(*body))
    layers += [*conv_bn(s.width(384), s.width(1408)), relu()]
    return Classified(layers, s.width(1408), 1000, nn.AdaptiveAvgPool2d((1, 1))), image(s, 2, 3, 224, 64)


class Shuffle(nn.Module):
    """The channels of each group side by side with those of the others."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous()
        return x.view(n, -1, h, w)


def shuffle_unit(inputs: int, outputs: int, changes: bool) -> nn.Module:
    """The activation comes before the residual is added."""
    mid = outputs // 4
    body = [*conv_bn(inputs, mid, groups=3), nn.ReLU(), *conv_bn(mid, mid, 3, groups=mid), Shuffle(3)]
    body += [*conv_bn(mid, outputs, groups=3), nn.ReLU()]
    return Residual(body, conv_bn(inputs, outputs) if changes else ())


def one_shuffle_unit(s: Sizes) -> Made:
    inputs, outputs = s.width(240, 12), s.width(480, 12)
    return shuffle_unit(inputs, outputs, True), image(s, 10, inputs, 224)


def shufflenet(s: Sizes) -> Made:
    c = s.width(24, 12)
    layers = [*conv_bn(3, c, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for outputs, depth in ((240, 3), (480, 7), (960, 3)):
        for i in range(depth):
            layers.append(shuffle_unit(c, s.width(outputs, 12), i == 0))
            c = s.width(outputs, 12)
    layers += [*conv_bn(c, s.width(1024)), nn.ReLU()]
    return Classified(layers, s.width(1024), 1000), image(s, 10, 3, 224, 32)


def regnet(s: Sizes) -> Made:
    layers: list[nn.Module] = []
    c = 3
    for width in map(s.width, (64, 128, 256)):
        for inputs in (c, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2, 2))
        c = width

    def mean(x: Tensor) -> Tensor:
        return torch.mean(x, dim=[2, 3])

    return Classified(layers, c, 10, mean), image(s, 8, 3, 224)


def double_conv(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for c in (inputs, outputs):
        layers += [nn.Conv2d(c, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.Softmax(dim=-1)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        widths = [width << i for i in range(5)]
        self.encoders = nn.ModuleList(map(double_conv, [inputs, *widths[:-1]], widths))
        self.pool = nn.MaxPool2d(2, 2)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in reversed(widths[:-1]))
        self.decoders = nn.ModuleList(double_conv(2 * c, c) for c in reversed(widths[:-1]))
        self.final = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for i, encoder in enumerate(self.encoders):
            x = encoder(x if i == 0 else self.pool(x))
            seen.append(x)
        seen.pop()
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat((up(x), seen.pop()), dim=1))
        y: Tensor = self.final(x)
        return y


def unet(s: Sizes) -> Made:
    return UNet(8, 4, s.width(64)), (s.batch(8), 8, s.side(64, 32), s.side(512))


class NetVlad(nn.Module):
    """Assigns descriptors to clusters, of which ``ghosts`` are dropped, and sums what is left of them in each."""

    def __init__(self, clusters: int, features: int, ghosts: int) -> None:
        super().__init__()
        self.count, self.features = clusters, features
        self.clusters = nn.Parameter(torch.randn(features, clusters + ghosts) / math.sqrt(features))
        self.bn = nn.BatchNorm1d(clusters + ghosts)
        self.centres = nn.Parameter(torch.randn(1, features, clusters) / math.sqrt(features))

    def forward(self, x: Tensor) -> Tensor:
        samples = x.size()[1]
        a = F.softmax(self.bn(torch.matmul(x.view(-1, self.features), self.clusters)), dim=1)
        a = a[:, : self.count].view(-1, samples, self.count)
        summed = torch.sum(a, dim=1, keepdim=True) * self.centres
        vlad = torch.matmul(a.transpose(1, 2), x.view(-1, samples, self.features)).transpose(1, 2) - summed
        return F.normalize(F.normalize(vlad).reshape(-1, self.count * self.features))


def netvlad(ghosts: int) -> Callable[[Sizes], Made]:
    def make(s: Sizes) -> Made:
        features = s.width(512)
        of_ghosts = s.width(ghosts) if ghosts else 0
        return NetVlad(s.width(32), features, of_ghosts), (s.batch(2048), s.side(100), features)

    return make


PROBLEMS = (
    Problem(2, 11, "ConvTranspose2d, BN, tanh, pool, GroupNorm", transposed_tanh),
    Problem(2, 15, "ConvTranspose3d, BN, less its mean", transposed_centred),
    Problem(2, 33, "Linear, scale, BN, batch 1024", gemm(1024, 8192, scaled_before, scale=random_scale)),
    Problem(2, 39, "Linear, scale, BN, batch 16384", gemm(16384, 4096, scaled_before, scale=random_scale)),
    Problem(2, 41, "Linear, BN, GELU, ReLU", gemm(16384, 4096, gelu_relu)),
    Problem(2, 52, "Conv2d, Mish, BN", mish_in_front),
    Problem(2, 72, "ConvTranspose3d, BN, two pools", transposed_pooled),
    Problem(2, 73, "Conv2d, BN, factor", scaled),
    Problem(2, 77, "ConvTranspose3d, factor, BN, mean", transposed_scaled),
    Problem(
        *(2, 84, "Linear, BN, scale, softmax"),
        gemm(
            *(1024, 8192, scaled_softmax),
            scale=lambda _: nn.Parameter(torch.ones(1)),
            softmax=lambda _: nn.Softmax(dim=1),
        ),
    ),
    Problem(
        *(2, 97, "Linear, BN, bias, quotient, Swish"),
        gemm(1024, 8192, biased_swish, bias=lambda _: nn.Parameter(torch.randn(1)), divisor=lambda _: 1.0),
    ),
    Problem(3, 8, "ResNet's basic block", one_basic_block),
    Problem(3, 9, "ResNet-18", resnet(2, basic_block, 1, (2, 2, 2, 2))),
    Problem(3, 10, "ResNet-101", resnet(10, bottleneck, 4, (3, 4, 23, 3))),
    Problem(3, 13, "DenseNet's transition", one_transition),
    Problem(3, 14, "DenseNet's block", one_dense_block),
    Problem(3, 15, "DenseNet-121", densenet((6, 12, 24, 16))),
    Problem(3, 16, "DenseNet-201", densenet((6, 12, 48, 32))),
    Problem(3, 19, "MobileNetV1", mobilenet_v1),
    Problem(3, 20, "MobileNetV2", mobilenet_v2),
    Problem(3, 21, "EfficientNet's MBConv", one_inverted),
    Problem(3, 22, "EfficientNet-B0", efficientnet_b0),
    Problem(3, 23, "EfficientNet-B1", efficientnet_b1),
    Problem(3, 24, "EfficientNet-B2", efficientnet_b2),
    Problem(3, 25, "ShuffleNet's unit", one_shuffle_unit),
    Problem(3, 26, "ShuffleNet", shufflenet),
    Problem(3, 27, "RegNet", regnet),
    Problem(3, 45, "U-Net with softmax", unet),
    Problem(3, 46, "NetVLAD with ghosts", netvlad(16)),
    Problem(3, 47, "NetVLAD", netvlad(0)),
)
