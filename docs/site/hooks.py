"""What mkdocs calls to make the site: pages of files that are not in docs/, and links that lead to them.

A link in docs/ is one that GitHub follows, relative to the file that it is in. On the site README.md, CONTRIBUTING.md
and CHANGELOG.md are pages, pictures are copied, and every other file that a link names is a page that shows it.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "fused_conv_bn"

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the tree that are pages of the site, beside those of docs/."""

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)((?:#[^)\s]*)?)\)")  # its text, the file, the anchor
# What is passed over comes first.
_CALL = re.compile(
    r"^ *```.*?^ *```$|^    [^\n]*$|^#[^\n]*$|\[[^\]]*\]\([^)]*\)|(?P<code>(?<!`)`fcb\.(?P<name>\w+)\b[^`\n]*`)",
    re.MULTILINE | re.DOTALL,
)
_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"site_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- links -----------------------------------------------------------------------------------------------------------


def page_of(path: str) -> str:
    """The page or the picture of a file of the tree, from the site's top on."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".png") else f"tree/{path}.md"


def file_of(target: str, path: str) -> str | None:
    """The file of the tree that a document at ``path`` means by ``target``; None if it is none."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return found if "://" not in target and (ROOT / found).exists() else None


def links_of(markdown: str, path: str) -> Iterator[str]:
    """The files of the tree that a document at ``path`` links to."""
    for _, target, _ in _LINK.findall(_FENCED.sub("", markdown)):
        if (found := file_of(target, path)) is not None:
            yield found


def with_links(markdown: str, path: str, titles: dict[str, str]) -> str:
    """A document at ``path`` of the tree as a page: its links lead to pages, and have a page's title where they have a
    file's name."""
    here = posixpath.dirname(page_of(path)) or "."

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if (found := file_of(target, path)) is None:
            return match[0]  # mkdocs says what is wrong with it
        uri = page_of(found)
        is_name = text in (target, posixpath.basename(target))
        return f"[{titles.get(uri, text) if is_name else text}]({posixpath.relpath(uri, here)}{anchor})"

    return _LINK.sub(replace, markdown)


def titles_of(nav: list[Any] | dict[str, Any] | str, title: str = "") -> dict[str, str]:
    """What mkdocs.yml calls the pages."""
    if isinstance(nav, str):
        return {nav: title} if title else {}
    items = nav.items() if isinstance(nav, dict) else [("", item) for item in nav]
    return {uri: name for key, item in items for uri, name in titles_of(item, key).items()}


def with_references(markdown: str) -> str:
    """Code that begins with ``fcb.`` and a public name is a link to the reference. Headings, links and blocks stay."""
    names = exported().keys() - MEMBERS.keys()

    def replace(match: re.Match[str]) -> str:
        if match["name"] not in names:
            return match[0]
        return f"[{match['code']}][fused_conv_bn.{match['name']}]"

    return _CALL.sub(replace, markdown)


def as_page(markdown: str) -> str:
    """What GitHub reads and Python's Markdown does not: a table in a list that is indented by two spaces. Sessions are
    of another language than programs."""
    markdown = re.sub(r"^  (?=\|)", "    ", markdown, flags=re.MULTILINE)
    return re.sub(r"^```python\n(?=>>>)", "```pycon\n", markdown, flags=re.MULTILINE)


# ---- generated pages -------------------------------------------------------------------------------------------------


def tree_page(path: str) -> str:
    """A page that shows a file, or lists a folder."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    file = ROOT / path
    if file.is_dir():
        return head + "".join(f"- `{child.name}`\n" for child in sorted(file.iterdir()))
    language = {".py": "python", ".cu": "cuda", ".json": "json"}.get(file.suffix, "text")
    return f"{head}````{language}\n{file.read_text()}````\n"


def exported() -> dict[str, str]:
    """The package's public names, each with the module that it is imported from; of a module its own name."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    sources = {
        alias.asname or alias.name: node.module or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return {name: sources[name] for name in names}


REFERENCE = {
    "modules": ("Modules", ["modules"]),
    "functions": ("Functions", ["ops"]),
    "models": ("Whole models", ["_fuse", "graphs"]),
    "choices": ("Algorithms and conditions", ["algorithms", "conditions"]),
    "twins": ("Reference implementation", ["reference"]),
}
"""Pages: their titles, and the modules whose public names they have. What is of no page is a function."""

OWN_TEXT = {"functions": "ops", "choices": "conditions", "twins": "reference"}
"""Pages that begin with a module's own documentation."""

RETURNED = {"models": ["_fuse.report.Row", "graphs.Graphed"]}
"""Classes that have no public name, and are what functions return."""

MEMBERS = {"conditions": ["why_not"], "reference": None}
"""Public modules, and what of them the reference has; None: every function."""


def reference_page(page: str) -> str:
    title, modules = REFERENCE[page]
    known = {module for _, of_page in REFERENCE.values() for module in of_page}
    lines = [f"# {title}\n"]
    if page in OWN_TEXT:
        options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
        lines.append(f"::: fused_conv_bn.{OWN_TEXT[page]}\n    options: {options}\n")
    for name, source in exported().items():
        if source not in modules and not (page == "functions" and source not in known):
            continue
        if name not in MEMBERS:
            lines.append(f"::: fused_conv_bn.{name}\n")
            continue
        members = MEMBERS[name]
        if (wanted := members) is None:
            files = PACKAGE / f"{name}.py", *sorted(PACKAGE.glob(f"_{name}_*.py"))
            wanted = [function for file in files for function in functions_of(file)]
        lines += [f"::: fused_conv_bn.{name}.{member}\n" for member in wanted]
    lines += [f"::: fused_conv_bn.{name}\n" for name in RETURNED.get(page, ())]
    return "\n".join(lines)


def functions_of(file: Path) -> list[str]:
    """The public functions of a module that say what they do."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if not node.name.startswith("_") and ast.get_docstring(node)]


def ops_page() -> str:
    """The schemas of the ops."""
    source = _module("schemas")
    lines = [
        "# torch.ops.fused_conv_bn\n",
        "The ops themselves, as PyTorch knows them. The [functions](functions.md) of the same names document the "
        "arguments. An op keeps no autograd graph: see [the guide](../guide.md#limits).\n",
    ]
    for title, public in ("Ops", True), ("Of this package's own use", False):
        lines.append(f"## {title}\n")
        if not public:
            lines.append("These may change with any version.\n")
        for schema in source.schemas():
            if source.is_public(schema) is public:
                lines.append(f"```text\n{broken(schema)}\n```\n")
    return "\n".join(lines)


def broken(schema: str, width: int = 100) -> str:
    """A schema over several lines, each but the first indented."""
    lines = [""]
    for argument in schema.split(", "):
        if lines[-1] and len(lines[-1]) + len(argument) > width:
            lines[-1] += ","
            lines.append("    " + argument)
        else:
            lines[-1] += f", {argument}" if lines[-1] else argument
    return "\n".join(lines)


# ---- what mkdocs calls -----------------------------------------------------------------------------------------------


def on_files(files: Files, *, config: Any) -> Files:
    def generate(uri: str, content: str) -> None:
        files.append(File.generated(config, uri, content=content))

    documents = {f"docs/{file.src_uri}": Path(str(file.abs_src_path)) for file in files.documentation_pages()}
    documents |= {name: ROOT / name for name in PAGES}
    linked: set[str] = set()
    for path, file in documents.items():
        linked.update(links_of(file.read_text(), path))
    for path, uri in PAGES.items():
        generate(uri, with_links((ROOT / path).read_text(), path, titles_of(config.nav)))
    for path in sorted(linked):
        if path.endswith(".png"):
            files.append(File.generated(config, page_of(path), abs_src_path=os.fspath(ROOT / path)))
        elif path not in documents:
            generate(page_of(path), tree_page(path))
    for page in REFERENCE:
        generate(f"reference/{page}.md", reference_page(page))
    generate("reference/ops.md", ops_page())
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    if page.file.generated_by is None:
        markdown = with_links(markdown, f"docs/{page.file.src_uri}", titles_of(config.nav))
    is_prose = page.file.generated_by is None or page.file.src_uri in PAGES.values()
    return as_page(with_references(markdown) if is_prose else markdown)
