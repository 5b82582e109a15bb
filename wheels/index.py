"""Makes package indexes (PEP 503) of thin wheels, one for each CUDA version, that any static file host can serve.

    python wheels/index.py WHEELS_DIR OUT

OUT then holds a folder for each local version, OUT/cpu, OUT/cu124, OUT/cu130, with the wheels in it. Put OUT at
https://host/whl, and an environment that has its torch already installs with

    pip install fused_conv_bn --index-url https://host/whl/cu130

Wheels without a local version are for PyPI, and one with a local version that the matrix (matrix.json) does not name is
not complete: both are left out. There are only HTML pages: a static host cannot offer JSON to those who ask for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import zipfile
from email.parser import Parser
from html import escape
from pathlib import Path
from urllib.parse import quote

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

PROJECT = "fused-conv-bn"  # as PEP 503 normalises it
MATRIX = Path(__file__).with_name("matrix.json")


def page(title: str, links: list[str]) -> str:
    body = "".join(f"    {link}<br>\n" for link in links)
    return (
        f'<!DOCTYPE html>\n<html>\n  <head>\n    <meta charset="utf-8">\n'
        f'    <meta name="pypi:repository-version" content="1.0">\n    <title>{escape(title)}</title>\n  </head>\n'
        f"  <body>\n{body}  </body>\n</html>\n"
    )


def requires_python(wheel: Path) -> str | None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())["Requires-Python"]


def link(wheel: Path) -> str:
    """To a wheel beside the page. pip refuses a file that does not have this hash."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    python = requires_python(wheel)
    condition = f' data-requires-python="{escape(python)}"' if python else ""
    # The + of the local version is quoted: some hosts take it for a space.
    return f'<a href="{quote(wheel.name)}#sha256={digest}"{condition}>{escape(wheel.name)}</a>'


def build(wheels_dir: Path, out: Path) -> list[Path]:
    """Writes the indexes and returns their folders. Raises SystemExit if there is nothing to put into them."""
    flavours = [row["local"] for row in json.loads(MATRIX.read_text())["wheels"].values() if row["local"]]
    wheels: dict[str, list[tuple[Version, Path]]] = {}
    for path in sorted(wheels_dir.glob("*.whl")):
        try:
            project, version, *_ = parse_wheel_filename(path.name)
        except InvalidWheelFilename as error:
            raise SystemExit(f"{path} is not named as a wheel has to be: {error}") from None
        flavour = version.local or ""
        if project == PROJECT and flavour in flavours:
            wheels.setdefault(flavour, []).append((version, path))
        else:
            print(f"left out: {path.name} is not a wheel of {PROJECT} with local version {', '.join(flavours)}")
    if not wheels:
        raise SystemExit(
            f"{wheels_dir} has no wheel of {PROJECT} with local version {', '.join(flavours)}: make them with "
            f"python wheels/build.py all"
        )
    for flavour, found in wheels.items():
        folder = out / flavour / PROJECT
        folder.mkdir(parents=True, exist_ok=True)
        links = [link(Path(shutil.copy(path, folder))) for _, path in sorted(found)]
        (folder / "index.html").write_text(page(PROJECT, links), encoding="utf-8")
        to_project = f'<a href="{PROJECT}/">{PROJECT}</a>'
        (out / flavour / "index.html").write_text(page(f"{PROJECT} {flavour}", [to_project]), encoding="utf-8")
    return [out / flavour for flavour in wheels]


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes package indexes of the thin wheels.")
    parser.add_argument("wheels_dir", type=Path, metavar="WHEELS_DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    for folder in build(args.wheels_dir, args.out):
        print(folder)


if __name__ == "__main__":
    main()
