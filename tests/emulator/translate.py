"""Compiles the CUDA kernels for the processor, as a shared library that the tests load (emulated.py).

Kernels are C++ but for three things. Types and intrinsics of CUDA come from headers of this folder. __shared__ variables
become static ones, or a pointer to the block's dynamic shared memory. And inline assembly, instruction by instruction,
becomes calls of functions (ptx.h). The compiler announces every access to memory, as it does for thread sanitizers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"

CXX = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-g1",
    "-march=native",
    "-fno-strict-aliasing",
    "-fno-omit-frame-pointer",
    "-fno-threadsafe-statics",
]
# A GPU fuses products and sums as these say.
KERNEL_FLAGS = ["-O1", "-ffp-contract=fast", "-fsanitize=thread", "-w"]


def defines(capability: int) -> list[str]:
    """What nvcc defines, for a compute capability (90 for 9.0)."""
    values = {"__CUDACC__": 1, "__CUDACC_VER_MAJOR__": 13, "__CUDA_ARCH__": 10 * capability}
    if capability == 90:
        values |= {"__CUDA_ARCH_FEAT_SM90_ALL": 1, "FCB_HAS_9_0A": 1}
    return [f"-D{name}={value}" for name, value in values.items()]


# ---- inline assembly -------------------------------------------------------------------------------------------------

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
ASM = re.compile(r"\basm\s*(?:volatile\s*)?\(")
SHARED = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w ]+?)\s+(\w+)\[\]((?:\[\w+\])?);")


BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def outside(text: str, start: int = 0) -> Iterator[tuple[int, str, int]]:
    """Each character outside of strings: where it is, and how many brackets are open behind it."""
    depth, at = 0, start
    while at < len(text):
        if string := STRING.match(text, at):
            at = string.end()
            continue
        depth += BRACKETS.get(text[at], 0)
        yield at, text[at], depth
        at += 1


def split(text: str, separator: str) -> list[str]:
    """At separators outside of brackets and strings."""
    cuts = [at for at, character, depth in outside(text) if character == separator and depth == 0]
    return [text[first + 1 : last] for first, last in zip([-1, *cuts], [*cuts, len(text)], strict=True)]


def operands(text: str) -> Iterator[str]:
    """The C++ expressions of ``"r"(a), "f"(b)``, in their brackets."""
    for part in split(text, ","):
        if part.strip():
            yield part.strip().partition('"')[2].partition('"')[2].strip()


def unquote(text: str) -> str:
    return "".join(bytes(s[1:-1], "ascii").decode("unicode_escape") for s in STRING.findall(text))


def call(instruction: str, expressions: list[str], number: int) -> str:
    """One PTX instruction, declaration or label in C++."""

    def expression(operand: str) -> str:
        operand = operand.strip()
        if operand.startswith("{"):
            return f"::emulated::ptx::list({', '.join(expression(o) for o in operand[1:-1].split(','))})"
        if operand.startswith("["):
            return ", ".join(expression(o) for o in split(operand[1:-1], ","))
        if operand.startswith("%%"):
            return f"::emulated::ptx::{operand[2:]}()"
        return expressions[int(operand[1:])] if operand.startswith("%") else operand

    text = instruction.strip()
    if label := re.match(r"(\w+):\s*", text):
        return f"{label[1]}_{number}:; {call(text[label.end() :], expressions, number)}"
    if predicate := re.match(r"@(!?)(\w+)\s+", text):
        return f"if ({predicate[1]}{predicate[2]}) {{ {call(text[predicate.end() :], expressions, number)} }}"
    name, _, rest = text.partition(" ")
    if name == "":
        return ""
    if name == ".reg":
        return f"bool {rest.split()[-1]} = false;"
    if name == "bra":
        return f"goto {rest.strip()}_{number};"
    arguments = [expression(o) for o in split(rest, ",") if o.strip() not in ("", "_")]
    return f"::emulated::ptx::{re.sub('[.:]', '_', name)}({', '.join(arguments)});"


def translate_assembly(source: str) -> str:
    done, at = [], 0
    for number in range(len(source)):
        found = ASM.search(source, at)
        if found is None:
            break
        end = next(at for at, _, depth in outside(source, found.end()) if depth < 0)
        statement = source[found.end() : end]
        text, *groups = [*split(statement, ":"), "", ""][:3]
        expressions = [e for group in groups for e in operands(group)]
        instructions = unquote(text).replace("\n", " ").strip()
        if instructions.startswith("{"):
            instructions = instructions[1:-1]
        code = " ".join(call(i, expressions, number) for i in split(instructions, ";")).strip()
        done += [source[at : found.start()], "do { ", code, " } while (0)", "\n" * statement.count("\n")]
        at = end + 1
    return "".join([*done, source[at:]])


def translate(source: str) -> str:
    """Preprocessed CUDA C++ as C++."""
    source = SHARED.sub(
        lambda m: (
            f"static auto& {m[2]} = reinterpret_cast<{m[1]}{f' (*&){m[3]}' if m[3] else '*&'}>"
            "(::emulated::dynamic_shared);"
        ),
        source,
    )
    return translate_assembly(re.sub(r"\b__shared__\b( alignas\(\w+\))?", r"\1 static", source))


# ---- the library -----------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> str:
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{finished.stderr[-8000:]}")
    return finished.stdout


def compile_one(source: Path, folder: Path, capability: int) -> Path:
    target = folder / f"{source.stem}.o"
    includes = [f"-I{HERE}", f"-I{CSRC}"]
    if source.suffix == ".cpp":
        run(*CXX, *FLAGS, "-O2", "-Wall", "-Wextra", "-Werror", *includes, "-c", source, "-o", target)
        return target
    first = ["-include", HERE / "ptx.h"]
    text = run(*CXX, *FLAGS, *defines(capability), *includes, *first, "-E", "-x", "c++", source)
    translated = folder / f"{source.stem}.ii"
    translated.write_text(translate(text))
    run(*CXX, *FLAGS, *KERNEL_FLAGS, "-c", translated, "-o", target)
    return target


def library(capability: int) -> Path:
    """The path of the library for a compute capability; it is made if its sources have changed."""
    sources = [*(CSRC / "kernels").rglob("instantiate_*.cu"), *HERE.glob("*.cpp"), *HERE.glob("*.cu")]
    headers = (path for path in (CSRC / "kernels").rglob("*") if path.is_file())
    read = sorted({*headers, *HERE.glob("*.h"), *sources, Path(__file__)})
    content = b"".join([shlex.join(CXX).encode(), *(path.read_bytes() for path in read)])
    key = hashlib.sha256(content).hexdigest()[:16]
    folder = BUILD / f"{key}-{capability}"
    target = folder / "kernels.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: compile_one(source, folder, capability), sources))
        new = folder / f"kernels.{os.getpid()}.so"
        # Several of these libraries are loaded, each with its own variables.
        exports = folder / "exports"
        exports.write_text("{ global: emulated_*; local: *; };")
        run(*CXX, "-shared", "-Wl,-z,defs", f"-Wl,--version-script={exports}", *objects, "-ldl", "-o", new)
        new.replace(target)
    return target
