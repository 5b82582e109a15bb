"""Builds wheels of this tree: python wheels/build.py [fat|cpu|cu124|cu130|all ...]

matrix.json says what there is: the libraries with their CUDA versions and architectures, and which wheel has which. The
interpreter's environment has to have torch, CUDA 13's compiler and what requirements/dev.txt lists (`make wheel` sees
to that); the CUDA 12 compiler is set up by toolchain.py. Each library is compiled once, whatever the number of wheels,
and again only when something that it is made of has changed: build/wheels keeps the object files.

A wheel that lacks a library, or has other architectures than the matrix says (TORCH_CUDA_ARCH_LIST), gets the local
version "partial": no index takes it for the complete one, and PyPI does not take it at all.

Two builds of one commit are equal to the byte. SOURCE_DATE_EPOCH is the date of the files in the wheel; default: the
commit's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheels"

sys.path[:0] = [str(ROOT), str(ROOT / "wheels")]

import toolchain  # noqa: E402
from build_tools import MATRIX, environment, libraries  # noqa: E402


def say(line: str) -> None:
    print(f"wheels: {line}", flush=True)


def run_setup(arguments: list[str], environment: dict[str, str]) -> None:
    """Runs setup.py. Shows ninja's progress; all of the output is in the log, its end here if it fails."""
    command = [sys.executable, "setup.py", *arguments]
    path = BUILD / "log"
    with path.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if step := re.match(r"(\[\d+/\d+\]).* -c (\S+)", line):
                print(f"  {step[1]} {Path(step[2]).name}", flush=True)
    if process.wait() != 0:
        tail = "\n".join(path.read_text().splitlines()[-60:])
        raise SystemExit(f"{tail}\nwheels: setup.py failed, all of its output is in {path}")


def commit_date() -> str:
    """Seconds since 1970; for a tree that is not in git the earliest date that a zip file can hold."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "315532800"


def compiler_of(library: str) -> Path:
    """The folder of the CUDA toolkit that a library is compiled with. Raises ToolchainError."""
    if library == "cu12":
        return toolchain.ensure(lambda line: say(f"CUDA 12 compiler: {line}"))
    major = int(library[2:])
    cuda = environment.find_cuda().get(major)
    version = MATRIX["libraries"][library]["cuda"]
    if cuda is None or "{}.{}".format(*cuda.version) != version:
        found = "none" if cuda is None else "{}.{} in {}".format(*cuda.version, cuda.home)
        raise toolchain.ToolchainError(
            f"it has to be CUDA {version}'s, and {found} was found: pip install '{environment.CUDA_REQUIREMENT}'"
        )
    return cuda.home


def compile_library(library: str) -> Path:
    """The compiled library. Raises ToolchainError if there is no compiler for it."""
    environment = {
        "FUSED_CONV_BN_CUDA": "0",
        "FUSED_CONV_BN_GLIBC": re.sub(r"manylinux_(\d+)_(\d+)_.*", r"\1.\2", MATRIX["platform"]),
    }
    if library != "cpu":
        environment["CUDA_HOME"] = str(compiler_of(library))
        environment["FUSED_CONV_BN_CUDA"] = library[2:]
    run_setup(["build_ext", f"--build-lib={BUILD / 'lib'}", f"--build-temp={BUILD / 'temp'}"], environment)
    return BUILD / "temp" / library / MATRIX["libraries"][library]["file"]


def pack(wheel: str, libraries: list[Path], local: str | None, out: Path) -> Path:
    """Makes one wheel of compiled libraries and the Python files, and returns its path."""
    folder = BUILD / wheel
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("egg", "dist"):
        (folder / name).mkdir(parents=True)
    tag = f"+{local}" if local else ""
    run_setup(
        [
            *("egg_info", f"--egg-base={folder / 'egg'}", f"--tag-build={tag}"),
            *("build", f"--build-base={folder}"),
            *("bdist_wheel", f"--bdist-dir={folder / 'tree'}", f"--dist-dir={folder / 'dist'}"),
            f"--plat-name={MATRIX['platform']}",
        ],
        {"FUSED_CONV_BN_LIBRARIES": os.pathsep.join(map(str, libraries))},
    )
    (built,) = (folder / "dist").glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(built, out / built.name))


def main(arguments: list[str] | None = None) -> None:
    wheels = MATRIX["wheels"]
    parser = argparse.ArgumentParser(description="Builds wheels of this tree.")
    parser.add_argument(
        "wheels", nargs="*", metavar="wheel", default=["fat"], help=f"{', '.join(wheels)} or all; default: fat"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "wheels" / "dist", help="default: wheels/dist")
    parser.add_argument(
        "--allow-missing", action="store_true", help="exit with 0 although a library could not be compiled"
    )
    args = parser.parse_args(arguments)
    wanted = list(wheels) if "all" in args.wheels else list(dict.fromkeys(args.wheels))
    for name in wanted:
        if name not in wheels:
            parser.error(f"there is no wheel {name!r}: choose from {', '.join(wheels)}, all")

    BUILD.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SOURCE_DATE_EPOCH", commit_date())
    begin = time.monotonic()
    compiled: dict[str, Path] = {}
    complaints: list[str] = []
    for library in [name for name in MATRIX["libraries"] if any(name in wheels[w]["libraries"] for w in wanted)]:
        archs = [] if library == "cpu" else libraries.archs(library)
        say(f"library {library}{' for compute capability ' if archs else ''}{' '.join(archs)}")
        start = time.monotonic()
        try:
            compiled[library] = compile_library(library)
        except toolchain.ToolchainError as error:
            complaints.append(f"there is no library {library}, for want of its compiler: {error}")
            say(complaints[-1])
            continue
        say(
            f"library {library}: {compiled[library].stat().st_size / 1e6:.2f} MB after {time.monotonic() - start:.0f} s"
        )

    for name in wanted:
        of_wheel = wheels[name]["libraries"]
        missing = [library for library in of_wheel if library not in compiled]
        narrow = any(
            archs != libraries.archs(lib) for lib in of_wheel if (archs := MATRIX["libraries"][lib].get("archs"))
        )
        local = ".".join(filter(None, [wheels[name]["local"], "partial" if missing or narrow else None])) or None
        if missing and wheels[name]["local"]:
            complaints.append(f"the {name} wheel was not built: it is of no use without {', '.join(missing)}")
            continue
        path = pack(name, [compiled[library] for library in of_wheel if library in compiled], local, args.out)
        if missing:
            complaints.append(f"the {name} wheel has no library for {', '.join(missing)}, and is named {path.name}")
        say(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    say(f"done after {time.monotonic() - begin:.0f} s")
    for complaint in complaints:
        print(f"wheels: {complaint}", file=sys.stderr)
    if complaints and not args.allow_missing:
        raise SystemExit("wheels: incomplete; with --allow-missing this is no error")


if __name__ == "__main__":
    main()
