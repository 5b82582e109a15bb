"""Re-estimates BatchNorm's running statistics over a data set, with torch.optim.swa_utils.update_bn, unchanged.

That is what averaged weights (SWA, EMA), domain adaptation and calibration need: forward passes in training mode
without a gradient, which is where ConvBnScale2d runs its fused op. The data are crops of a picture that is drawn here:
nothing is downloaded, and nothing has to be installed.

    python examples/update_bn.py
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, Dataset

import fused_conv_bn as fcb
from fused_conv_bn._count import counted
from fused_conv_bn._progress import part


def picture(height: int = 600, width: int = 512) -> Tensor:
    """As (3, height, width) in [0, 1]: noise with large and small structures, about as a photograph has them."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, height, width)
    for octave in range(1, 8):
        noise = torch.rand(1, 3, 2**octave, 2**octave, generator=generator) - 0.5
        total += F.interpolate(noise, (height, width), mode="bicubic", align_corners=False) / 1.5**octave
    return (total[0] + 0.5).clamp(0, 1)


class Crops(Dataset[Tensor]):
    """Square crops of a picture, evenly spaced, as (3, size, size) in [0, 1]."""

    def __init__(self, count: int, size: int) -> None:
        self.image = picture()
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        height, width = (extent - self.size + 1 for extent in self.image.shape[1:])
        place = i * (height * width - 1) // max(1, self.count - 1)
        row, column = divmod(place, width)
        return self.image[:, row : row + self.size, column : column + self.size]


class Plain(nn.Module):
    """What ConvBnScale2d with a ReLU stands for."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **kwargs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def network(fused: bool) -> nn.Sequential:
    def block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        if fused:
            return fcb.ConvBnScale2d(in_channels, out_channels, 3, stride=stride, padding=1, activation="relu")
        return Plain(in_channels, out_channels, 3, stride=stride, padding=1)

    return nn.Sequential(block(3, 32, 1), block(32, 64, 2), block(64, 64, 1))


def run(count: int = 512, size: int = 64, batch: int = 64) -> float:
    """Prints the times of both; returns how much their statistics differ at most, relative to the largest of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(Crops(count, size), batch)
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        # The weights are those of the average, whose statistics no training step has seen.
        averaged = AveragedModel(network(fused).to(device))
        name = "fused" if fused else "plain"
        with part(name):  # seconds on a CPU
            update_bn(loader, averaged, device)  # once to warm up: it starts from nothing each time
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            update_bn(loader, averaged, device)
            if device == "cuda":
                torch.cuda.synchronize()
            elapsed_ms = (time.perf_counter() - start) * 1e3
        print(f"{name}: {counted(count, 'crop')} in {elapsed_ms:.0f} ms on {device}", flush=True)
        models.append(averaged)
    difference = 0.0
    for (name, old), new in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        if "running" in name:
            difference = max(difference, ((old - new).abs().max() / old.abs().max()).item())
    print(f"running statistics: largest difference {difference:.1e}")
    return difference


if __name__ == "__main__":
    run()
