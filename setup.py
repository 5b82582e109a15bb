"""Builds the libraries of fused_conv_bn: _cpu.so always, and _cu12.so or _cu13.so where a CUDA compiler is found.

The libraries use only the LibTorch stable ABI of torch 2.10 and contain no Python symbol, so that one wheel serves
every later torch and every Python: they are plain shared libraries that ``torch.ops.load_library`` opens.

Environment:
    FUSED_CONV_BN_CUDA     "0": build without CUDA. "12", "13", "12 13": build for these.
                           "1": build for torch's CUDA, or, if it has none, for the compiler's.
                           Default: build for torch's CUDA, if it has one.
                           What is asked for and has no compiler is an error.
    CUDA_HOME              a CUDA toolkit to use instead of the one from PyPI, the one in PATH, and /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST   compute capabilities to compile for, as for any PyTorch extension ("9.0" or "8.0;9.0+PTX").
                           Kernels that not all of them can run are compiled for those that can.
                           Default: those in wheels/matrix.json.
    CXX                    the C++ compiler. Default: c++.
    MAX_JOBS               how many compilers run at a time. Default: ninja's.
    FUSED_CONV_BN_GLIBC    "2.28": as the wheels are: linked for this glibc, with PyPI's ziglang, and reproducible.
    FUSED_CONV_BN_LIBRARIES    paths of libraries, with colons between: take these and compile none (wheels/build.py).
"""

from setuptools import setup

from build_tools import readme
from build_tools.commands import BdistWheel, BuildExt, extensions

if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
        long_description=readme.of_package(),
        long_description_content_type="text/markdown",
    )
