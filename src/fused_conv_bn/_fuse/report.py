"""What fuse() did to each convolution and BatchNorm of a model, and why not more."""

from __future__ import annotations

from typing import Any

from torch import nn

from .root import STATE, State, is_root

_CONVS, _NORMS = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm


class Report:
    """A line for each convolution and BatchNorm: ``path``, ``kind`` and ``text``. Prints as a table.

    ``kind`` is ``"fused"``, ``"left"`` (with the reason), ``"pending"`` (what it is in was not called yet) or
    ``"not called"``.
    """

    def __init__(self, rows: list[dict[str, str]], roots: dict[str, str]) -> None:
        self.rows, self.roots = rows, roots

    @property
    def counts(self) -> dict[str, int]:
        kinds = [row["kind"] for row in self.rows]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def groups(self) -> list[str]:
        """What the fused convolutions were fused with, and the BatchNorms that are behind none, in their order."""
        fused = [row["text"] for row in self.rows if row["kind"] == "fused" and not row["text"].startswith("with ")]
        return [text.split(",")[0] for text in fused]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "counts": self.counts, "not captured": self.roots}

    def __str__(self) -> str:
        width = max([len(row["path"]) for row in self.rows], default=0)
        lines = [f"{row['path']:{width}}  {row['kind']:10}  {row['text']}" for row in self.rows]
        lines += [f"{path or '(the model)'} is not captured: {reason}" for path, reason in self.roots.items()]
        total = ", ".join(f"{n} {kind}" for kind, n in self.counts.items()) or "no convolution and no BatchNorm"
        return "\n".join([*lines, total])

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """What became of each convolution and BatchNorm of ``model``, by what was captured until now. Also of none."""
    texts: dict[nn.Module, tuple[str, str]] = {}
    roots: dict[str, str] = {}
    pending: set[nn.Module] = set()
    for root_path, root in model.named_modules():
        if not is_root(root):
            continue
        state: State = root.__dict__[STATE]
        entries = [e for of_key in state.entries.values() for e in of_key]
        if state.reason is not None:
            roots[root_path] = state.reason
        for reason in state.refused.values():
            roots[root_path] = reason
        if not entries and state.reason is None and not state.refused:
            pending |= {m for m in root.modules() if isinstance(m, (_CONVS, _NORMS))}
        for entry in reversed(entries):
            for path in entry.called:
                m = root.get_submodule(path)
                if isinstance(m, (_CONVS, _NORMS)):
                    why = entry.why.get(path, "no BatchNorm reads its result alone" if isinstance(m, _CONVS) else "")
                    texts.setdefault(m, ("left", why))
            for group in entry.groups:
                bn = root.get_submodule(group.bn)
                if group.conv is None:
                    texts[bn] = "fused", f"{group.describe()}, one pass: {entry.why[group.bn]}"
                else:
                    texts[root.get_submodule(group.conv)] = "fused", group.describe()
                    texts[bn] = "fused", f"with {group.conv}"
    rows = []
    any_root = any(is_root(m) for m in model.modules())
    for path, m in model.named_modules():
        if not isinstance(m, (_CONVS, _NORMS)):
            continue
        otherwise = (
            ("pending", "its root was not called yet")
            if m in pending
            else ("not called", "no captured call reaches it")
        )
        if not any_root:
            otherwise = "left", "the model was not fused: fuse(model) was not called"
        kind, text = texts.get(m, otherwise)
        rows.append({"path": path, "module": "conv" if isinstance(m, _CONVS) else "bn", "kind": kind, "text": text})
    return Report(rows, roots)
