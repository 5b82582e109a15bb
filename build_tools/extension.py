"""The libraries as torch's extensions: torch.utils.cpp_extension declares, compiles and links them.

What of torch's build step runs as it is:
    CppExtension and CUDAExtension declare a library.
    BuildExtension.build_extensions() checks the compilers, prepares the flags and hands them to torch's writer.
    torch's writer writes build.ninja: the programs, the flags and the rules. torch runs ninja, with $MAX_JOBS.
    setuptools links the objects.

What is set for it, because torch takes it from itself or from the environment:
    CUDA_HOME and torch.version.cuda are those of the toolkit, one library at a time. So a torch without CUDA builds for
        CUDA, one wheel has CUDA 12 and 13, torch's check of the CUDA version compares a version with itself (and holds
        the C++ compiler to what that CUDA supports), and the rule for .cu sources has dependency files.
    The programs are those of Tools. For wheels nvcc is wheels/nvcc.py, which is reproducible, and the linker is zig,
        which links for glibc 2.28.
    Libraries and include folders that the declarations add are cleared: a library needs libtorch.so alone, torch's
        headers are system headers, and Python's are not for use.

What is overridden: the statements for the single files in build.ninja, and two lines above them (BuildFile). torch's
writer has one set of flags for all .cu sources, and here each has its own. Its statements lack the compilers, so that a
newer one at the same path would compile nothing; they have absolute paths, which differ between folders and which not
every compiler can take with spaces. Its rule for C++ leaves system headers out of the dependency files, and torch's
headers are such. The writer is a function of the module, not a method, and so it is replaced while a library is built.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from setuptools import Distribution, Extension
from setuptools.errors import CCompilerError
from torch.utils import cpp_extension

from build_tools import ROOT, flags, libraries
from build_tools.environment import Tools

NVCC = ROOT / "wheels" / "nvcc.py"


def quote(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


class BuildFile:
    """Writes the build.ninja of a library: torch's, but for what the module's documentation says."""

    def __init__(self, library: str, tools: Tools) -> None:
        self.library = library
        self.tools = tools
        self.write_torchs = cpp_extension._write_ninja_file
        cuda = tools.cuda.get(int(library[2:])) if library != "cpu" else None
        # With the compilers among the inputs, a newer one at the same path compiles again.
        self.programs = {".cpp": [tools.compiler], ".cu": [tools.compiler, str(cuda and cuda.nvcc), str(NVCC)]}

    def write(self, *, path: str, sources: list[str], objects: list[str], **arguments) -> None:
        """Takes the place of cpp_extension._write_ninja_file()."""
        for name, value in arguments.items():
            if isinstance(value, list):
                # The architectures of the library keep torch from adding its own. Each file has those that it is for.
                arguments[name] = [flag.replace("$", "$$") for flag in value if not flag.startswith("-gencode")]
        self.write_torchs(path=path, sources=sources, objects=objects, **arguments)
        file = Path(path)
        lines = [line for line in file.read_text().splitlines() if not line.startswith("build ")]
        text = "\n".join(lines).replace("$cxx -MMD ", "$cxx -MD ")
        text = re.sub("^cxx = .*", lambda line: f"cxx = {quote(self.tools.cxx)}", text, flags=re.MULTILINE)
        for source, target in zip(sources, objects, strict=True):
            text += f"\n{self.statement(file.parent, Path(source).resolve(), target)}"
        file.write_text(text + "\n")

    def statement(self, directory: Path, source: Path, target: str) -> str:
        def escape(file: str | Path) -> str:
            return re.sub(r"([$ :])", r"$\1", os.path.relpath(file, directory))

        rule = "cuda_compile" if source.suffix == ".cu" else "compile"
        programs = " ".join(map(escape, self.programs[source.suffix]))
        statement = f"build {escape(target)}: {rule} {escape(source)} | {programs}"
        if source.suffix == ".cu":
            own = flags.source_flags(self.library, source.relative_to(libraries.CSRC).as_posix())
            statement += f"\n  cuda_post_cflags = $cuda_post_cflags {quote(own)}"
        return statement


class BuildLibrary(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
    """torch's build command with the programs of ``tools``."""

    tools: Tools

    def build_extensions(self) -> None:
        # Neither the flags that Python was compiled with nor its headers are for these libraries.
        self.compiler.set_executables(
            compiler_so=[self.tools.compiler], compiler_cxx=[self.tools.compiler], linker_so=flags.linker(self.tools)
        )
        self.compiler.include_dirs = []
        super().build_extensions()


def declare(library: str, tools: Tools, directory: Path) -> Extension:
    kind = cpp_extension.CppExtension if library == "cpu" else cpp_extension.CUDAExtension
    extension = kind(
        f"_{library}",
        [f"csrc/{source}" for source in libraries.sources(library)],
        py_limited_api=True,
        extra_compile_args=flags.compile_flags(library, tools, directory),
        extra_link_args=flags.link_flags(library, tools),
    )
    extension.libraries, extension.include_dirs = [], []
    extension.library_dirs = cpp_extension.library_paths()
    extension.language = "c"  # for C++ setuptools would put the compiler into the linker's place
    return extension


def torch_for(library: str, tools: Tools) -> ExitStack:
    """While it is open, torch takes the toolkit of this library for its own, and the programs of ``tools``."""
    settings = {"CUDA_HOME": None, "IS_HIP_EXTENSION": False, "_write_ninja_file": BuildFile(library, tools).write}
    environment = {"PATH": tools.path, "CXX": tools.compiler, "TORCH_NO_COMPILER_WRAPPER": "1"}
    stack = ExitStack()
    if library != "cpu":
        cuda = tools.cuda[int(library[2:])]
        settings["CUDA_HOME"] = str(cuda.home)
        reproducible = [sys.executable, str(NVCC)] if tools.glibc else []
        environment["PYTORCH_NVCC"] = quote([*reproducible, str(cuda.nvcc)])
        environment["TORCH_EXTENSION_SKIP_NVCC_GEN_DEPENDENCIES"] = "0"
        stack.enter_context(mock.patch.object(torch.version, "cuda", "{}.{}".format(*cuda.version)))
    stack.enter_context(mock.patch.multiple(cpp_extension, **settings))
    stack.enter_context(mock.patch.dict(os.environ, environment))
    return stack


def build(library: str, tools: Tools, directory: Path) -> bool:
    """Makes ``directory``/_<library>.so of what has changed. Whether it could; the reason is on the terminal."""
    directory = directory.resolve()
    with torch_for(library, tools):
        command = BuildLibrary(Distribution({"ext_modules": [declare(library, tools, directory)]}))
        command.tools = tools
        command.build_lib = command.build_temp = str(directory)
        command.ensure_finalized()
        try:
            command.run()
        except (CCompilerError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return False
    return True
