"""What a shared library asks of the machine and of torch, and what it offers: read from the file and judged here.

The rules are those that let one build serve every torch, every Python and every Linux that is new enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import Section, SymbolTableSection

MUST_NEED = "libtorch.so"
MAY_NEED = frozenset(
    {
        MUST_NEED,
        "libc.so.6",
        "libm.so.6",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "ld-linux-x86-64.so.2",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
    }
)

# What the C and C++ runtimes promise to keep, they put under a version of this form. GLIBC_PRIVATE is not a promise.
RUNTIME_VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_\d+(\.\d+)*")
# torch's stable C functions; all of its C++ is mangled and begins with _Z.
STABLE_SHIM = re.compile(r"(aoti_)?torch_\w+")
# Weak references in the compiler's own start files. Nobody has to define them.
START_FILES = frozenset({"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"})


@dataclass(frozen=True)
class Library:
    needed: list[str]
    search_paths: list[str]  # RPATH and RUNPATH
    exported: list[str]
    undefined: list[tuple[str, str]]  # symbol, version ("" without one)
    sections: dict[str, int]  # size in bytes


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def read(path: Path) -> Library:
    """Raises ValueError for a file that is no complete shared library."""
    needed: list[str] = []
    search_paths: list[str] = []
    exported: list[str] = []
    undefined: list[tuple[str, str]] = []
    with path.open("rb") as file:
        try:
            sections = {section.name: section for section in ELFFile(file).iter_sections()}
        except ELFError as error:
            raise ValueError(f"{path.name} is damaged: {error}") from None
        dynamic, symbols = sections.get(".dynamic"), sections.get(".dynsym")
        if not (isinstance(dynamic, DynamicSection) and isinstance(symbols, SymbolTableSection)):
            raise ValueError(f"{path.name} has no dynamic symbols, expected a shared library")
        for tag in dynamic.iter_tags():
            names = {"DT_NEEDED": needed, "DT_RPATH": search_paths, "DT_RUNPATH": search_paths}.get(tag.entry.d_tag)
            if names is not None:
                names.append(getattr(tag, tag.entry.d_tag.removeprefix("DT_").lower()))
        version_of = version_reader(sections)
        for number, symbol in enumerate(symbols.iter_symbols()):
            if not symbol.name or symbol["st_info"]["bind"] == "STB_LOCAL":
                continue
            if symbol["st_shndx"] == "SHN_UNDEF":
                undefined.append((symbol.name, version_of(number)))
            else:
                exported.append(symbol.name)
        sizes = {name: section["sh_size"] for name, section in sections.items()}
    return Library(needed, search_paths, exported, undefined, sizes)


def version_reader(sections: dict[str, Section]) -> Callable[[int], str]:
    """A function from the number of a symbol to the version that it has to have; "" without one."""
    indices, versions = sections.get(".gnu.version"), sections.get(".gnu.version_r")
    if not (isinstance(indices, GNUVerSymSection) and isinstance(versions, GNUVerNeedSection)):
        return lambda number: ""

    def version_of(number: int) -> str:
        index = indices.get_symbol(number)["ndx"]
        # Where there is no version, the index is not a number but the name of that case.
        version = versions.get_version(index) if isinstance(index, int) else None
        return version[1].name if version else ""

    return version_of


def needed_problems(library: Library) -> list[str]:
    problems = [
        f"needs {name}, expected nothing but {', '.join(sorted(MAY_NEED))}"
        for name in library.needed
        if name not in MAY_NEED
    ]
    if MUST_NEED not in library.needed:
        problems.append(f"does not need {MUST_NEED}, from which it has to get torch's symbols")
    problems += [f"searches {path!r} for libraries, expected no RPATH and no RUNPATH" for path in library.search_paths]
    return problems


def export_problems(library: Library) -> list[str]:
    """Loading runs static initialisers and needs no symbol. An exported one could be taken for another library's."""
    return [f"exports {name}, expected no exported symbol" for name in library.exported]


def undefined_problems(library: Library) -> list[str]:
    """Every symbol from outside is a versioned one of the C and C++ runtimes, or of torch's stable C interface.

    That leaves out torch's C++ and Python's C API, which have no versions and change, and whatever nothing defines.
    """
    return [
        f"refers to {name}{'@' if version else ''}{version}, which is neither a versioned symbol of the C and C++ "
        f"runtimes nor a stable one of torch (aoti_torch_*, torch_*)"
        for name, version in library.undefined
        if not (RUNTIME_VERSION.fullmatch(version) if version else STABLE_SHIM.fullmatch(name) or name in START_FILES)
    ]
