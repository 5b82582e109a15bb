"""Compiles one .cu file as nvcc would, to an object file that is the same on every machine and in every folder.

    python wheels/nvcc.py NVCC -MD -MF DEPENDENCIES FLAGS... -c SOURCE -o OBJECT FLAGS...

nvcc names internal symbols after its process, its temporary files and the folder it runs in; CUDA 12's has no option
against that. So this asks nvcc for the commands that it would run (--dryrun) and runs them, with two changes: the file
that those names are taken from, which cudafe++ would write, is written here and says only what the source is called;
and for CUDA 12, whose compression looks back no further than 64 KB, kernels that resemble each other become neighbours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_id(source: str) -> str:
    """What cudafe++ would write but for the checksums, which are of the source's path in this tree alone."""
    name = re.sub(r"\W", "_", Path(source).name)
    return f"_{zlib.crc32(source.encode()):08x}_{len(name)}_{name}_00000000"


# A line of inline assembly may be a brace too.
KERNEL = re.compile(r"^\.visible \.entry (\w+)\(.*?^}\n(?!\t// end inline asm)", re.MULTILINE | re.DOTALL)


def gather(ptx: str) -> str:
    """PTX with each kernel for bfloat16 beside its twin for float16. Machine code will have the same order."""

    def twins(kernel: re.Match[str]) -> tuple[str, str]:
        name = kernel[1]
        # What the types' mangled names are, and the references back to them, whose numbers differ.
        return re.sub(r"S[0-9A-Z]*_", "", re.sub("6__half|13__nv_bfloat16", "*", name)), name

    return KERNEL.sub("", ptx) + "".join(kernel[0] for kernel in sorted(KERNEL.finditer(ptx), key=twins))


def steps_of(plan: str) -> tuple[dict[str, str], list[str]]:
    """The variables that nvcc sets for its commands, and the commands."""
    variables: dict[str, str] = {}
    commands: list[str] = []
    for line in plan.splitlines():
        step = line.removeprefix("#$ ")
        if step == line:
            continue
        name, equals, value = step.partition("=")
        if equals and re.fullmatch(r"\w+", name):
            variables[name] = value
        else:
            commands.append(step)
    return variables, commands


def split(arguments: tuple[str, ...]) -> tuple[list[str], str, str, str]:
    """The flags, and the files of dependencies, source and object, in whatever order they come.

    torch writes two of the options in full up to some version: --generate-dependencies-with-compile (-MD) and
    --dependency-output (-MF).
    """
    flags: list[str] = []
    files: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        if argument in ("-MF", "--dependency-output", "-o"):
            files["-o" if argument == "-o" else "-MF"] = next(left, "")
        elif argument.endswith(".cu") and not argument.startswith("-"):
            files["-c"] = argument
        elif argument not in ("-c", "-MD", "--generate-dependencies-with-compile"):
            flags.append(argument)
    if files.keys() != {"-MF", "-c", "-o"}:
        raise SystemExit("usage: nvcc.py NVCC -MD -MF DEPENDENCIES FLAGS... -c SOURCE -o OBJECT FLAGS...")
    return flags, files["-MF"], files["-c"], files["-o"]


def name_in_tree(source: str) -> str:
    """The path of a source in this tree, wherever it is compiled from."""
    path = Path(source).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else source


def main(nvcc: str, *arguments: str) -> int:
    flags, dependencies, source, target = split(arguments)
    folder = Path(f"{target}.steps")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ask = [nvcc, "--dryrun", "--keep", "--keep-dir", str(folder), *flags, "-c", source, "-o", target]
    plan = subprocess.run(ask, capture_output=True, text=True)
    variables, commands = steps_of(plan.stderr)
    if plan.returncode != 0 or not commands:
        print(plan.stderr, file=sys.stderr)
        return plan.returncode or 1
    id_file = folder / f"{Path(source).stem}.module_id"
    name = name_in_tree(source)
    id_file.write_text(module_id(name))
    changed = 0
    for command in commands:
        changed += "--gen_module_id_file" in command
        command = command.replace("--gen_module_id_file", "")
        command = re.sub(r'--orig_src_path_name "[^"]*"', f'--orig_src_path_name "{name}"', command)
        if re.search(r' -o "[^"]*\.cpp4\.ii"\s*$', command):  # the preprocessor for the host's half
            command += f' -MD -MF "{dependencies}" -MT "{target}"'
        status = subprocess.run(command, shell=True, env={**os.environ, **variables}).returncode
        if status != 0:
            return status
        ptx = re.search(r' -o "([^"]*\.ptx)"', command)
        if ptx and "-Xfatbin=-compress-all" in flags:
            Path(ptx[1]).write_text(gather(Path(ptx[1]).read_text()))
    if changed != 1 or not Path(dependencies).exists():
        print(f"{nvcc} runs other commands than this program knows: {commands}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
