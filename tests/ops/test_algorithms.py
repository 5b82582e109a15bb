"""What the user asks for in place of the choice by rule, and what the package says that it would run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_conv_bn as fcb
from common import CONV_ALGORITHMS, CONV_STATISTICS, error
from fused_conv_bn import _loader

OPS = torch.ops.fused_conv_bn
HAS_CUDA_LIBRARY = len(_loader.loaded) > 1


def now() -> tuple[str, str] | None:
    """What this thread's convolutions run on CUDA; None without a library for it, which has nothing to set."""
    return OPS._use_algorithm("", "") if HAS_CUDA_LIBRARY else None


def of(algorithm: str, statistics: str) -> tuple[str, str] | None:
    return (algorithm, statistics) if HAS_CUDA_LIBRARY else None


# ---- use_algorithm ---------------------------------------------------------------------------------------------------


def test_blocks_nest() -> None:
    assert now() == of("default", "default")
    with fcb.use_algorithm("aten"):
        assert now() == of("aten", "default")
        with fcb.use_algorithm(statistics="from_input"):
            assert now() == of("aten", "from_input")
            with fcb.use_algorithm("by rule", "default"):
                assert now() == of("by rule", "default")
            assert now() == of("aten", "from_input")
        assert now() == of("aten", "default")
    assert now() == of("default", "default")


@pytest.mark.parametrize("algorithm", CONV_ALGORITHMS)
@pytest.mark.parametrize("statistics", CONV_STATISTICS)
def test_all_names(algorithm: str, statistics: str) -> None:
    with fcb.use_algorithm(algorithm, statistics):
        assert now() == of(algorithm, statistics)


def test_an_error_ends_the_block() -> None:
    with pytest.raises(ZeroDivisionError), fcb.use_algorithm("aten"):
        raise ZeroDivisionError
    assert now() == of("default", "default")


def test_other_threads_have_the_default() -> None:
    seen = []
    with fcb.use_algorithm("aten"):
        thread = threading.Thread(target=lambda: seen.append(now()))
        thread.start()
        thread.join()
    assert seen == [of("default", "default")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("fastest", None),
            "use_algorithm: algorithm is 'fastest', expected one of 'pointwise', 'gemm_sm90', 'stem_sm90', "
            "'stem_sm80', 'depthwise', 'gemm_sm80', 'aten', 'by rule' or 'default'",
        ),
        (
            ("aten", "anywhere"),
            "use_algorithm: statistics is 'anywhere', expected one of 'from_output', 'from_input', 'by rule' or 'default'",
        ),
    ],
)
def test_unknown_names(names: tuple[str, str | None], message: str) -> None:
    with fcb.use_algorithm("stem_sm80"):
        with pytest.raises(RuntimeError) as caught, fcb.use_algorithm(*names):
            pass
        assert str(caught.value).splitlines()[0] == message
        assert now() == of("stem_sm80", "default")


def many_channels(device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 72, 9, 8, device=device), torch.randn(6, 72, 3, 3, device=device)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_what_an_algorithm_does_not_cover(device: str) -> None:
    call = torch.compile(lambda x, w: fcb.conv_scale_shift(x, w, None, None), backend="aot_eager", fullgraph=True)
    x, w = many_channels(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = F.conv2d(x, w)
        for function in (fcb.conv_scale_shift, lambda x, w, *_: call(x, w)):
            assert error(function(x, w, None, None), expected) < 1e-5
            with fcb.use_algorithm("stem_sm90"):
                with pytest.raises(RuntimeError) as caught:
                    function(x, w, None, None)
                assert str(caught.value).splitlines()[0] == (
                    "conv_scale_shift: use_algorithm's algorithm is 'stem_sm90', which does not cover this convolution, "
                    "expected 'aten' for it, 'by rule' or 'default'"
                )
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_environment_has_the_defaults(device: str) -> None:
    """Read once: what changes later does not count. (Unknown names: tests/integrations/test_command_line.py)"""
    code = """
import os, torch, fused_conv_bn as fcb
os.environ["FUSED_CONV_BN_CONV"] = "depthwise"
x, w = torch.randn(2, 4, 9, 8, device="cuda"), torch.randn(6, 4, 3, 3, device="cuda")
def ask():
    print(fcb.explain(x, w, training=True))
ask()
with fcb.use_algorithm("stem_sm80", "from_output"):
    ask()
    with fcb.use_algorithm("default"):
        ask()
"""

    def output(**variables: str) -> list[str]:
        run = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    first, second, third = output(FUSED_CONV_BN_CONV="aten")
    assert (first, second.split()[0], third) == ("aten", "stem_sm80", "aten")


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_on_the_cpu() -> None:
    x, w = torch.randn(1, 3, 80, 200), torch.randn(32, 3, 3, 3)
    has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    direct = "direct_cpu" if has_vectors else "aten"
    for arguments in ({}, {"stride": (1, 1), "padding": [1, 0]}, {"residual": True, "training": True}):
        assert fcb.explain(x, w, **arguments) == direct
        with fcb.use_algorithm("depthwise"):  # on CUDA alone
            assert fcb.explain(x, w, **arguments) == direct
    assert fcb.explain(x, w, dilation=(1, 2)) == direct
    assert fcb.explain(x.double(), w.double()) == "aten"
    assert fcb.explain(x, w, stride=3) == "aten"
    assert fcb.explain(x[..., 0], w[..., 0]) == fcb.explain(x[..., None], w[..., None]) == "aten"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fcb.explain(x, w) == "aten"
    assert fcb.explain(x, w.requires_grad_()) == direct


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_explain_on_cuda(device: str) -> None:
    x, w = torch.randn(2, 8, 19, 18, device=device).half(), torch.randn(6, 8, 3, 3, device=device).half()
    deep, of_deep = torch.randn(2, 16, 9, 8, device=device).half(), torch.randn(16, 1, 3, 3, device=device).half()
    for algorithm in CONV_ALGORITHMS:
        with fcb.use_algorithm(algorithm):
            arguments = (deep, of_deep, 1, 1, 1, 16) if algorithm == "depthwise" else (x, w)
            if algorithm == "pointwise":
                arguments = x[..., :1, :1], w[..., :1, :1]
            if algorithm.startswith("gemm"):
                arguments = x.to(memory_format=torch.channels_last), w[:1].repeat(8, 1, 1, 1)
            assert fcb.explain(*arguments).split()[0] == algorithm
            with torch.autocast(device, dtype=torch.bfloat16):
                assert fcb.explain(*arguments).split()[0] == algorithm
    with fcb.use_algorithm("stem_sm90", "from_input"):
        assert "statistics" not in fcb.explain(x, w)
        assert fcb.explain(x, w, training=True).endswith(", statistics from the input")
    assert fcb.explain(*many_channels(device), training=True) == "aten"
    assert fcb.explain(x[:0], w) == "aten"
    rows = x[..., 0].contiguous(), w[..., 0].contiguous()
    assert fcb.explain(*rows) == fcb.explain(rows[0].unsqueeze(2), rows[1].unsqueeze(2))
    assert fcb.explain(rows[0], rows[1].transpose(1, 2).contiguous().transpose(1, 2)) == "aten"  # a permuted weight


def test_explain_checks_its_arguments(device: str) -> None:
    x, w = torch.randn(2, 3, 9, 8, device=device), torch.randn(6, 3, 3, 3, device=device)
    with pytest.raises(RuntimeError, match=r"^explain: weight has shape \[6, 2, 3, 3\], expected 3 in dimension 1"):
        fcb.explain(x, w[:, :2])
    with pytest.raises(RuntimeError, match=r"^explain: stride has 3 values, expected 1 or 2"):
        fcb.explain(x, w, (1, 1, 1))


def test_explain_refuses_what_is_no_tensor() -> None:
    w = torch.randn(4, 3, 3, 3)
    for value, what in ((None, "None"), ([1.0], "of type list"), (torch.nn.ReLU(), "of type ReLU")):
        with pytest.raises(TypeError, match=f"^explain: input is {what}, expected a tensor$"):
            fcb.explain(value, w)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"^explain: weight is {what}, expected a tensor$"):
            fcb.explain(w, value)  # type: ignore[arg-type]
