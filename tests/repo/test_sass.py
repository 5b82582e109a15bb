"""What the compilers made of the sources, read from the libraries built in place; no GPU is needed.

Every elementwise kernel reads and writes 16 bytes at a time and keeps nothing in local memory, on every architecture in
the CUDA library, and the libraries need nothing of the machine and of torch beyond what is stable. The rules are those
that wheels/audit.py holds wheels to.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import elf
import sass
from fused_conv_bn import _loader


@pytest.fixture(scope="module", params=["cu13", "cu12"])
def cuda_library(request: pytest.FixtureRequest) -> Path:
    library = _loader.shipped().get(request.param)
    if library is None:
        # A tree has the library of its torch; the wheel has both.
        if request.param == "cu12" and not (torch.version.cuda or "").startswith("12."):
            pytest.skip("_cu12.so is not built")
        if torch.version.cuda is None and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_CUDA") or 0):
            pytest.skip("built without CUDA, for a torch without CUDA")
        pytest.fail(f"_cu13.so is missing from {_loader.PACKAGE}: make test builds it", pytrace=False)
    return library


# ---- the libraries ---------------------------------------------------------------------------------------------------


def test_kernels_move_16_bytes_and_spill_nothing(cuda_library: Path) -> None:
    problems = sass.kernel_problems(cuda_library)
    assert not problems, "\n".join(problems)


def test_kernels_have_no_stack(cuda_library: Path) -> None:
    problems = sass.stack_problems(cuda_library)
    assert not problems, "\n".join(problems)


def check_needs(path: Path) -> None:
    library = elf.read(path)
    assert elf.needed_problems(library) == []
    assert elf.export_problems(library) == []
    assert elf.undefined_problems(library) == []
    assert any(symbol.startswith("aoti_torch_") for symbol, _ in library.undefined)


def test_cpu_library_needs_only_what_is_stable() -> None:
    check_needs(_loader.shipped()["cpu"])


def test_cuda_library_needs_only_what_is_stable(cuda_library: Path) -> None:
    check_needs(cuda_library)


# ---- the checks, checked ---------------------------------------------------------------------------------------------


def listing(replace: dict[str, str] | None = None, *, leave_out: str = "no such function") -> list[str]:
    """A listing of faultless kernels, with each key of ``replace`` replaced once."""
    text = "\n\tcode for sm_90\n"
    for kernel in sass.KERNELS:
        for residual in range(2):
            name = f"_ZN13fused_conv_bn25{kernel}IfLb{residual}ELb1ELb0EEEvNS_16ScaleShiftParamsIT_EE"
            if leave_out in name:
                continue
            text += f"\t\tFunction : {name}\n"
            text += "        /*0070*/                   IMAD R3, R2, 0x100, R3 ;   /* 0x0000010002037824 */\n"
            text += "                                                            /* 0x001fe400078e0203 */\n"
            text += "        /*0320*/              @!P0 LDG.E.128 R4, [R2.64] ;  /* 0x0000000402040981 */\n"
            if residual:
                text += "        /*0330*/         @!UP0 LDG.E.128.SYS R8, [R12] ;   /* 0x0000000402040981 */\n"
            text += "        /*0500*/                   STG.E.128 desc[UR4][R2.64], R4 ; /* 0x0000000402007986 */\n"
            text += "        /*0510*/                   LDL_NOT_AN_INSTRUCTION_OF_THIS_KIND ; \n"
    for old, new in (replace or {}).items():
        assert old in text
        text = text.replace(old, new, 1)
    return text.splitlines()


def test_parser_accepts_a_faultless_listing() -> None:
    kernels = sass.parse_sass(listing())
    assert [(k.arch, k.residual, k.loads, k.stores, k.local) for k in kernels] == [
        ("sm_90", False, 1, 1, []),
        ("sm_90", True, 2, 1, []),
    ] * 3
    assert sass.problems_of(kernels) == []


def test_kernels_of_other_files_may_be_for_other_archs() -> None:
    def of(source: str, lines: list[str]) -> list[str]:
        return ["Fatbin elf code:", "================", "arch = sm_90", f"identifier = {source}", *lines]

    other = ["\tcode for sm_90a", "\t\tFunction : conv_kernel"]
    kernels = sass.parse_sass([*of("scale_shift_cuda.cu", listing()), *of("conv_cuda.cu", other)])
    assert [(k.source, k.arch) for k in kernels[-2:]] == [("scale_shift_cuda.cu", "sm_90"), ("conv_cuda.cu", "sm_90a")]
    assert sass.problems_of(kernels) == []
    spilling = [*other, "        /*0070*/                   STL [R1], R8 ;"]
    kernels = sass.parse_sass([*of("scale_shift_cuda.cu", listing()), *of("conv_cuda.cu", spilling)])
    assert sass.problems_of(kernels) == ["sm_90a: conv_kernel uses local memory: STL"]
    assert any("sm_90a" in text for text in sass.problems_of(sass.parse_sass([*listing(), *other])))


@pytest.mark.parametrize(("bounds", "spills"), [(0, True), (1, False)])
def test_convolutions_for_long_activations_may_spill_a_little(bounds: int, spills: bool) -> None:
    name = f"_ZN13fused_conv_bn28conv_depthwise_lanes_kernelIfLi3ELi1ELb{bounds}EEEvNS_15DepthwiseParamsIT_EE"
    kernels = sass.parse_sass([*listing(), f"\t\tFunction : {name}", "        /*0070*/     STL [R1], R8 ;"])
    assert bool(sass.problems_of(kernels)) != spills
    for stack, fine in ((0, True), (128, spills), (136, False)):
        problems = sass.stack_problems_of(f" Function {name}:\n  REG:96 STACK:{stack} SHARED:1024 LOCAL:0")
        assert bool(problems) != fine
    assert sass.stack_problems_of(f" Function {name}:\n  REG:96 STACK:0 SHARED:1024 LOCAL:8")


@pytest.mark.parametrize(("dtype", "fine"), [("f", True), ("6__half", False)])
def test_one_convolution_for_bounds_may_spill_a_little(dtype: str, fine: bool) -> None:
    name = f"_ZN13fused_conv_bn9stem_sm8016stem_sm80_kernelI{dtype}Li4ELb0ELb0ELb1EEEvNS0_6ParamsIT_EE"
    assert (sass.stack_problems_of(f" Function {name}:\n  REG:128 STACK:8 SHARED:0 LOCAL:0") == []) == fine


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (listing({"LDG.E.128 R4": "LDG.E.64 R4"}), "has 0 LDG.128, expected 1"),
        (listing({"LDG.E.128.SYS R8": "LDG.E R8"}), "has 1 LDG.128, expected 2"),
        (listing({"STG.E.128": "STG.E"}), "has no STG.128"),
        (listing({"IMAD R3, R2, 0x100, R3": "STL.64 [R1+0x8], R8"}), "uses local memory: STL.64"),
        (listing({"IMAD R3, R2, 0x100, R3": "@P3 LDL R0, [R1]"}), "uses local memory: LDL"),
        (listing(leave_out="columns"), "scale_shift_columns_kernel is missing"),
        (
            [*listing(), "\t\tFunction : _ZN13fused_conv_bn22bn_stats_planes_kernelIfLb0EEEvNS_12PlanesParamsIT_EE"],
            "bn_stats_planes_kernelIfLb0EEEvNS_12PlanesParamsIT_EE has 0 LDG.128, expected 4 or more",
        ),
        (listing(leave_out="IfLb1E"), "missing with or without residual"),
        (
            listing() + ["\tcode for sm_120", *listing(leave_out="planes")[2:]],
            "sm_120: scale_shift_planes_kernel is missing",
        ),
        ([], "no kernel"),
    ],
)
def test_parser_finds_what_is_wrong(wrong: list[str], message: str) -> None:
    assert any(message in problem for problem in sass.problems_of(sass.parse_sass(wrong)))


def test_stack_check_finds_what_is_wrong() -> None:
    good = " Function f:\n  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:696\n"
    assert sass.stack_problems_of(good) == []
    assert len(sass.stack_problems_of(good + good.replace("STACK:0", "STACK:16"))) == 1
    assert len(sass.stack_problems_of(good + good.replace("LOCAL:0", "LOCAL:8"))) == 1
    assert sass.stack_problems_of("") != []


def members(source: str, *codes: str) -> str:
    """What cuobjdump prints of a source file's fatbin: ``"sm_90 elf"``."""
    text = ""
    for arch, kind in map(str.split, codes):
        text += f"\nFatbin {kind} code:\n================\narch = {arch}\ncode version = [1,8]\nhost = linux\n"
        text += f"compile_size = 64bit\ncompressed\nidentifier = {source}\n"
    return text


A = members("a_cuda.cu", "sm_80 elf", "sm_90 ptx", "sm_90 elf")
B = members("b_cuda.cu", "sm_90a elf")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (A + B, []),
        (B + A, []),
        (A, ["b_cuda.cu: machine code for sm_90a is there 0 times, expected 1"]),
        (A + B + B, ["b_cuda.cu: machine code for sm_90a is there 2 times, expected 1"]),
        (
            A.replace("90", "120") + B,
            [
                "a_cuda.cu: PTX for sm_120 is there 1 times, expected 0",
                "a_cuda.cu: PTX for sm_90 is there 0 times, expected 1",
                "a_cuda.cu: machine code for sm_120 is there 1 times, expected 0",
                "a_cuda.cu: machine code for sm_90 is there 0 times, expected 1",
            ],
        ),
        (A.replace("ptx", "elf") + B, ["a_cuda.cu: PTX for sm_90 is", "a_cuda.cu: machine code for sm_90 is there 2"]),
        (
            A.replace("sm_80", "sm_90a") + B.replace("sm_90a", "sm_80"),
            [
                "a_cuda.cu: machine code for sm_80 is there 0 times",
                "a_cuda.cu: machine code for sm_90a is there 1 times",
                "b_cuda.cu: machine code for sm_80 is there 1 times",
                "b_cuda.cu: machine code for sm_90a is there 0 times",
            ],
        ),
        (A + B + members("c_cuda.cu", "sm_80 elf"), ["c_cuda.cu: machine code for sm_80 is there 1 times, expected 0"]),
        (
            A + B.replace("identifier = b_cuda.cu\n", ""),
            ["b_cuda.cu: machine code for sm_90a is there 0", "no source file: machine code for sm_90a is there 1"],
        ),
    ],
)
def test_arch_check_finds_what_is_wrong(text: str, messages: list[str]) -> None:
    problems = sass.arch_problems_of(text, {"a_cuda.cu": ["8.0", "9.0+PTX"], "b_cuda.cu": ["9.0a"]})
    assert len(problems) == len(messages)
    assert all(problem.startswith(message) for problem, message in zip(problems, messages, strict=True)), problems


def undefined(symbol: str, version: str = "") -> list[str]:
    return elf.undefined_problems(elf.Library([], [], [], [(symbol, version)], {}))


@pytest.mark.parametrize(
    ("symbol", "version"),
    [
        ("_ZNK2at6Tensor3sumEv", ""),
        ("_ZNK3c105Error4whatEv", ""),
        ("_ZTIN3c105ErrorE", ""),
        ("_ZN5torch3jit5parseEv", ""),
        ("PyErr_Clear", ""),
        ("_PyObject_New", ""),
        ("cudaMalloc", ""),
        ("cudaMalloc", "libcudart.so.13"),
        ("memcpy", ""),
        ("__libc_start_call_main", "GLIBC_PRIVATE"),
        ("my_torch_function", ""),
    ],
)
def test_symbols_that_may_change_are_recognised(symbol: str, version: str) -> None:
    (problem,) = undefined(symbol, version)
    assert problem.startswith(f"refers to {symbol}")


@pytest.mark.parametrize(
    ("symbol", "version"),
    [
        ("aoti_torch_empty_strided", ""),
        ("torch_call_dispatcher", ""),
        ("__gmon_start__", ""),
        ("_ZNSt6vectorIiE2atEm", "GLIBCXX_3.4.21"),
        ("__cxa_throw", "CXXABI_1.3"),
        ("_Unwind_Resume", "GCC_3.0"),
        ("memcpy", "GLIBC_2.14"),
    ],
)
def test_stable_symbols_are_accepted(symbol: str, version: str) -> None:
    assert undefined(symbol, version) == []
