"""What the compilers made of the sources, read from the built libraries; no GPU is needed.

Every elementwise kernel reads and writes 16 bytes at a time and keeps nothing in local memory, on every architecture in
the CUDA library, and the libraries need nothing of the machine and of torch beyond what is stable.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fused_conv_bn import _loader

KERNELS = ("scale_shift_planes_kernel", "scale_shift_columns_kernel", "scale_shift_periodic_kernel")

MAY_NEED = re.compile(r"(libtorch|libc|libm|libstdc\+\+|libgcc_s|ld-linux-x86-64|libpthread|libdl|librt)\.so(\.\d+)?")
# torch's C++ has no stable ABI (what is stable begins with aoti_torch_ or torch_), Python's C API varies by version.
UNSTABLE = re.compile(r"\b(at|c10|torch)::|^_?Py[A-Z_]")

# ---- reading cuobjdump's listings ------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """What is counted of one function on one architecture."""

    arch: str
    name: str
    loads: int = 0  # global, 16 bytes
    stores: int = 0
    local: list[str] = field(default_factory=list)  # instructions on local memory: spilled registers, indexed arrays

    @property
    def residual(self) -> bool:
        """The template argument behind the activation, in the mangled name."""
        match = re.search(r"ActivationE\d+ELb([01])E", self.name)
        assert match is not None, f"{self.name}: where is kResidual?"
        return match[1] == "1"


def parse_sass(lines: Iterable[str]) -> list[Kernel]:
    """The kernels in what ``cuobjdump -sass`` prints."""
    kernels: list[Kernel] = []
    arch = ""
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    for line in lines:
        if match := instruction.match(line):
            opcode = match[1]
            if opcode.startswith("LDG.") and ".128" in opcode:
                kernels[-1].loads += 1
            elif opcode.startswith("STG.") and ".128" in opcode:
                kernels[-1].stores += 1
            elif re.match(r"(LDL|STL)\b", opcode):
                kernels[-1].local.append(opcode)
        elif match := re.match(r"\s*code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernels.append(Kernel(arch, match[1]))
    return kernels


def problems_of(kernels: list[Kernel]) -> list[str]:
    """What is wrong with the kernels, a sentence each."""
    if not kernels:
        return ["the listing has no kernel"]
    problems = []
    for arch in sorted({kernel.arch for kernel in kernels}):
        for name in KERNELS:
            found = [k for k in kernels if k.arch == arch and name in k.name]
            if {k.residual for k in found} != {False, True}:
                problems.append(f"{arch}: {name} is missing, or missing with or without residual")
            for kernel in found:
                need = 2 if kernel.residual else 1
                if kernel.loads < need:
                    problems.append(f"{arch}: {kernel.name} has {kernel.loads} LDG.128, expected {need} or more")
                if kernel.stores < 1:
                    problems.append(f"{arch}: {kernel.name} has no STG.128")
    problems += [f"{k.arch}: {k.name} uses local memory: {', '.join(k.local)}" for k in kernels if k.local]
    return problems


def stack_problems_of(text: str) -> list[str]:
    """What is wrong in what ``cuobjdump -res-usage`` prints."""
    usages = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    if not usages:
        return ["the listing has no kernel"]
    return [
        f"{name}: {usage.strip()}"
        for name, usage in usages
        if not (re.search(r"\bSTACK:0\b", usage) and re.search(r"\bLOCAL:0\b", usage))
    ]


# ---- the tools and the libraries -------------------------------------------------------------------------------------


def find_cuobjdump() -> str:
    """PyPI's, which lies beside nvdisasm, or one from a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("cu*/bin/cuobjdump")):
            if os.access(path, os.X_OK):
                return str(path)
    path_one = shutil.which("cuobjdump")
    if path_one is None:
        pytest.fail("cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm", pytrace=False)
    return path_one


def run(*command: str) -> Iterator[str]:
    """The lines that a command prints, as they come: a listing of all architectures has 100 MB."""
    env = {**os.environ, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            yield line
            last = line
    if process.returncode != 0:
        pytest.fail(f"{' '.join(command)} failed: {last.strip()}", pytrace=False)


def binutil(name: str, *arguments: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing: it is in binutils", pytrace=False)
    return "".join(run(path, *arguments))


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


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_kernels_move_16_bytes_and_spill_nothing(cuda_library: Path) -> None:
    problems = problems_of(parse_sass(run(find_cuobjdump(), "-sass", str(cuda_library))))
    assert not problems, "\n".join(problems)


def test_kernels_have_no_stack(cuda_library: Path) -> None:
    problems = stack_problems_of("".join(run(find_cuobjdump(), "-res-usage", str(cuda_library))))
    assert not problems, "\n".join(problems)


def check_needs(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", binutil("readelf", "-d", str(library)))
    assert "libtorch.so" in needed
    assert [entry for entry in needed if not MAY_NEED.fullmatch(entry)] == []
    undefined = re.findall(
        r"^\s+[Uvw] (.+)$", binutil("nm", "-D", "-C", "--undefined-only", str(library)), re.MULTILINE
    )
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined)
    assert [symbol for symbol in undefined if UNSTABLE.search(symbol)] == []


def test_cpu_library_needs_only_what_is_stable() -> None:
    check_needs(_loader.shipped()["cpu"])


def test_cuda_library_needs_only_what_is_stable(cuda_library: Path) -> None:
    check_needs(cuda_library)


# ---- the checks above, checked ---------------------------------------------------------------------------------------


def listing(replace: dict[str, str] | None = None, *, leave_out: str = "no such function") -> list[str]:
    """A listing of faultless kernels, with each key of ``replace`` replaced once."""
    text = "\n\tcode for sm_90\n"
    for kernel in KERNELS:
        for residual in range(2):
            name = f"_ZN13fused_conv_bn25{kernel}IfNS_12FoldedSourceIfEELNS_10ActivationE3ELb{residual}EEEvT_"
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
    kernels = parse_sass(listing())
    assert [(k.arch, k.residual, k.loads, k.stores, k.local) for k in kernels] == [
        ("sm_90", False, 1, 1, []),
        ("sm_90", True, 2, 1, []),
    ] * 3
    assert problems_of(kernels) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (listing({"LDG.E.128 R4": "LDG.E.64 R4"}), "has 0 LDG.128, expected 1"),
        (listing({"LDG.E.128.SYS R8": "LDG.E R8"}), "has 1 LDG.128, expected 2"),
        (listing({"STG.E.128": "STG.E"}), "has no STG.128"),
        (listing({"IMAD R3, R2, 0x100, R3": "STL.64 [R1+0x8], R8"}), "uses local memory: STL.64"),
        (listing({"IMAD R3, R2, 0x100, R3": "@P3 LDL R0, [R1]"}), "uses local memory: LDL"),
        (listing(leave_out="columns"), "scale_shift_columns_kernel is missing"),
        (listing(leave_out="ELb1E"), "missing with or without residual"),
        (
            listing() + ["\tcode for sm_120", *listing(leave_out="planes")[2:]],
            "sm_120: scale_shift_planes_kernel is missing",
        ),
        ([], "no kernel"),
    ],
)
def test_parser_finds_what_is_wrong(wrong: list[str], message: str) -> None:
    assert any(message in problem for problem in problems_of(parse_sass(wrong)))


def test_stack_check_finds_what_is_wrong() -> None:
    good = " Function f:\n  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:696\n"
    assert stack_problems_of(good) == []
    assert len(stack_problems_of(good + good.replace("STACK:0", "STACK:16"))) == 1
    assert len(stack_problems_of(good + good.replace("LOCAL:0", "LOCAL:8"))) == 1
    assert stack_problems_of("") != []


@pytest.mark.parametrize("symbol", ["at::Tensor::sum() const", "c10::Error::what()", "PyErr_Clear", "_PyObject_New"])
def test_unstable_symbols_are_recognised(symbol: str) -> None:
    assert UNSTABLE.search(symbol)


@pytest.mark.parametrize("symbol", ["aoti_torch_empty_strided", "std::vector<int>::at(unsigned long)", "format::x()"])
def test_stable_symbols_are_accepted(symbol: str) -> None:
    assert not UNSTABLE.search(symbol)
