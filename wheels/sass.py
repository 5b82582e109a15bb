"""What the CUDA compiler made of the kernels, read from a built library with cuobjdump and judged here; needs no GPU.

Every elementwise kernel reads and writes 16 bytes at a time. No kernel keeps anything in local memory, but for a few
words of some. Of each source file there is code for every architecture that it is meant for. A fatbin names its source
file by its path from csrc on: build_tools/flags.py sees to that (--ident).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

KERNELS = ("scale_shift_planes_kernel", "scale_shift_columns_kernel", "scale_shift_periodic_kernel")
# And those that read whole planes, with so many such loads under way.
READERS = {"bn_stats_planes_kernel": 4, "backward_sums_planes_kernel": 4, "backward_apply_planes_kernel": 2}
# Convolutions for activations that are no bounds: their last template argument, kBounds, is false. CUDA 12's compiler
# runs out of registers in some of them, where it computes tanh of all a thread's results at once, and spills 2 to 30
# words. One kernel for bounds, float32 and four channels at a time, spills 2 words on 8.6 and 8.9. The gradient of a
# stem's weight has two sums of each of a thread's products in registers: in float32 it spills up to 20 words.
MAY_SPILL = re.compile(
    r"(stem_sm90|stem_sm80|conv_depthwise_\w+)_kernelI.*Lb0EEEv|stem_sm80_kernelIfLi4ELb0ELb0ELb1EEEv"
    r"|wgrad_stem_sm80_kernelIf"
)
MOST_STACK = 128  # bytes of these


@dataclass
class Kernel:
    """What is counted of one function on one architecture."""

    source: str
    arch: str
    name: str
    loads: int = 0  # global, 16 bytes
    stores: int = 0
    local: list[str] = field(default_factory=list)  # instructions on local memory: spilled registers, indexed arrays

    @property
    def residual(self) -> bool:
        """The first bool among the template arguments, in the mangled name."""
        match = re.search(r"_kernelI.*?Lb([01])E", self.name)
        assert match is not None, f"{self.name}: where is kResidual?"
        return match[1] == "1"


# ---- reading and judging cuobjdump's listings ------------------------------------------------------------------------


def parse_sass(lines: Iterable[str]) -> list[Kernel]:
    """The kernels in what ``cuobjdump -sass`` prints."""
    kernels: list[Kernel] = []
    source = arch = ""
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
            kernels.append(Kernel(source, arch, match[1]))
        elif line.startswith("Fatbin "):
            source = ""
        elif match := re.match(r"identifier = (\S+)", line):
            source = match[1]
    return kernels


def problems_of(kernels: list[Kernel]) -> list[str]:
    """What is wrong with the kernels, a sentence each."""
    if not kernels:
        return ["the listing has no kernel"]
    problems = []
    elementwise = {kernel.source for kernel in kernels if any(name in kernel.name for name in KERNELS)}
    for arch in sorted({kernel.arch for kernel in kernels if kernel.source in elementwise or not elementwise}):
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
    for reader, need in READERS.items():
        problems += [
            f"{k.arch}: {k.name} has {k.loads} LDG.128, expected {need} or more"
            for k in kernels
            if reader in k.name and k.loads < need
        ]
    problems += [
        f"{k.arch}: {k.name} uses local memory: {', '.join(k.local)}"
        for k in kernels
        if k.local and not MAY_SPILL.search(k.name)
    ]
    return problems


def stack_problems_of(text: str) -> list[str]:
    """What is wrong in what ``cuobjdump -res-usage`` prints."""
    usages = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    if not usages:
        return ["the listing has no kernel"]

    def most(name: str) -> int:
        return MOST_STACK if MAY_SPILL.search(name) else 0

    def has(what: str, usage: str) -> int:
        match = re.search(rf"\b{what}:(\d+)\b", usage)
        return int(match[1]) if match else MOST_STACK + 1

    return [
        f"{name} has a stack: {usage.strip()}, expected STACK:{most(name)} at most, and LOCAL:0"
        for name, usage in usages
        if has("STACK", usage) > most(name) or has("LOCAL", usage) > 0
    ]


def arch_problems_of(text: str, archs: dict[str, list[str]]) -> list[str]:
    """What is wrong in what ``cuobjdump`` without options prints of a library.

    Of each source file in ``archs`` there is to be code for exactly its architectures (``["8.0", "9.0+PTX"]``), once,
    and there is to be nothing else.
    """
    expected = Counter[str]()
    for source, own in archs.items():
        for arch in own:
            number, _, ptx = arch.partition("+")
            sm = f"sm_{number.replace('.', '')}"
            expected[f"{source}: machine code for {sm}"] = 1
            expected[f"{source}: PTX for {sm}"] = 1 if ptx else 0
    found = Counter[str]()
    for kind, member in re.findall(r"^Fatbin (\w+) code:$(.*?)(?=^Fatbin |\Z)", text, re.MULTILINE | re.DOTALL):
        named = re.search(r"^identifier = (\S+)", member, re.MULTILINE)
        arch = re.search(r"^arch = (\S+)", member, re.MULTILINE)
        found[
            f"{named[1] if named else 'no source file'}: {'machine code' if kind == 'elf' else kind.upper()} for "
            f"{arch[1] if arch else 'no architecture'}"
        ] += 1
    return [
        f"{what} is there {found[what]} times, expected {expected[what]}"
        for what in sorted(expected | found)
        if found[what] != expected[what]
    ]


# ---- running cuobjdump -----------------------------------------------------------------------------------------------


def find_cuobjdump() -> str:
    """PyPI's, which lies beside nvdisasm, or one from a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("cu*/bin/cuobjdump")):
            if os.access(path, os.X_OK):
                return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def cuobjdump(library: Path, *options: str) -> Iterator[str]:
    """The lines that it prints, as they come: the machine code of all architectures is 100 MB of text."""
    command = [find_cuobjdump(), *options, str(library)]
    # It starts nvdisasm from PATH.
    env = {**os.environ, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            yield line
            last = line
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {last.strip()}")


def kernel_problems(library: Path) -> list[str]:
    return problems_of(parse_sass(cuobjdump(library, "-sass")))


def stack_problems(library: Path) -> list[str]:
    return stack_problems_of("".join(cuobjdump(library, "-res-usage")))


def arch_problems(library: Path, archs: dict[str, list[str]]) -> list[str]:
    return arch_problems_of("".join(cuobjdump(library)), archs)
