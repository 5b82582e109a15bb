"""Checks that wheels are what the build matrix (matrix.json) says, and that they run where it says.

    python wheels/audit.py WHEEL...

Prints a line for each check of each wheel, goes on after a failure, and exits with 1 if there was one. A check that
cannot be made, because a tool is missing or the wheel cannot be read, has failed.

It needs Python 3.11 or newer, because torch-abi-audit does, what requirements/dev.txt lists, and nm (binutils).
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from email.parser import Parser
from functools import cached_property
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

import elf
import sass

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_tools import libraries  # noqa: E402

PACKAGE = "fused_conv_bn"
REQUIRES_PYTHON = ">=3.10"
LICENSE = "BSD-3-Clause"
DIST_INFO = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")


def read_matrix() -> dict:
    return json.loads((ROOT / "wheels" / "matrix.json").read_text())


class Wheel:
    """A wheel, unpacked into ``root``, and what ``matrix`` says of it. Raises if it is no zip file."""

    def __init__(self, path: Path, matrix: dict, root: Path) -> None:
        self.path = path
        self.matrix = matrix
        self.root = root
        with zipfile.ZipFile(path) as archive:
            self.files = [info.filename for info in archive.infolist() if not info.is_dir()]
            archive.extractall(root)

    @cached_property
    def version(self) -> Version:
        return parse_wheel_filename(self.path.name)[1]

    @cached_property
    def rows(self) -> dict[str | None, dict]:
        """The wheels of the matrix, by local version."""
        return {row["local"]: row for row in self.matrix["wheels"].values()}

    @cached_property
    def row(self) -> dict:
        """The row of the matrix that has the local version of the file name."""
        if self.version.local not in self.rows:
            raise ValueError(f"the matrix has no wheel with local version {self.version.local!r}")
        return self.rows[self.version.local]

    @property
    def dist_info(self) -> str:
        return f"{PACKAGE}-{self.version}.dist-info"

    def headers(self, name: str) -> Message:
        """A file of the .dist-info directory that consists of "Key: value" lines."""
        return Parser().parsestr((self.root / self.dist_info / name).read_text(encoding="utf-8"))

    @cached_property
    def libraries(self) -> dict[str, elf.Library]:
        """All ELF files, wherever they are, by path in the wheel."""
        paths = {name: self.root / name for name in sorted(set(self.files))}
        return {name: elf.read(path) for name, path in paths.items() if elf.is_elf(path)}

    def of_each_library(self, problems_of: Callable[[elf.Library], list[str]]) -> list[str]:
        return [f"{name} {text}" for name, library in self.libraries.items() for text in problems_of(library)]

    def cuda_libraries(self) -> dict[str, dict[str, list[str]]]:
        """The libraries that have to have GPU code, by path in the wheel: the architectures of each source file."""
        return {
            f"{PACKAGE}/{library['file']}": {
                source: libraries.matrix_archs(key, source, self.matrix) for source in libraries.cuda_sources()
            }
            for key, library in self.matrix["libraries"].items()
            if key in self.row["libraries"] and "archs" in library
        }


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line of a Python package. It must not find libraries that only this shell knows."""
    env = {**os.environ, "NO_COLOR": "1"}
    env.pop("LD_LIBRARY_PATH", None)
    return subprocess.run([sys.executable, "-m", module, *arguments], env=env, capture_output=True, text=True)


def complaints(module: str, *arguments: str) -> list[str]:
    """What a tool prints that fails if it has complaints."""
    result = run(module, *arguments)
    if result.returncode == 0:
        return []
    lines = (result.stdout + result.stderr).splitlines()
    return [f"{module}: {line.strip()}" for line in lines if line.strip()] or [f"{module} failed"]


# ---- the checks ------------------------------------------------------------------------------------------------------
# Each returns what is wrong with the wheel, a sentence each. CHECKS lists them.


def check_name(wheel: Wheel) -> list[str]:
    """The name of the file, the version and the tag in it, and that the metadata has the same."""
    name, version, _, tags = parse_wheel_filename(wheel.path.name)
    found = {
        "project": name,
        "tag": " ".join(sorted(map(str, tags))),
        "tag in WHEEL": " ".join(wheel.headers("WHEEL").get_all("Tag", [])),
        "Root-Is-Purelib in WHEEL": wheel.headers("WHEEL")["Root-Is-Purelib"],
        "project in METADATA": canonicalize_name(wheel.headers("METADATA")["Name"]),
        "version in METADATA": wheel.headers("METADATA")["Version"],
    }
    expected = {
        "project": canonicalize_name(PACKAGE),
        "tag": wheel.matrix["tag"],
        "tag in WHEEL": wheel.matrix["tag"],
        "Root-Is-Purelib in WHEEL": "false",
        "project in METADATA": canonicalize_name(PACKAGE),
        "version in METADATA": str(version),
    }
    wrong = [what for what in expected if found[what] != expected[what]]
    problems = [f"{what} is {found[what]!r}, expected {expected[what]!r}" for what in wrong]
    if version.local not in wheel.rows:
        problems.append(f"local version is {version.local!r}, expected one of the matrix: {[*wheel.rows]}")
    return problems


def check_files(wheel: Wheel) -> list[str]:
    """The libraries of the row, the Python files of the source tree, the metadata; nothing else, nothing twice."""
    source = ROOT / "src"
    package = (path for path in (source / PACKAGE).rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc"))
    expected = {str(path.relative_to(source)) for path in package}
    expected |= {f"{PACKAGE}/{wheel.matrix['libraries'][key]['file']}" for key in wheel.row["libraries"]}
    expected |= {f"{wheel.dist_info}/{name}" for name in DIST_INFO}
    optional = {f"{wheel.dist_info}/top_level.txt"}  # setuptools adds it
    found = set(wheel.files)
    problems = [f"{name} is missing" for name in sorted(expected - found)]
    problems += [f"{name} does not belong into this wheel" for name in sorted(found - expected - optional)]
    return problems + [f"{name} is there twice" for name in sorted(found) if wheel.files.count(name) > 1]


def check_record(wheel: Wheel) -> list[str]:
    """RECORD has every file with its size and SHA-256."""
    record = f"{wheel.dist_info}/RECORD"
    listed = {row[0]: row[1:] for row in csv.reader((wheel.root / record).read_text(encoding="utf-8").splitlines())}
    problems = [f"RECORD lists {name}, which is not in the wheel" for name in sorted(listed.keys() - set(wheel.files))]
    for name in sorted(set(wheel.files)):
        content = (wheel.root / name).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        expected = ["", ""] if name == record else [f"sha256={digest}", str(len(content))]
        if listed.get(name) != expected:
            problems.append(f"RECORD has {listed.get(name)} for {name}, expected {expected}")
    return problems


def check_requirements(wheel: Wheel) -> list[str]:
    """What pip will demand. Extras are for whoever asks for them."""
    metadata = wheel.headers("METADATA")
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    always = [str(r) for r in requirements if not (r.marker and "extra" in str(r.marker))]
    problems = []
    if always != wheel.matrix["requires_dist"]:
        problems.append(f"Requires-Dist is {always}, expected {wheel.matrix['requires_dist']}")
    if metadata["Requires-Python"] != REQUIRES_PYTHON:
        problems.append(f"Requires-Python is {metadata['Requires-Python']!r}, expected {REQUIRES_PYTHON!r}")
    return problems


def check_license(wheel: Wheel) -> list[str]:
    metadata = wheel.headers("METADATA")
    problems = []
    if metadata["License-Expression"] != LICENSE:
        problems.append(f"License-Expression is {metadata['License-Expression']!r}, expected {LICENSE!r}")
    if metadata.get_all("License-File") != ["LICENSE"]:
        problems.append(f"License-File is {metadata.get_all('License-File')}, expected ['LICENSE']")
    if (wheel.root / wheel.dist_info / "licenses" / "LICENSE").read_bytes() != (ROOT / "LICENSE").read_bytes():
        problems.append("the LICENSE in the wheel differs from that of the source tree")
    return problems


def check_twine(wheel: Wheel) -> list[str]:
    """That PyPI takes the metadata, and can render the description."""
    return complaints("twine", "check", "--strict", str(wheel.path))


def check_contents(wheel: Wheel) -> list[str]:
    """check-wheel-contents: what commonly gets into wheels by mistake."""
    return complaints("check_wheel_contents", str(wheel.path))


def check_size(wheel: Wheel) -> list[str]:
    size, most = wheel.path.stat().st_size, wheel.row["max_bytes"]
    return [f"has {size} bytes, expected at most {most}"] if size > most else []


def check_needed(wheel: Wheel) -> list[str]:
    """The libraries that the dynamic linker will look for, and where."""
    return wheel.of_each_library(elf.needed_problems)


def check_exports(wheel: Wheel) -> list[str]:
    return wheel.of_each_library(elf.export_problems)


def check_undefined(wheel: Wheel) -> list[str]:
    """The symbols from outside: none of torch's C++, none of Python."""
    return wheel.of_each_library(elf.undefined_problems)


def check_torch_abi(wheel: Wheel) -> list[str]:
    """torch-abi-audit: torch's stable ABI only, and no more of it than the oldest torch has."""
    try:
        from torch_abi_audit import inspect_package
    except ImportError:
        return ["torch-abi-audit is missing: pip install torch-abi-audit, with Python 3.11 or newer"]
    (at_least,) = Requirement("".join(wheel.matrix["requires_dist"])).specifier
    oldest = Version(at_least.version)
    report = inspect_package(wheel.root / PACKAGE)
    libraries = [*report.extensions, *report.bundled_libs]
    problems = [] if libraries else ["torch-abi-audit finds no library"]
    for library in libraries:
        name, verdict = f"{PACKAGE}/{library.path.name}", library.torch
        if library.error:
            problems.append(f"{name}: {library.error}")
        elif verdict.unstable_symbols:
            problems.append(f"{name} uses unstable symbols: {', '.join(verdict.unstable_symbols)}")
        elif not verdict.stable:
            problems.append(f"{name} uses nothing of torch: it cannot have registered its ops")
        if verdict.unknown_shim_symbols:
            problems.append(f"{name} uses what no known torch has: {', '.join(verdict.unknown_shim_symbols)}")
        if verdict.min_torch_version and Version(verdict.min_torch_version) > oldest:
            symbols = ", ".join(verdict.version_defining_symbols)
            problems.append(f"{name} uses {symbols} of torch {verdict.min_torch_version}, expected {oldest} or older")
    return problems


def check_platform(wheel: Wheel) -> list[str]:
    """auditwheel: every Linux of the platform tag or newer has the symbol versions and libraries that are needed."""
    result = run("auditwheel", "show", "--json", str(wheel.path))
    report: dict = json.loads(result.stdout) if result.stdout else {"error": result.stderr.strip()}
    if "sym_tag" not in report:
        return [f"auditwheel: {report.get('error') or 'no library for a platform'}"]

    def glibc(tag: str) -> int:
        match = re.fullmatch(r"manylinux_2_(\d+)_x86_64", tag)
        return int(match[1]) if match else sys.maxsize

    platform = wheel.matrix["platform"]
    problems = []
    if glibc(report["sym_tag"]) > glibc(platform):
        versions = "; ".join(f"{name}: {', '.join(needs)}" for name, needs in report["versioned_symbols"].items())
        problems.append(f"auditwheel: the symbols are those of {report['sym_tag']}, expected {platform} ({versions})")
    # torch brings libtorch.so, so that no wheel of ours is consistent with more than "linux" as a whole.
    obstacles = report["policy_upgrades"].get(platform, {})
    problems += [
        f"auditwheel: {library} is not part of {platform}"
        for library in obstacles.get("libs_to_eliminate", [])
        if library != elf.MUST_NEED
    ]
    problems += [
        f"auditwheel: {library} has symbols that {platform} forbids: {', '.join(symbols)}"
        for library, symbols in obstacles.get("blacklisted_symbols", {}).items()
    ]
    flaws = [flaw for flaw in ("pyfpe", "ucs2", "unsupported_isa") if report[flaw]]
    return problems + [f"auditwheel: {flaw}" for flaw in flaws]


def check_archs(wheel: Wheel) -> list[str]:
    """Of each source file there is machine code and PTX for what the matrix says, and for nothing else."""
    problems = []
    expected = wheel.cuda_libraries()
    for name, library in wheel.libraries.items():
        has_code = library.sections.get(".nvFatBinSegment", 0) > 0
        if name in expected and has_code:
            problems += [f"{name}: {text}" for text in sass.arch_problems(wheel.root / name, expected[name])]
        elif name in expected:
            problems.append(f"{name} has no GPU code")
        elif has_code:
            problems.append(f"{name} has GPU code, and the matrix has no architecture for it")
    return problems


def check_kernels(wheel: Wheel) -> list[str]:
    """On each architecture: elementwise kernels access 16 bytes at a time, no kernel has anything in local memory."""
    problems = []
    for name in wheel.cuda_libraries():
        if name in wheel.libraries:  # else check_files has said so
            path = wheel.root / name
            problems += [f"{name}: {text}" for text in sass.kernel_problems(path) + sass.stack_problems(path)]
    return problems


Check = Callable[[Wheel], list[str]]
CHECKS: tuple[Check, ...] = (
    check_name,
    check_files,
    check_record,
    check_requirements,
    check_license,
    check_twine,
    check_contents,
    check_size,
    check_needed,
    check_exports,
    check_undefined,
    check_torch_abi,
    check_platform,
    check_archs,
    check_kernels,
)


def audit(path: Path, matrix: dict) -> Iterator[tuple[str, list[str]]]:
    """The name of each check and what it found, one after the other."""
    with tempfile.TemporaryDirectory() as root:
        try:
            wheel = Wheel(path, matrix, Path(root))
        except (OSError, zipfile.BadZipFile) as error:
            yield "open", [f"{path} cannot be read: {error}"]
            return

        def attempt(check: Check) -> list[str]:
            try:
                return check(wheel)
            except Exception as error:  # a wheel can be wrong in more ways than the checks foresee
                return [f"could not be checked: {type(error).__name__}: {error}"]

        with ThreadPoolExecutor() as pool:  # they mostly wait for other programs
            for check, problems in zip(CHECKS, pool.map(attempt, CHECKS), strict=True):
                yield check.__name__.removeprefix("check_"), problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks wheels against wheels/matrix.json.")
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    matrix = read_matrix()
    failed = 0
    for path in parser.parse_args(arguments).wheels:
        print(path.name, flush=True)
        for name, problems in audit(path, matrix):
            failed += bool(problems)
            for text in problems:
                print(f"  FAILED  {name}: {text}", flush=True)
            if not problems:
                print(f"  ok      {name}", flush=True)
    print(f"checks that failed: {failed}" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
