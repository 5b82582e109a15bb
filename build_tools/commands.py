"""setuptools' commands for the libraries and the wheel. torch is imported where a library is compiled, not before."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from build_tools import MATRIX, ROOT, environment, fail, libraries

environment.check_setuptools()
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (older ones have none)


def extensions() -> list[Extension]:
    """All libraries that there can be. BuildExt chooses from the list, and extension.py declares what it builds."""
    return [
        Extension(f"fused_conv_bn._{name}", [f"csrc/{source}" for source in libraries.sources(name)])
        for name in MATRIX["libraries"]
    ]


def library_of(ext: Extension) -> str:
    """ "cpu" for fused_conv_bn._cpu."""
    return ext.name.rpartition("._")[2]


class BuildExt(build_ext):
    """Chooses the libraries, has each compiled by extension.py, and puts it where setuptools wants it."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', os.sep)}.so"

    def run(self):
        files = os.environ.get("FUSED_CONV_BN_LIBRARIES")
        self.ready = {Path(file).name: file for file in files.split(os.pathsep)} if files else {}
        if self.ready:
            names = [Path(name).stem[1:] for name in self.ready]
        else:
            self.tools = environment.Tools()
            environment.import_torch(self.tools.torch)
            names = ["cpu", *(f"cu{major}" for major in self.tools.cuda)]
        self.extensions = [ext for ext in self.extensions if library_of(ext) in names]
        # All that is in this folder gets into the wheel, also what an earlier build for something else left there.
        for old in Path(self.build_lib, "fused_conv_bn").glob("_*.so"):
            old.unlink()
        super().run()

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name))
        built = self.ready.get(output.name) or self.compile(library_of(ext), output.name)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not written in place: a process may have the old one open.
        new = output.with_suffix(".new")
        shutil.copyfile(built, new)
        new.chmod(0o755)
        new.replace(output)

    def compile(self, library: str, name: str) -> Path:
        from build_tools import extension  # imports torch

        directory = Path(self.build_temp) / library
        if (
            self.editable_mode
        ):  # pip's folder is new each time, and all would be compiled again: as `build_ext --inplace`
            name_of_build = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            directory = ROOT / "build" / name_of_build / library
        if not extension.build(library, self.tools, directory):
            fail(f"{name} could not be compiled; the compiler's messages are above")
        return directory / name


class BdistWheel(bdist_wheel):
    """No Python API is used, so the wheel is for every Python on the platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])

    def write_wheelfile(self, *args, **kwargs):
        super().write_wheelfile(*args, **kwargs)
        # The last thing before the archive is made: what the user's umask gave the files is not part of a wheel.
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)
