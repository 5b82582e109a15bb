"""The kernels' arithmetic of elements, channels and launches, on the CPU and against plain division.

csrc/kernels/elementwise/memory_format.h is compiled into a small program, its largest launch made a variable of a few elements, so
that the borders between launches, which GPU tests reach only with 2^30 elements, fall everywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
LIMIT = "constexpr int64_t kMaxLaunchElements = int64_t{1} << 30;"

PROGRAM = r"""
#include <cstdio>
#include <initializer_list>

#include "memory_format.h"

using namespace fused_conv_bn;

int failures = 0;

void expect(bool ok, const char* what, int64_t a, int64_t b, int64_t c, int64_t d) {
  if (!ok && ++failures <= 10) {
    std::printf("%s: %lld %lld %lld %lld\n", what, (long long)a, (long long)b, (long long)c, (long long)d);
  }
}

void fast_div(uint32_t d) {
  const FastDiv by(d);
  for (uint64_t n : {uint64_t{0}, uint64_t{1}, uint64_t{d} - 1, uint64_t{d}, uint64_t{d} + 1, uint64_t{7} * d - 1,
                     uint64_t{7} * d, uint64_t{(1u << 31) - 1}, uint64_t{(1u << 31) - 2}, uint64_t{1} << 30}) {
    if (n < (uint64_t{1} << 31)) {
      expect(by.div(n) == n / d, "FastDiv(d), n, got", d, n, by.div(n), n / d);
    }
  }
}

// The launch loop of scale_shift.cuh: every element is covered once, by a map that gives its channel.
void launches(const Shape& shape, int misalignment, int vector) {
  const int64_t max_elements = kMaxLaunchElements;
  int64_t count = 0;
  for (int64_t begin = 0; begin < shape.numel; begin += count) {
    const int lead = static_cast<int>((misalignment + begin) % vector);
    count = std::min(shape.numel - begin, max_elements);
    const ChannelMap map = make_channel_map(shape, begin, lead, count);
    expect(count > 0, "no progress at", begin, shape.channels, shape.inner, lead);
    if (count <= 0) {
      return;
    }
    for (int64_t e = begin; e < begin + count; ++e) {
      uint32_t remaining;
      const uint32_t c = map.channel(static_cast<uint32_t>(e - begin + lead), remaining);
      expect(c == e / shape.inner % shape.channels, "channel of (channels, inner, e, misalignment)", shape.channels,
             shape.inner, e, misalignment);
      const int64_t left = shape.inner - e % shape.inner;
      expect(remaining == left || (shape.inner > max_elements && remaining >= count - (e - begin)),
             "remaining of (channels, inner, e, misalignment)", shape.channels, shape.inner, e, misalignment);
    }
  }
}

int main() {
  for (uint32_t d = 1; d < 5000; ++d) fast_div(d);
  for (uint32_t bit = 12; bit < 31; ++bit) {
    for (int delta = -2; delta <= 2; ++delta) fast_div((1u << bit) + delta);
  }
  fast_div((1u << 31) - 1);
  for (int64_t channels : {1, 2, 3, 5, 8}) {
    for (int64_t inner : {1, 2, 3, 7, 8, 15, 16, 17, 33, 50}) {
      for (int64_t batch : {1, 2, 3}) {
        for (int misalignment = 0; misalignment < 8; ++misalignment) {
          for (int64_t limit : {8, 16, 24, 1000}) {
            kMaxLaunchElements = limit;
            launches({batch * channels * inner, channels, inner}, misalignment, 8);
          }
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
"""


def test_channels_and_launches(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.fail("a C++ compiler is needed, as for the libraries", pytrace=False)
    header = (CSRC / "kernels" / "elementwise" / "memory_format.h").read_text()
    assert header.count(LIMIT) == 1
    (tmp_path / "memory_format.h").write_text(header.replace(LIMIT, "inline int64_t kMaxLaunchElements = 8;"))
    source, program = tmp_path / "test.cpp", tmp_path / "test"
    source.write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{CSRC}", source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
