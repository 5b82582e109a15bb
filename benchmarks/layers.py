"""The convolutions that the benchmark measures: problem 73, first and depthwise layers, ResNet-50's and MobileNetV2's;
problem 73 and some of the layers in training mode; and some layers with every activation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fused_conv_bn._count import counted

from .common import LAYOUTS, SCALING_FACTOR, dtype_name

Extent = int | tuple[int, int]  # the same in height and width, or of each


def pair(extent: Extent) -> tuple[int, int]:
    return (extent, extent) if isinstance(extent, int) else extent


@dataclass(frozen=True)
class Layer:
    """A convolution of square images with square results, then BatchNorm, a factor, a residual and an activation."""

    inputs: int
    outputs: int
    kernel: Extent
    side: int  # of the input's images
    stride: int = 1
    padding: Extent = 0
    groups: int = 1
    bias: bool = False
    scaling_factor: float = 1.0
    activation: str = "none"
    residual: bool = False

    @property
    def output_side(self) -> int:
        sides = zip(pair(self.kernel), pair(self.padding), strict=True)
        (side,) = {(self.side + 2 * padding - kernel) // self.stride + 1 for kernel, padding in sides}
        return side

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.outputs, self.inputs // self.groups, *pair(self.kernel)

    @property
    def flop(self) -> int:
        """Of one image."""
        return 2 * math.prod(self.weight_shape) * self.output_side**2

    @property
    def elements(self) -> int:
        """Of one image that have to be moved: the inputs that a window covers, the residual, the results."""
        height, width = (self.side * min(1.0, kernel / self.stride) for kernel in pair(self.kernel))
        return int(self.inputs * height * width) + self.output_elements * (2 if self.residual else 1)

    @property
    def output_elements(self) -> int:
        return self.outputs * self.output_side**2

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        what = f"{self.inputs}->{self.outputs}"
        if self.groups > 1:
            depthwise = self.groups == self.inputs == self.outputs
            what = f"{self.outputs} depthwise" if depthwise else f"{what} in {counted(self.groups, 'group')}"
        height, width = pair(self.kernel)
        behind = [*(["add"] if self.residual else []), *([self.activation] if self.activation != "none" else [])]
        return " ".join([f"{height}x{width}{stride} {what} {self.side}x{self.side}", *behind])


@dataclass(frozen=True)
class ConvCase:
    group: str  # what a geometric mean is taken of
    layer: Layer
    batch: int
    dtype: torch.dtype
    layout: str
    allow_tf32: bool = False
    train: bool = False  # with batch statistics, in training mode
    count: int = 1  # layers of the network that are this one
    forced: tuple[str, ...] = ("aten",)  # algorithms to measure besides the one that the rule chooses
    with_op: bool = False  # measure the op besides the module
    compile_modes: tuple[str, ...] = ()

    @property
    def kind(self) -> ConvCase:
        """The same for cases that differ in nothing that the choice of an algorithm depends on."""
        layer = replace(self.layer, bias=False, scaling_factor=1.0, activation="none")
        return ConvCase("", layer, self.batch, self.dtype, self.layout, self.allow_tf32, self.train)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.layer.inputs, self.layer.side, self.layer.side

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.layer.outputs, self.layer.output_side, self.layer.output_side

    @property
    def flop(self) -> int:
        return self.batch * self.layer.flop

    @property
    def bytes(self) -> int:
        return (self.batch * self.layer.elements + math.prod(self.layer.weight_shape)) * self.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        return math.prod(self.output_shape) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = f"{dtype_name(self.dtype)}{' TF32' if self.allow_tf32 else ''}"
        return f"{self.layer} batch {self.batch} {dtype} {self.layout}{' train' if self.train else ''}"


# ---- problem 73, first layers ----------------------------------------------------------------------------------------

PROBLEM_73 = Layer(8, 64, 3, 128, bias=True, scaling_factor=SCALING_FACTOR)
FIRST_LAYERS = [
    Layer(3, 64, 7, 224, 2, 3, activation="relu"),
    *(Layer(3, outputs, 3, 224, stride, 1, activation="relu") for outputs in (32, 64) for stride in (1, 2)),
]

# ---- networks, as torchvision defines them, at 224x224 ---------------------------------------------------------------


def resnet50_layers() -> Iterator[Layer]:
    yield FIRST_LAYERS[0]
    inputs, side = 64, 56
    for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            outputs = 4 * width
            yield Layer(inputs, width, 1, side, activation="relu")
            yield Layer(width, width, 3, side, stride, 1, activation="relu")
            if block == 0:
                yield Layer(inputs, outputs, 1, side, stride)
            side //= stride
            yield Layer(width, outputs, 1, side, activation="relu", residual=True)
            inputs = outputs


def resnet18_layers() -> Iterator[Layer]:
    yield FIRST_LAYERS[0]
    inputs, side = 64, 56
    for outputs, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for block in range(2):
            stride = first_stride if block == 0 else 1
            yield Layer(inputs, outputs, 3, side, stride, 1, activation="relu")
            if stride == 2:
                yield Layer(inputs, outputs, 1, side, stride)
            side //= stride
            yield Layer(outputs, outputs, 3, side, 1, 1, activation="relu", residual=True)
            inputs = outputs


def mobilenet_v2_layers() -> Iterator[Layer]:
    yield Layer(3, 32, 3, 224, 2, 1, activation="relu6")
    inputs, side = 32, 112
    blocks = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, repeats, first_stride in blocks:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            width = inputs * expansion
            if expansion > 1:
                yield Layer(inputs, width, 1, side, activation="relu6")
            yield Layer(width, width, 3, side, stride, 1, groups=width, activation="relu6")
            side //= stride
            yield Layer(width, outputs, 1, side, residual=stride == 1 and inputs == outputs)
            inputs = outputs
    yield Layer(inputs, 1280, 1, side, activation="relu6")


# ---- the cases -------------------------------------------------------------------------------------------------------

FLOAT32_NCHW = (torch.float32, "nchw")
FLOAT16_CHANNELS_LAST = (torch.float16, "channels_last")
# By name on the command line: what the tables call it, and its batch.
GROUPS = {
    "problem_73": ("problem 73", 128),
    "first_layers": ("first layers", 32),
    "depthwise": ("depthwise", 64),
    "resnet50": ("ResNet-50", 32),
    "mobilenetv2": ("MobileNetV2", 64),
    "train": ("problem 73, training", 128),
}
TRAINED_LAYERS = {  # by the group that has their batch: what is measured in training mode besides problem 73
    "first_layers": (FIRST_LAYERS[0], FIRST_LAYERS[3]),
    "depthwise": tuple(Layer(c, c, 3, side, 1, 1, groups=c, activation="relu6") for c, side in ((144, 56), (576, 14))),
    "resnet50": (
        Layer(64, 64, 3, 56, 1, 1, activation="relu"),
        Layer(64, 256, 1, 56, activation="relu", residual=True),
        Layer(512, 512, 3, 7, 1, 1, activation="relu"),
    ),
}
# A compile takes seconds. Autotuned ones take most, so the networks' layers go without them but for these.
AUTOTUNED = ("compile max-autotune freezing",)
COMPILED_LAYERS = {
    Layer(64, 64, 3, 56, 1, 1, activation="relu"),
    Layer(64, 256, 1, 56, activation="relu", residual=True),
    Layer(512, 512, 3, 7, 1, 1, activation="relu"),
    Layer(512, 2048, 1, 7, activation="relu", residual=True),
    Layer(96, 576, 1, 14, activation="relu6"),
    Layer(960, 160, 1, 7, residual=True),
}
STEP_COMPILED_LAYERS = {FIRST_LAYERS[0], *TRAINED_LAYERS["resnet50"]}


def problem_73_cases(device: str) -> Iterator[ConvCase]:
    modes: tuple[str, ...]
    name, batch = GROUPS["problem_73"]
    if device == "cpu":
        for dtype, layout in (FLOAT32_NCHW, (torch.float32, "channels_last"), (torch.bfloat16, "channels_last")):
            modes = ("compile", "compile freezing")
            yield ConvCase(name, PROBLEM_73, 8, dtype, layout, with_op=True, compile_modes=modes)
        return
    forced = ("aten", "stem_sm80")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        modes = AUTOTUNED if dtype == torch.bfloat16 else ("compile", "compile max-autotune", *AUTOTUNED)
        for layout in LAYOUTS:
            case = ConvCase(name, PROBLEM_73, batch, dtype, layout, forced=forced, with_op=True, compile_modes=modes)
            yield case
            if dtype == torch.float32:
                yield replace(case, allow_tf32=True, compile_modes=())  # those of the row above


def train_cases(device: str) -> Iterator[ConvCase]:
    """Problem 73 as in evaluation, but for TF32, which the module does not ask for; on a GPU some layers too."""
    name = GROUPS["train"][0]
    for case in problem_73_cases(device):
        if not case.allow_tf32:
            autotuned = (case.dtype, case.layout) == FLOAT32_NCHW and device == "cuda"
            modes = ("compile", "compile max-autotune") if autotuned else ("compile",)
            yield replace(case, group=name, train=True, compile_modes=modes)
    if device == "cuda":
        for group, layers in TRAINED_LAYERS.items():
            for layer in layers:
                case = ConvCase("layers, training", layer, GROUPS[group][1], *FLOAT16_CHANNELS_LAST, train=True)
                yield replace(case, compile_modes=("compile",))


def network_cases(group: str, layers: Iterator[Layer]) -> Iterator[ConvCase]:
    name, batch = GROUPS[group]
    counts = Counter(layers)
    for dtype, layout in (FLOAT16_CHANNELS_LAST, FLOAT32_NCHW):
        for layer, count in counts.items():
            modes = AUTOTUNED if layer in COMPILED_LAYERS and dtype == torch.float16 else ()
            series = f"{name}, {dtype_name(dtype)} {layout}"
            yield ConvCase(series, layer, batch, dtype, layout, count=count, compile_modes=modes)


# ---- every activation ------------------------------------------------------------------------------------------------

DEPTHWISE_3X3 = Layer(144, 144, 3, 56, 1, 1, groups=144)
DEPTHWISE_5X5 = Layer(240, 240, 5, 28, 1, 2, groups=240)
STEM = Layer(3, 32, 3, 224, 2, 1)
ACTIVATION_LAYERS = (  # with their batch
    (STEM, 64),
    (PROBLEM_73, 32),
    (PROBLEM_73, 128),
    (Layer(3, 64, 7, 224, 2, 3), 32),
    (Layer(16, 48, 3, 128, 1, 1), 8),
    (DEPTHWISE_3X3, 64),
    (DEPTHWISE_5X5, 32),
    (STEM, 1),
    (DEPTHWISE_3X3, 1),
)
ACTIVATION_KINDS = (
    *((torch.float16, layout) for layout in LAYOUTS),
    (torch.bfloat16, "channels_last"),
    *((torch.float32, layout) for layout in LAYOUTS),
)
QUICK_ACTIVATION_LAYERS = ((STEM, 1), (DEPTHWISE_3X3, 1))


def activation_cases(device: str, quick: bool) -> list[ConvCase]:
    """Without an activation: each is measured with all of them."""
    forced = ("aten",) if device == "cuda" else ()
    kinds = (FLOAT16_CHANNELS_LAST, FLOAT32_NCHW) if device == "cuda" else (FLOAT32_NCHW,)
    return [
        ConvCase("activations", layer, batch, dtype, layout, forced=forced)
        for layer, batch in (QUICK_ACTIVATION_LAYERS if quick or device == "cpu" else ACTIVATION_LAYERS)
        for dtype, layout in (kinds if quick or device == "cpu" else ACTIVATION_KINDS)
    ]


# ---- grad mode -------------------------------------------------------------------------------------------------------


def grad_mode_cases(device: str) -> list[ConvCase]:
    """Problem 73 in training mode, as KernelBench times it, and in evaluation."""
    batch = GROUPS["problem_73"][1] if device == "cuda" else 8
    return [
        ConvCase("grad mode", PROBLEM_73, batch, dtype, layout, train=train, compile_modes=("compile",))
        for dtype, layout in (FLOAT32_NCHW, (torch.bfloat16, "channels_last"))
        for train in (True, False)
    ]


# ---- steps: forward and backward -------------------------------------------------------------------------------------

EAGER_COMPILED, OURS_COMPILED = "compile", "ours compiled"  # rivals that torch.compile makes of eager's model and ours


@dataclass(frozen=True)
class StepCase:
    case: ConvCase
    x: bool = True  # whether the input requires a gradient, and the residual
    frozen: bool = False  # BatchNorm's weight and bias require none
    compiled: tuple[str, ...] = ()  # of the two names above

    @property
    def in_network(self) -> bool:
        return self.case.layer != PROBLEM_73

    def __str__(self) -> str:
        if self.in_network:
            return str(self.case)
        return f"{self.case}{', frozen BN' if self.frozen else ''}, {'with' if self.x else 'without'} x"


def step_cases(device: str) -> list[StepCase]:
    """Problem 73 in training, with frozen statistics, and with frozen BatchNorm, then layers of networks in training.

    Those that are compiled with both come first, as the limit of compile time ends them."""
    on_cuda = device == "cuda"
    batch = GROUPS["problem_73"][1] if on_cuda else 8
    both = (EAGER_COMPILED, OURS_COMPILED)
    cases = []
    for x in (True, False):
        # Many CPUs take a hundred times as long for 16 bits.
        other = torch.bfloat16 if on_cuda else torch.float32
        for dtype, layout in (FLOAT32_NCHW, (other, "channels_last")):
            case = ConvCase("problem 73, step", PROBLEM_73, batch, dtype, layout, train=True)
            evaluation = replace(case, train=False)
            cases += [
                StepCase(case, x, compiled=both if x else (EAGER_COMPILED,)),
                StepCase(evaluation, x, True, both if x else ()),
                StepCase(evaluation, x),
            ]
    networks = {"ResNet-50": (resnet50_layers(), 32, FLOAT16_CHANNELS_LAST)}
    if not on_cuda:
        networks = {
            "ResNet-18": (resnet18_layers(), 2, FLOAT32_NCHW),
            "MobileNetV2": (mobilenet_v2_layers(), 2, FLOAT32_NCHW),
        }
    for network, (layers, of_network, kind) in networks.items():
        first, *others = Counter(layers).items()
        for layer, count in (first, *others):
            group = f"{network}, step, {dtype_name(kind[0])} {kind[1]}"
            case = ConvCase(group, layer, of_network, *kind, train=True, count=count)
            # A network's first layer sees data, which require no gradient.
            compiled = both if on_cuda and layer in STEP_COMPILED_LAYERS else ()
            cases.append(StepCase(case, layer != first[0], compiled=compiled))
    return cases


def conv_cases(group: str, device: str) -> list[ConvCase]:
    """What is measured of a group of GROUPS."""
    name, batch = GROUPS[group]
    if group == "problem_73":
        return list(problem_73_cases(device))
    if group == "train":
        return list(train_cases(device))
    if group == "resnet50":
        return list(network_cases(group, resnet50_layers()))
    if group == "mobilenetv2":
        return list(network_cases(group, mobilenet_v2_layers()))
    depthwise = dict.fromkeys(layer for layer in mobilenet_v2_layers() if layer.groups > 1)
    layers = FIRST_LAYERS if group == "first_layers" else depthwise
    series = f"{name}, float16 channels_last"
    return [ConvCase(series, layer, batch, *FLOAT16_CHANNELS_LAST, compile_modes=AUTOTUNED) for layer in layers]
