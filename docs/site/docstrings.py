"""Docstrings of this package as Markdown: references to public names become links, ``::`` before a block one colon."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|data|meth|mod):`([\w.]+)`")


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = {*map(str, pkg.exports or ()), "conditions.why_not"}

        def link(match: re.Match[str]) -> str:
            name = match[1].removeprefix(f"{pkg.name}.")
            return f"[`{name}`][{pkg.name}.{name}]" if name in public else f"`{name}`"

        def convert(obj: griffe.Object) -> None:
            if obj.docstring is not None:
                text = _ROLE.sub(link, obj.docstring.value)
                obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            for member in obj.members.values():
                if not member.is_alias:
                    convert(member)  # type: ignore[arg-type]

        convert(pkg)
        for name in public & pkg.members.keys():
            member = pkg.members[name]
            target = pkg[member.target_path.removeprefix(f"{pkg.name}.")] if member.is_alias else member
            if target.is_module and name in target.members:  # a function of the name of its own file
                pkg.set_member(name, griffe.Alias(name, target.members[name], parent=pkg))
