"""The documents of the tree: their blocks of code, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?:    [^\n]*\n|\n(?=    ))+")


class Block(NamedTuple):
    """``language``: the first word behind the fence, and ``"indented"`` where there is none. ``title``: the file that it is
    to be."""

    document: str
    line: int
    language: str
    title: str
    text: str

    @property
    def is_session(self) -> bool:
        return self.language == "python" and self.text.startswith(">>>")


class Command(NamedTuple):
    document: str
    text: str
    output: str


def blocks(path: Path) -> Iterator[Block]:
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    for found in _BLOCK.finditer(text):
        language, _, rest = found["info"].partition(" ")
        title = re.fullmatch(r'title="(.+)"', rest)
        own = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        yield Block(name, text.count("\n", 0, found.start()) + 1, language, title[1] if title else "", own)
    without = _BLOCK.sub(lambda m: "\n" * m[0].count("\n"), text)
    for found in _INDENTED.finditer(without):
        before = without[: found.start()].rstrip("\n").rpartition("\n")[2]
        if not re.match(r" *[-*\d|]", before) and not before.startswith("  "):  # what goes on is a list
            own = re.sub(r"^    ", "", found[0], flags=re.MULTILINE)
            yield Block(name, without.count("\n", 0, found.start()) + 1, "indented", "", own)


def commands(block: Block) -> Iterator[Command]:
    """What a user types. In a console it is behind a ``$``, and what it prints follows."""
    if block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Command(block.document, command, output)
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip()
        if command:
            yield Command(block.document, command, "")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", _BLOCK.sub("", text))


def links(path: Path) -> list[tuple[str, str]]:
    """(file or address, anchor) of each link and picture."""
    found = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", without_code(path.read_text()))
    return [(target, anchor) for target, anchor in found]


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them; the site has the same."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ (.+)$", _BLOCK.sub("", path.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found
