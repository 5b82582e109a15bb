"""Sets up the CUDA 12 compiler that the _cu12 library is built with, and prints where it is.

PyPI has no nvcc of CUDA 12. Debian's package of it runs on any Linux, and what else it takes is on PyPI: cuda12.json
names the archives, their checksums, and what is taken from each. Nothing is installed: the files are unpacked into
$XDG_CACHE_HOME/fused_conv_bn (by default ~/.cache/fused_conv_bn), once for each content of cuda12.json.

Environment:
    FUSED_CONV_BN_DEBIAN_MIRROR    where Debian's packages are. Default: http://deb.debian.org/debian.
    PIP_*                          pip's own settings, for those from PyPI.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

SPEC = Path(__file__).with_name("cuda12.json")

# What nvcc reads beside itself to find its other half. Debian's has absolute paths.
NVCC_PROFILE = """\
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib" $(_SPACE_)
"""


class ToolchainError(Exception):
    """Says in one sentence why there is no toolchain."""


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_conv_bn"


def download_deb(path: str, directory: Path) -> Path:
    mirror = os.environ.get("FUSED_CONV_BN_DEBIAN_MIRROR") or "http://deb.debian.org/debian"
    url = f"{mirror.rstrip('/')}/{urllib.parse.quote(path)}"
    target = directory / Path(path).name
    try:
        with urllib.request.urlopen(url, timeout=60) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file)
    except OSError as error:
        raise ToolchainError(
            f"{url} could not be downloaded ({error}); another mirror goes into FUSED_CONV_BN_DEBIAN_MIRROR"
        ) from None
    return target


def download_wheel(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=directory) as empty:
        result = subprocess.run([*command, "--dest", empty, requirement], capture_output=True, text=True)
        wheels = list(Path(empty).glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ToolchainError(f"pip could not download {requirement} ({reason})")
        return Path(shutil.move(wheels[0], directory))


def verify(path: Path, sha256: str) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise ToolchainError(
            f"{path.name} is damaged or not the file that was meant: its SHA-256 is {digest}, expected {sha256}"
        )


def open_deb(path: Path) -> tarfile.TarFile:
    """The files of a Debian package: an `ar` archive, whose member data.tar.* has them."""
    data = path.read_bytes()
    offset = 8  # "!<arch>\n"
    while offset < len(data):
        name, size = data[offset : offset + 16], int(data[offset + 48 : offset + 58])
        offset += 60
        if name.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(data[offset : offset + size]))
        offset += size + size % 2
    raise ToolchainError(f"{path.name} is not a Debian package: it has no data.tar")


def files_of(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The regular files in a .deb or .whl: the name and a function that reads it."""
    if path.suffix == ".deb":
        with open_deb(path) as deb:
            for member in deb:
                if member.isfile():
                    yield member.name.removeprefix("./"), deb.extractfile(member).read  # type: ignore[union-attr]
    else:
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                yield name, lambda name=name: wheel.read(name)  # type: ignore[misc]


def unpack(path: Path, take: dict[str, str], home: Path) -> None:
    """Copies what ``take`` names, files or (with a slash at the end) folders, to where it says under ``home``."""
    missing = dict(take)
    for name, read in files_of(path):
        source = next((entry for entry in take if name == entry or (entry[-1] == "/" and name.startswith(entry))), None)
        if source is None or name.endswith("/"):
            continue
        missing.pop(source, None)
        target = home / (take[source] + name.removeprefix(source))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read())
        target.chmod(0o755 if "bin" in target.relative_to(home).parts else 0o644)
    if missing:
        raise ToolchainError(f"{path.name} has no {', '.join(missing)}")


def check(home: Path) -> None:
    """Raises unless the compiler runs."""
    try:
        result = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    except OSError as error:
        raise ToolchainError(f"its nvcc does not run here ({error})") from None
    version = json.loads(SPEC.read_text())["version"]
    if f"release {version}," not in result.stdout:
        raise ToolchainError(f"its nvcc is not of CUDA {version}, it says: {(result.stdout + result.stderr).strip()}")


def ensure(say: Callable[[str], None] = lambda line: None) -> Path:
    """The toolkit's folder, for CUDA_HOME; sets it up if it is not there. Raises ToolchainError."""
    spec = SPEC.read_bytes()
    home = cache() / f"cuda-12-{hashlib.sha256(spec + NVCC_PROFILE.encode()).hexdigest()[:12]}"
    if home.exists():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix="setup-") as folder:
            new = Path(folder) / "toolkit"
            for archive in json.loads(spec)["archives"]:
                say(f"downloading {archive.get('pypi') or Path(archive['debian']).name}")
                if "pypi" in archive:
                    path = download_wheel(archive["pypi"], Path(folder))
                else:
                    path = download_deb(archive["debian"], Path(folder))
                verify(path, archive["sha256"])
                unpack(path, archive["take"], new)
                path.unlink()
            (new / "bin" / "nvcc.profile").write_text(NVCC_PROFILE)
            check(new)
            try:
                new.rename(home)  # whole or not at all
            except OSError:
                if not home.exists():  # else another process was faster
                    raise
    except OSError as error:
        raise ToolchainError(f"it could not be unpacked into {home.parent} ({error})") from None
    return home


if __name__ == "__main__":
    try:
        print(ensure(lambda line: print(f"toolchain: {line}", file=sys.stderr)))
    except ToolchainError as error:
        sys.exit(f"toolchain: the CUDA 12 compiler could not be set up: {error}")
