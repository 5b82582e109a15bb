"""README.md as a package index shows it: without the tree's other files, to which links would lead nowhere."""

from __future__ import annotations

import re

from build_tools import ROOT

# [text](target) and ![text](target); the text may be broken into lines, and the target is no URL and no heading.
IN_TREE = re.compile(r"(!?)\[([^\]]+)\]\((?![a-z]+:|#)[^)\s]+\)")


def without_links(text: str) -> str:
    """Links into the tree become their texts, and images go."""
    return IN_TREE.sub(lambda link: "" if link[1] else link[2], text)


def of_package() -> str:
    return without_links((ROOT / "README.md").read_text(encoding="utf-8"))
