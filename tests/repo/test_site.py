"""The site that `make docs` builds: every link of it, every public name, every picture, and the schemas of the ops."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import torch

import fused_conv_bn as fcb

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="mkdocs-material needs Python 3.11 or newer")


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.loaded: list[str] = []  # by a browser, without a click
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids |= {named[key] or "" for key in ("id", "name") if key in named}
        for key in ("href", "src"):
            if named.get(key):
                self.references.append(str(named[key]))
                if tag != "a" and named.get("rel") not in ("canonical", "prev", "next"):
                    self.loaded.append(str(named[key]))


def build(target: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(target)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(target)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_document_is_a_page(site: Path) -> None:
    expected = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing", "changelog"}
    assert expected <= {path.stem for path in site.glob("*.html")}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 15 and sum(len(page.references) for page in pages.values()) > 1000
    dead = []
    for path, page in pages.items():
        for reference in page.references:
            address = urlsplit(reference)
            if address.scheme or reference.startswith("data:") or path.name == "404.html":
                continue
            file = (path.parent / unquote(address.path)).resolve() if address.path else path
            if file.is_dir():
                file /= "index.html"
            found = file.is_file() and file.is_relative_to(site)
            if found and address.fragment and file in pages and not address.fragment.startswith("__"):
                found = unquote(address.fragment) in pages[file].ids
            if not found:
                dead.append(f"{path.relative_to(site)}: {reference}")
    assert dead == []


def test_nothing_is_loaded_from_another_host(pages: dict[Path, Page]) -> None:
    assert {name for page in pages.values() for name in page.loaded if urlsplit(name).netloc} == set()


def test_every_public_name_is_in_the_reference(pages: dict[Path, Page]) -> None:
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "reference"))
    missing = [
        name for name in fcb.__all__ if f"fused_conv_bn.{name}" not in ids and name not in ("conditions", "reference")
    ]
    assert missing == []
    functions = [name for name in fcb.__all__ if inspect.isfunction(getattr(fcb, name))]
    assert len(functions) > 10  # one of them has the name of its own file, which is not what is meant
    assert [i for i in ids if i.startswith(tuple(f"fused_conv_bn.{name}." for name in functions))] == []
    assert {"fused_conv_bn.conditions.why_not", "fused_conv_bn.reference.bn_scale"} <= ids


def test_no_docstring_keeps_its_markup(site: Path) -> None:
    """Roles and double colons are for another tool."""
    for path in (site / "reference").glob("*.html"):
        text = re.sub(r"<[^>]+>", "", path.read_text())
        assert re.findall(r":(?:func|class|mod|data):|\w::\s", text) == [], path.name
        # A colon in the text would make a type of what is before it.
        returned = re.findall(r"Returns:\s+(.+?) – ", text)
        assert [of for of in returned if not re.fullmatch(r"[\w.\[\], ]+", of)] == [], path.name


def test_the_schemas_are_those_of_the_ops(site: Path) -> None:
    schemas = load("schemas").schemas()
    registered = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fused_conv_bn::")]
    read = {str(torch._C.parse_schema(f"fused_conv_bn::{schema}")) for schema in schemas}
    assert read == {str(schema) for schema in registered}
    page = (site / "reference" / "ops.html").read_text()
    assert all(f"{schema.partition('(')[0]}(" in page for schema in schemas)


def test_the_pictures_are_there(site: Path, pages: dict[Path, Page]) -> None:
    shown = re.findall(r"!\[[^\]]*\]\(\.\./([^)]+\.png)\)", (ROOT / "docs" / "performance.md").read_text())
    assert len(shown) >= 3
    page = pages[site / "performance.html"]
    for name in shown:
        assert name in page.references and (site / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize("link", ["nowhere.md", "guide.md#nowhere", "../nowhere.py"])
def test_a_dead_link_ends_the_build(tmp_path: Path, link: str) -> None:
    """mkdocs' own rule, as mkdocs.yml sets it: here over a folder of two pages."""
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = re.search(r"^validation:\n(?:  .*\n)+", settings, re.MULTILINE)
    assert validation is not None
    docs = tmp_path / "docs"
    docs.mkdir()
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: x\nstrict: true\n{validation[0]}")
    (docs / "guide.md").write_text("# Guide\n")
    (docs / "index.md").write_text("# Home\n\n[x](guide.md#guide)\n")
    assert build(tmp_path / "good", config).returncode == 0
    (docs / "index.md").write_text(f"# Home\n\n[x]({link})\n")
    assert build(tmp_path / "bad", config).returncode != 0
