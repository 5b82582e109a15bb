"""The models of the acceptance suite, with random weights, random BatchNorm state and small inputs."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import vision_ops

# ultralytics, when it is imported, asks the network whether there is one, and writes a file of settings.
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="ultralytics-"))
vision_ops.provide()

import segmentation_models_pytorch as smp  # noqa: E402
import timm  # noqa: E402
import torchvision.models as tv  # noqa: E402
import torchvision.models.detection as tv_detection  # noqa: E402
from torchvision.models.detection import backbone_utils  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

with mock.patch.dict(os.environ):  # it sets OMP_NUM_THREADS, for the processes of later tests as well
    from ultralytics.nn import tasks
    from ultralytics.nn.modules.head import RTDETRDecoder

import fused_conv_bn as fcb  # noqa: E402


class Problem73(nn.Module):
    """KernelBench, level 2, problem 73: a convolution, its BatchNorm, a number as a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.scaling_factor = nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), 2.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x)) * self.scaling_factor
        return y


# Few boxes, of small images: where they are selected is of no interest here.
_FEW: dict[str, Any] = dict(
    min_size=64,
    max_size=128,
    rpn_pre_nms_top_n_test=50,
    rpn_post_nms_top_n_test=8,
    rpn_pre_nms_top_n_train=50,
    rpn_post_nms_top_n_train=8,
    box_detections_per_img=4,
    box_batch_size_per_image=8,
)


def faster_rcnn() -> nn.Module:
    """Frozen BatchNorms: an eps of 0, as with the published weights, in two of the four layers."""
    backbone = backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    for layer in (backbone.body.layer1, backbone.body.layer3):
        for m in layer.modules():
            if isinstance(m, FrozenBatchNorm2d):
                m.eps = 0.0
    return tv_detection.FasterRCNN(backbone, num_classes=5, **_FEW)


def mask_rcnn() -> nn.Module:
    return tv_detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=5, **_FEW)


@contextmanager
def _recorded(owner: Any, name: str, values: Callable[..., Any]) -> Iterator[list[Any]]:
    """What ``values`` makes of the arguments of each call of ``owner.name``."""
    real, seen = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(values(*args, **kwargs))
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield seen


def _rpn_outputs() -> Any:
    return _recorded(tv_detection.rpn, "concat_box_prediction_layers", lambda *a: [[t.clone() for t in b] for b in a])


def _roi_outputs(model: Any) -> list[Tensor]:
    """What the heads behind the selection make of features that do not depend on it."""
    dtype = next(model.parameters()).dtype
    heads = [(model.roi_heads.box_head, 7), (model.roi_heads.mask_head, 14)]
    return [h(torch.randn(3, 256, size, size).to(dtype)) for h, size in heads if h is not None]


def _decoder_input() -> Any:
    return _recorded(RTDETRDecoder, "_get_decoder_input", lambda self, feats, *a: feats.clone())


@dataclass(frozen=True)
class Case:
    """A model, two inputs' shapes, and the groups that fuse() finds: those of a convolution with its BatchNorm."""

    make: Callable[[], nn.Module]
    groups: dict[str, int]
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 64, 64), (1, 3, 96, 64))
    before_selection: Callable[[], Any] | None = None  # in a detector: records what its boxes are selected from
    alone: dict[str, int] = field(default_factory=dict)  # BatchNorms behind something else
    without: dict[str, int] = field(default_factory=dict)  # convolutions without a BatchNorm
    never_called: frozenset[str] = frozenset()  # modules that the forward does not use

    def inputs(self, index: int) -> Any:
        """The argument of the model."""
        x = torch.randn(self.shapes[index], generator=torch.Generator().manual_seed(index))
        return [image.sigmoid() for image in x] if self.before_selection is _rpn_outputs else x

    def targets(self, index: int) -> Any:
        """What a detector takes in training mode besides."""
        box = torch.tensor([[4.0, 6.0, 40.0, 50.0]])
        mask = torch.zeros(1, *self.shapes[index][2:], dtype=torch.uint8)
        mask[:, 6:50, 4:40] = 1
        return [dict(boxes=box, labels=torch.tensor([1]), masks=mask) for _ in range(self.shapes[index][0])]

    def run(self, model: nn.Module, index: int) -> list[Tensor]:
        """The tensors that a call gives: in a detector, what its boxes are selected from."""
        torch.manual_seed(3)
        x = self.inputs(index)
        if any(t.dtype == torch.float64 for t in model.parameters()):
            x = [t.double() for t in x] if isinstance(x, list) else x.double()
        targets = (self.targets(index),) if model.training and self.before_selection is _rpn_outputs else ()
        if self.before_selection is None:
            return tensors(model(x, *targets))
        with self.before_selection() as seen:
            model(x, *targets)
        found = tensors(seen[-1])  # a first call is compared, and so makes others
        return found + (_roi_outputs(model) if self.before_selection is _rpn_outputs else [])


def tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def random_state(model: nn.Module) -> nn.Module:
    """Random weights and BatchNorms of a size that neither fades nor grows through many layers.

    Otherwise roundings become large: a gate whose argument is 1e4 is a step, and eager in float32 is wrong as well.
    """
    generator = torch.Generator().manual_seed(7)

    def between(low: float, high: float, t: Tensor) -> None:
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)):
                bound = (3 / m.weight[0].numel()) ** 0.5
                between(-bound, bound, m.weight)
            elif isinstance(getattr(m, "running_mean", None), Tensor):
                between(-0.2, 0.2, m.running_mean)
                between(0.5, 1.5, m.running_var)
                between(0.8, 1.2, m.weight)
                between(-0.2, 0.2, m.bias)
    return model.eval()


def without_chance(model: nn.Module) -> nn.Module:
    """No dropout and no stochastic depth: what is drawn for float64 is not what is drawn for float32."""
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if hasattr(m, "_drop_connect_rate"):
            m._drop_connect_rate = 0.0
    return model


def kind(group: str) -> str:
    """A group without its activation's name: ``act``, ``add-act``, ``act-add``, ``add``, ``bare``, ``factor`` or ``cat-act``."""
    words = group.split()
    behind = ["add" if w == "add" else "act" for w in words[words.index("bn") + 1 :]]
    return "factor" if "*" in group else "-".join(words[:1] * (words[0] == "cat") + behind) or "bare"


def found(model: nn.Module) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """How many groups the report has: convolutions with a BatchNorm by kind, BatchNorms without one, all others."""
    groups = fcb.report(model).groups()
    with_bn = Counter(kind(g) for g in groups if g.startswith("conv bn"))
    alone = Counter(kind(g) for g in groups if g.split()[0] in ("bn", "cat", "convT", "linear"))
    others = Counter(g for g in groups if "bn" not in g.split() and g not in ("max pool", "mean"))
    return dict(with_bn), dict(alone), dict(others)


CASES: dict[str, Case] = {
    "problem 73": Case(Problem73, {"factor": 1}, shapes=((2, 8, 16, 16), (1, 8, 9, 20))),
    "resnet50": Case(lambda: tv.resnet50(weights=None), {"act": 33, "add-act": 16, "bare": 4}),
    "mobilenet_v2": Case(lambda: tv.mobilenet_v2(weights=None), {"act": 35, "add": 10, "bare": 7}),
    "mobilenetv3_large_100": Case(
        lambda: timm.create_model("mobilenetv3_large_100"),
        {"act": 31, "add": 10, "bare": 5},
        without={"conv relu": 8, "conv hardsigmoid": 8, "conv hardswish": 1, "gate": 8},
    ),
    "tf_efficientnetv2_s": Case(
        lambda: timm.create_model("tf_efficientnetv2_s"),
        {"act": 65, "add": 33, "bare": 5, "act-add": 2},
        alone={"act": 5},
        without={"conv silu": 30, "conv sigmoid": 30, "gate": 30},
    ),
    "densenet121": Case(lambda: tv.densenet121(weights=None), {"act": 59}, alone={"cat-act": 62}),
    "faster_rcnn": Case(
        faster_rcnn,
        {"act": 33, "add-act": 16, "bare": 4},
        without={"conv relu": 1},
        before_selection=_rpn_outputs,
    ),
    "mask_rcnn": Case(
        mask_rcnn,
        {"act": 41, "add-act": 16, "bare": 12},
        without={"conv relu": 2},
        before_selection=_rpn_outputs,
    ),
    "yolo11n": Case(
        lambda: tasks.DetectionModel("yolo11n.yaml", verbose=False),
        {"act": 66, "act-add": 11, "add": 3, "bare": 1},
    ),
    "rtdetr-l": Case(
        lambda: tasks.RTDETRDetectionModel("rtdetr-l.yaml", verbose=False),
        {"act": 59, "act-add": 6, "add": 12, "bare": 45},
        shapes=((1, 3, 128, 128), (1, 3, 160, 128)),
        before_selection=_decoder_input,
    ),
    "unet++": Case(
        lambda: smp.UnetPlusPlus("efficientnet-b0", encoder_weights=None),
        {"act": 22},
        alone={"act": 32, "add": 9, "bare": 7},
        without={"gate": 16},
        never_called=frozenset({"encoder._conv_head", "encoder._bn1"}),
    ),
    "mobileone_s0": Case(lambda: timm.create_model("mobileone_s0"), {"add": 148, "bare": 43}, alone={"add-act": 35}),
    "r3d_18": Case(
        lambda: tv.video.r3d_18(weights=None),
        {"act": 9, "add-act": 8, "bare": 3},
        shapes=((1, 3, 4, 32, 32), (2, 3, 3, 24, 32)),
    ),
    "regnetv_040": Case(
        lambda: timm.create_model("regnetv_040"),
        {"act": 23},
        alone={"act": 43},
        without={"conv silu": 22, "conv sigmoid": 22, "conv add": 21, "conv add silu": 1, "gate": 22},
    ),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return random_state(CASES[name].make())
