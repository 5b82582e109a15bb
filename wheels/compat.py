"""Installs one wheel next to each torch and each CPython of compat_rows.json and runs the tests against it.

Every row gets a fresh virtual environment in a temporary directory, where pip installs what a user's pip would, and a
copy of tests/ far from the sources. GPUs and the system's CUDA are hidden. Rows run one after another, and each
environment is deleted before the next one is made: one for CUDA takes 5 GB, and all downloads together are 20 GB.

The results go to compat.json, failures included, and from there into README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TABLE = HERE / "compat_rows.json"
RECORD = HERE / "compat.json"
TESTS = ROOT / "tests"
README = ROOT / "README.md"
BEGIN, END = "<!-- compat -->", "<!-- /compat -->"

NEWEST = "newest"
"""In place of a version: what pip takes when it is free to choose."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TIMEOUT = 1800  # seconds, for each command: a test that hangs is a row that fails

# Run in the new environment, before anything but torch and the wheel is installed there.
FACTS = """
import json, os, re, sys
from pathlib import Path
import torch
import fused_conv_bn
from fused_conv_bn import _loader

prefix = Path(sys.prefix).resolve()
mapped = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
print(json.dumps({
    "facts": {
        "python": sys.version.split()[0],
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "glibc": os.confstr("CS_GNU_LIBC_VERSION").split()[-1],
        "fused_conv_bn": fused_conv_bn.__version__,
        "loaded": list(_loader.loaded),
    },
    "installed": prefix in Path(fused_conv_bn.__file__).resolve().parents,
    "foreign": sorted(
        path for path in mapped
        if re.match(r"lib(cudart|cublas|cudnn|nvrtc)", Path(path).name) and prefix not in Path(path).resolve().parents
    ),
}))
"""


class RowError(Exception):
    """Why a row failed before its tests could run."""


@dataclass(frozen=True)
class Row:
    """One combination: a version of torch or "newest", a CPython such as "3.12" or "3.13t"."""

    torch: str
    python: str
    cpu: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.torch, self.python

    def __str__(self) -> str:
        return f"torch {self.torch}{' (CPU build)' if self.cpu else ''}, CPython {self.python}"


def read_table() -> tuple[list[Row], dict[str, str]]:
    """The rows, and the folders of tests/ that are left out, with the reason."""
    data = json.loads(TABLE.read_text())
    if missing := [name for name in data["left_out"] if not (TESTS / name).is_dir()]:
        raise SystemExit(f"compat: {TABLE.name} leaves out {', '.join(missing)}, and tests/ has no such folder")
    return [Row(**row) for row in data["rows"]], data["left_out"]


def select(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """The rows that ``only`` names, each by its torch or by torch/python; all of them if it is empty."""
    for name in only:
        if not any(name in (row.torch, f"{row.torch}/{row.python}") for row in rows):
            have = ", ".join(f"{row.torch}/{row.python}" for row in rows)
            raise SystemExit(f"compat: --only has {name!r}, expected one of {have}, or one of these torch versions")
    return [row for row in rows if not only or row.torch in only or f"{row.torch}/{row.python}" in only]


# ---- the wheel and the Pythons ---------------------------------------------------------------------------------------


def find_wheel() -> Path:
    """The fat wheel of wheels/dist: the one without a local version."""
    wheels = [path for path in sorted((HERE / "dist").glob("*.whl")) if "+" not in path.name]
    if len(wheels) != 1:
        have = ", ".join(path.name for path in wheels) or "none"
        raise SystemExit(
            f"compat: wheels/dist has {have}, expected one fat wheel: run make wheel, or give --wheel PATH"
        )
    return wheels[0]


def describe_wheel(path: Path) -> dict[str, Any]:
    """What identifies a wheel, and the code in it: its libraries are the same in every build of one commit."""
    with zipfile.ZipFile(path) as archive:
        return {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "libraries": {
                Path(name).name: hashlib.sha256(archive.read(name)).hexdigest()
                for name in sorted(archive.namelist())
                if name.endswith(".so")
            },
        }


def python_version(path: Path | str) -> str | None:
    """ "3.12", or "3.13t" for a free-threaded one; None if it does not run."""
    code = (
        "import sys, sysconfig; "
        "print('%d.%d' % sys.version_info[:2] + 't' * bool(sysconfig.get_config_var('Py_GIL_DISABLED')))"
    )
    try:
        result = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def find_python(wanted: str, given: dict[str, str]) -> str | None:
    """A CPython of that version: from --python, this one, one in PATH, or one that pyenv or uv installed."""
    if wanted in given:
        candidates = [given[wanted]]
    else:
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
        uv = Path.home() / ".local/share/uv/python"
        number = wanted.rstrip("t")
        candidates = [
            sys.executable,
            *filter(None, [shutil.which(f"python{wanted}")]),
            *map(str, sorted(pyenv.glob(f"{number}[.t]*/bin/python3"), reverse=True)),
            *map(str, sorted(uv.glob(f"cpython-{number}[.+]*/bin/python3"), reverse=True)),
        ]
    return next((candidate for candidate in candidates if python_version(candidate) == wanted), None)


def clean_environment(home: Path) -> dict[str, str]:
    """The environment without what could lead to the source tree, to a GPU or to the system's CUDA."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST", "CUDA", "TORCH", "FUSED_CONV_BN", "MAKE", "LD_"))
    }
    folders = env.get("PATH", os.defpath).split(os.pathsep)
    env["PATH"] = os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["TORCHINDUCTOR_CACHE_DIR"] = str(home / "inductor")  # else one row would use what another has compiled
    return env


# ---- one row ---------------------------------------------------------------------------------------------------------


class Environment:
    """A fresh virtual environment in ``home``, and commands that run in it."""

    def __init__(self, home: Path, python: str) -> None:
        self.home = home
        self.env = clean_environment(home)
        self.python = str(home / "venv" / "bin" / "python")
        self.work = home / "work"
        self.work.mkdir()
        self.check("making the virtual environment", python, "-m", "venv", str(home / "venv"))
        self.env["PATH"] = f"{home / 'venv' / 'bin'}{os.pathsep}{self.env['PATH']}"

    def run(self, *command: str) -> tuple[int, str]:
        """The exit status and everything that was printed. Paths in it are as on any machine."""
        try:
            result = subprocess.run(
                command,
                cwd=self.work,
                env=self.env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return -1, f"{command[0]} took more than {TIMEOUT} s"
        return result.returncode, self.anonymous(result.stdout)

    def anonymous(self, text: str) -> str:
        return text.replace(str(self.home), "$ROW")  # what would not break XML

    def check(self, what: str, *command: str) -> str:
        status, output = self.run(*command)
        if status != 0:
            raise RowError(f"{what} failed: {last_error(output)}")
        return output

    def pip(self, *arguments: str) -> None:
        # No cache: it would take as much space again as all the environments together.
        options = ["--quiet", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
        self.check("pip install", self.python, "-m", "pip", "install", *options, *arguments)


def last_error(output: str) -> str:
    """The line of a command's output that says why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|[\w.]*Error)\b", line)]
    return (errors or lines or ["it printed nothing"])[-1]


def install(environment: Environment, row: Row, wheel: Path) -> None:
    """torch and the wheel, with all they depend on."""
    if row.torch == NEWEST:
        environment.pip("torch", str(wheel))
    elif not row.cpu:
        environment.pip(f"torch=={row.torch}", str(wheel))
    else:
        # PyPI's builds for Linux are for CUDA. A local version is never on PyPI, so this takes no other build for it.
        requirement = f"torch=={row.torch}+cpu"
        try:
            environment.pip(requirement, str(wheel))
        except RowError:
            environment.pip("--extra-index-url", CPU_INDEX, requirement, str(wheel))


def gather_facts(environment: Environment, row: Row) -> dict[str, Any]:
    """The versions, once it is clear that the package works as installed and that nothing else is tested."""
    environment.check("python -m fused_conv_bn info", environment.python, "-m", "fused_conv_bn", "info")
    output = environment.check("import fused_conv_bn", environment.python, "-c", FACTS)
    told = json.loads(output.splitlines()[-1])
    facts: dict[str, Any] = told["facts"]
    if not told["installed"]:
        raise RowError("import fused_conv_bn took it from somewhere else than the environment it was installed into")
    if told["foreign"]:
        raise RowError(f"the system's CUDA is not hidden: {', '.join(told['foreign'])}")
    if row.cpu and facts["cuda"] is not None:
        raise RowError(f"torch {facts['torch']} is built for CUDA {facts['cuda']}, expected a build without CUDA")
    if row.python.endswith("t") and facts["gil"]:
        raise RowError("the GIL is on, expected import fused_conv_bn to leave it off")
    return facts


def test_requirements() -> list[str]:
    """What the tests import besides torch, in the versions of requirements/dev.txt."""
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    return [line for line in lines if re.match(r"(pytest|numpy)==", line)]


def copy_tests(target: Path, left_out: dict[str, str]) -> None:
    shutil.copytree(TESTS, target, ignore=shutil.ignore_patterns("__pycache__", *left_out))


def summary(junit: str) -> dict[str, Any]:
    """The counts in pytest's JUnit XML, the reasons of what was skipped, and each failure with its message."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: Counter[str] = Counter()
    failures = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if bad:
            counts["failed"] += 1
            message = (bad[0].get("message") or "").splitlines() or ["no message"]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {message[0]}")
        elif skipped is not None:
            counts["skipped"] += 1
            reasons[skipped.get("message") or "no reason given"] += 1
        else:
            counts["passed"] += 1
    return {**counts, "skip_reasons": dict(sorted(reasons.items())), "failures": failures}


def run_tests(environment: Environment, left_out: dict[str, str]) -> dict[str, Any]:
    environment.pip(*test_requirements())
    copy_tests(environment.work / "tests", left_out)
    report = environment.home / "junit.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    status, output = environment.run(environment.python, "-m", "pytest", *options, "tests")
    if not report.exists():  # the process died, or took too long
        raise RowError(f"pytest ended with status {status}: {last_error(output)}")
    result = {**summary(environment.anonymous(report.read_text())), "left_out": left_out}
    if (status == 0) != (result["failed"] == 0 and result["passed"] > 0):
        raise RowError(f"pytest ended with status {status}, and reports {result['passed']} tests that passed")
    return result


def run_row(row: Row, python: str, wheel: Path, left_out: dict[str, str]) -> dict[str, Any]:
    """The record of one row."""
    record: dict[str, Any] = {"torch": row.torch, "python": row.python, "result": "failed"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fused_conv_bn-compat-") as home:
        try:
            environment = Environment(Path(home).resolve(), python)
            install(environment, row, wheel)
            record["versions"] = gather_facts(environment, row)
            record["tests"] = run_tests(environment, left_out)
            if not record["tests"]["failed"]:
                record["result"] = "passed"
        except RowError as error:
            record["error"] = str(error)
    record["seconds"] = round(time.monotonic() - start)
    record["date"] = datetime.now(timezone.utc).date().isoformat()
    record["wheel"] = describe_wheel(wheel)
    return record


def outcome(record: dict[str, Any]) -> str:
    """A record in a few words: "1013 passed", "2 failed, 1011 passed" or why it did not come to that."""
    if "error" in record:
        return str(record["error"])
    tests = record["tests"]
    return (f"{tests['failed']} failed, " if tests["failed"] else "") + f"{tests['passed']} passed"


# ---- the record ------------------------------------------------------------------------------------------------------


def read_record() -> list[dict[str, Any]]:
    return json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []


def merge(rows: Sequence[Row], old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records in the order of the table: the new ones, and the old ones of rows that did not run."""
    records = {(record["torch"], record["python"]): record for record in [*old, *new]}
    return [records[row.key] for row in rows if row.key in records]


def section(records: Sequence[dict[str, Any]]) -> str:
    """The README's table."""
    lines = ["| torch | built for | CPython | libraries loaded | CPU tests |", "|---|---|---|---|---|"]
    for record in records:
        versions = record.get("versions")
        if versions is None:
            cells = [record["torch"], "", record["python"], ""]
        else:
            free_threaded = " free-threaded" if record["python"].endswith("t") else ""
            cells = [
                versions["torch"].partition("+")[0],
                f"CUDA {versions['cuda']}" if versions["cuda"] else "CPU",
                versions["python"] + free_threaded,
                ", ".join(versions["loaded"]),
            ]
        result = outcome(record).replace("|", "\\|")
        cells.append(result if record["result"] == "passed" else f"**{result}**")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(readme: str, records: Sequence[dict[str, Any]]) -> str:
    """The README with the table between its two markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise SystemExit(f"compat: README.md must have {BEGIN} and then {END}, once each")
    return f"{head}{BEGIN}\n{section(records)}\n{END}{tail}"


def write_readme() -> None:
    README.write_text(render(README.read_text(), read_record()))


# ---- command line ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests one wheel next to each torch and CPython of compat_rows.json.")
    parser.add_argument("--wheel", type=Path, metavar="PATH", help="default: the fat wheel of wheels/dist")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="ROW",
        help="rows by torch (2.13.0, newest) or torch/python (2.10.0/3.10)",
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="3.10=PATH", help="a CPython that is not found by itself"
    )
    parser.add_argument("--no-record", action="store_true", help="write neither compat.json nor README.md")
    parser.add_argument("--render", action="store_true", help="run nothing, write compat.json's table into README.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.render:
        write_readme()
        return 0
    table, left_out = read_table()
    rows = select(table, args.only)
    wheel = (args.wheel or find_wheel()).resolve()
    if not wheel.is_file():
        raise SystemExit(f"compat: --wheel is {wheel}, and there is no such file")
    if malformed := [text for text in args.python if "=" not in text]:
        raise SystemExit(
            f"compat: --python is {malformed[0]!r}, expected a version and a path, 3.10=/usr/bin/python3.10"
        )
    given = {version: os.path.abspath(path) for version, path in (text.split("=", 1) for text in args.python)}
    pythons = {row.python: find_python(row.python, given) for row in rows}
    if missing := [version for version, path in pythons.items() if path is None]:
        raise SystemExit(
            f"compat: no CPython {', '.join(missing)} was found: give --python {missing[0]}=PATH, or name other rows "
            f"with --only"
        )
    if not args.no_record:
        write_readme()  # shows now, not after the first row, whether it has its markers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("compat: terminated"))  # so that the environment is deleted
    failed = 0
    for number, row in enumerate(rows, 1):
        print(f"compat: {number} of {len(rows)}: {row} ...", flush=True)
        record = run_row(row, str(pythons[row.python]), wheel, left_out)
        failed += record["result"] != "passed"
        print(f"compat: {record['result']}: {outcome(record)}, {record['seconds']} s", flush=True)
        for failure in record.get("tests", {}).get("failures", []):
            print(f"    {failure}", flush=True)
        if not args.no_record:  # after each row: an interrupted run keeps what it has
            RECORD.write_text(json.dumps({"rows": merge(table, read_record(), [record])}, indent=1) + "\n")
            write_readme()
    print(f"compat: combinations that passed: {len(rows) - failed} of {len(rows)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
