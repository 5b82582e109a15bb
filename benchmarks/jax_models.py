"""ResNet-50 and MobileNetV2 in JAX, for the benchmark of whole models: by lax alone, NHWC, BatchNorms folded into the
weights before. A program of its own, ``python -m benchmarks.jax_models FOLDER``, which imports neither torch nor this
package: what happens to it, or to the device in it, is no trouble of the benchmark's.

FOLDER/arrays.npz has x (NHWC), the weights (HWIO) and shifts of the convolutions in the order of torch's modules, and
the classifier's. It leaves y.npy there, and result.json: times, seconds of compiling, versions.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WARM_UPS = 3
Convolutions = Iterator[tuple[Any, Any]]


def convolution(lax: Any, x: Any, pair: tuple[Any, Any], stride: int = 1, depthwise: bool = False) -> Any:
    weight, shift = pair
    padding = weight.shape[0] // 2
    y = lax.conv_general_dilated(
        *(x, weight, (stride, stride), [(padding, padding)] * 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if depthwise else 1,
    )
    return y + shift


def resnet50(jax: Any, x: Any, pairs: Convolutions) -> Any:
    lax, relu = jax.lax, jax.nn.relu
    x = relu(convolution(lax, x, next(pairs), 2))
    low = jax.numpy.array(-float("inf"), x.dtype)
    x = lax.reduce_window(x, low, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for blocks, first_stride in ((3, 1), (4, 2), (6, 2), (3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            first, second, third = next(pairs), next(pairs), next(pairs)
            shortcut = convolution(lax, x, next(pairs), stride) if block == 0 else x
            y = relu(convolution(lax, x, first))
            y = relu(convolution(lax, y, second, stride))
            x = relu(convolution(lax, y, third) + shortcut)
    return x


def mobilenet_v2(jax: Any, x: Any, pairs: Convolutions) -> Any:
    lax, relu6 = jax.lax, jax.nn.relu6
    x = relu6(convolution(lax, x, next(pairs), 2))
    blocks = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
    for expansion, repeats, first_stride in blocks:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            y = relu6(convolution(lax, x, next(pairs))) if expansion > 1 else x
            y = relu6(convolution(lax, y, next(pairs), stride, depthwise=True))
            y = convolution(lax, y, next(pairs))
            x = x + y if x.shape == y.shape else y
    return relu6(convolution(lax, x, next(pairs)))


MODELS: dict[str, Callable[[Any, Any, Convolutions], Any]] = {"ResNet-50": resnet50, "MobileNetV2": mobilenet_v2}


def run(folder: Path) -> dict[str, Any]:
    jax: Any = importlib.import_module("jax")
    asked = json.loads((folder / "asked.json").read_text())
    platform = jax.devices()[0].platform
    if (platform == "gpu") != (asked["device"] == "cuda"):
        return {"problem": f"JAX runs on {platform} here, the benchmark on {asked['device']}"}
    with np.load(folder / "arrays.npz") as arrays:
        given = {name: jax.device_put(arrays[name]) for name in arrays}
    convolutions = [(given[f"w{i}"], given[f"b{i}"]) for i in range(asked["convolutions"])]

    def forward(x: Any, pairs: Any, matrix: Any, bias: Any) -> Any:
        y = MODELS[asked["model"]](jax, x, iter(pairs))
        return jax.numpy.mean(y, (1, 2)) @ matrix + bias

    arguments = given["x"], convolutions, given["matrix"], given["bias"]
    start = time.perf_counter()
    call = jax.jit(forward).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    np.save(folder / "y.npy", np.asarray(call(*arguments)).astype(np.float64))
    for _ in range(WARM_UPS):
        call(*arguments).block_until_ready()
    times = []
    for _ in range(asked["repeats"]):
        start = time.perf_counter()
        for _ in range(asked["calls"]):
            y = call(*arguments)
        y.block_until_ready()
        times.append((time.perf_counter() - start) * 1e6 / asked["calls"])
    return {"us": times, "compile_s": compile_s, "platform": platform, "version": jax.__version__}


if __name__ == "__main__":
    (Path(sys.argv[1]) / "result.json").write_text(json.dumps(run(Path(sys.argv[1]))))
