"""What fuse() did to each convolution and BatchNorm of a model, and why not more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from .. import conditions
from .entry import Entry, State
from .guard import STATE
from .layers import is_conv, is_norm
from .root import around, is_root
from .words import Why, why


class Row(NamedTuple):
    """A convolution or a BatchNorm, or what is fused without them: a linear layer with its BatchNorm behind it, a gate,
    which is a squeeze-and-excite block's product, or, on CUDA, a pool. There the convolution behind a gate may take it
    along, and such a block's mean goes with its convolutions.

    ``path``: in the model; of a gate, and of a pool that is no module, its name behind the path of what calls it.
    ``module``: ``"conv"``, ``"bn"``, ``"linear"``, ``"gate"`` or ``"pool"``. ``state``: ``"fused"``, ``"left"``,
    ``"pending"`` (what it is in was not called yet, or not as it is now) or ``"not called"``. ``text``: what it was
    fused with, or why not. ``reason``: the kind of that, one of ``REASONS`` in ``_fuse/words.py``; empty for what is
    fused. ``algorithm``: what computes a fused convolution, for the shapes of the first call in evaluation mode, as
    :func:`fused_conv_bn.explain` says.
    """

    path: str
    module: str
    state: str
    text: str
    reason: str = ""
    algorithm: str = ""


class Report:
    """``rows``: a :class:`Row` for each convolution and BatchNorm, and for each linear layer whose BatchNorm is fused
    with what follows, in the order of the model; then for each gate and each pool. ``not_captured``:
    what was not captured, and why; ``channels_last``: paths of what is contiguous and runs in channels_last inside;
    ``frozen``: paths of what ``fuse(model, freeze=True)`` made snapshots of, and whether parameters or buffers in there
    have changed since in a way that PyTorch counts.

    Prints as a table.
    """

    def __init__(
        self,
        rows: list[Row],
        not_captured: dict[str, str],
        channels_last: Sequence[str] = (),
        frozen: Mapping[str, bool] | None = None,
    ) -> None:
        self.rows, self.not_captured, self.channels_last = rows, not_captured, list(channels_last)
        self.frozen = dict(frozen or {})

    @property
    def counts(self) -> dict[str, int]:
        """How many rows are of each state."""
        states = [row.state for row in self.rows]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    def groups(self) -> list[str]:
        """What the groups are, such as ``"conv bn relu"``, in the order of what gives them their rows."""
        fused = [row.text for row in self.rows if row.state == "fused" and not row.text.startswith("with ")]
        return [text.split(",")[0] for text in fused]

    def to_dict(self) -> dict[str, Any]:
        """All of it, of lists, dictionaries, numbers and strings."""
        return {
            "rows": [row._asdict() for row in self.rows],
            "counts": self.counts,
            "groups": {group: self.groups().count(group) for group in dict.fromkeys(self.groups())},
            "not captured": self.not_captured,
            "channels_last inside": self.channels_last,
            "frozen": self.frozen,
        }

    def __str__(self) -> str:
        width = max([len(row.path) for row in self.rows], default=0)
        lines = [
            f"{row.path:{width}}  {row.state:10}  {row.text}" + (f" [{row.algorithm}]" if row.algorithm else "")
            for row in self.rows
        ]
        lines += [f"{path or '(the model)'} is not captured: {reason}" for path, reason in self.not_captured.items()]
        lines += [f"{path or '(the model)'} runs in channels_last inside" for path in self.channels_last]
        for path, has_changed in self.frozen.items():
            since = ", which have changed since: fuse(model, freeze=True) takes a new one" if has_changed else ""
            lines.append(f"{path or '(the model)'} is frozen: a snapshot of its parameters and buffers{since}")
        total = ", ".join(f"{n} {state}" for state, n in self.counts.items()) or "no convolution and no BatchNorm"
        return "\n".join([*lines, total])

    __repr__ = __str__

    def of_part(self, path: str) -> Report:
        """What it says of one part, by paths in there."""

        def inside(p: str) -> str | None:
            return p[len(path) :].lstrip(".") if p == path or p.startswith(path + ".") else None

        def text(row: Row) -> str:
            word, _, other = row.text.partition(" ")
            return f"with {own}" if word == "with" and (own := inside(other)) is not None else row.text

        rows = [row._replace(path=p, text=text(row)) for row in self.rows if (p := inside(row.path)) is not None]
        not_captured = {p: reason for q, reason in self.not_captured.items() if (p := inside(q)) is not None}
        channels_last = [p for q in self.channels_last if (p := inside(q)) is not None]
        # A part of a snapshot is one.
        frozen = {inside(q) or "": changed for q, changed in self.frozen.items() if _is_in(path, q) or _is_in(q, path)}
        return Report(rows, not_captured, channels_last, frozen)


def report(model: nn.Module) -> Report:
    """What became of each convolution and BatchNorm of ``model``, by what was captured until now. Also of none.

    A part of a fused model, where that is what is given, runs as the model captured it.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model is of type {type(model).__name__}, expected an nn.Module")
    if (place := around(model)) is not None:
        outer, path = place
        return report(outer).of_part(path)
    modules = dict(model.named_modules())
    by_others = _others_call(modules)
    roots = {path: m for path, m in modules.items() if is_root(m) and _above(path, by_others) is None}
    captured = {path: _captured(root) for path, root in roots.items()}
    rows: dict[nn.Module, Row] = {}
    alone: dict[str, Row] = {}
    not_captured = dict(by_others)
    channels_last: list[str] = []
    for path, root in roots.items():
        state: State = root.__dict__[STATE]
        entries = captured[path]
        reasons = [*filter(None, [state.reason]), *state.refused.values()]
        if reasons:
            not_captured[path] = reasons[-1]
        if any(e.inside is not None and e.inside.is_on for e in entries):
            channels_last.append(path)
        for entry in reversed(entries):
            rows |= _rows_of(root, path, entry, rows)
            for g in entry.groups:
                name = f"{path}.{g.name}".lstrip(".")
                if g.is_gate:
                    own = "" if entry.on_cuda or g.describe() != "gate" else ", on the CPU PyTorch's own product"
                    alone[name] = Row(name, "gate", "fused", g.describe() + own)
                elif g.pooling is not None:
                    alone[name] = Row(name, "pool", "fused", g.describe())
                elif g.squeeze is not None and g.conv is not None:
                    name, conv = (f"{path}.{n}".lstrip(".") for n in (g.squeeze.mean.name, g.conv.target))
                    alone[name] = Row(name, "pool", "fused", f"with {conv}")
                elif g.gate is not None and g.conv is not None:
                    name, conv = (f"{path}.{n}".lstrip(".") for n in (g.gate.name, g.conv.target))
                    alone[name] = Row(name, "gate", "fused", f"with {conv}")
    found = []
    for path, m in modules.items():
        if is_conv(m) or is_norm(m) or m in rows:
            state_of, text, reason, algorithm = "left", "", "", ""
            blocked = _above(path, by_others)
            if blocked is not None:
                state_of, (reason, text) = "left", _no_capture(blocked, by_others[blocked])
            elif m in rows:
                _, _, state_of, text, reason, algorithm = rows[m]
            else:
                state_of, (reason, text) = _otherwise(path, roots, captured, not_captured)
            kind = "conv" if is_conv(m) else "linear" if isinstance(m, nn.Linear) else "bn"
            found.append(Row(path, kind, state_of, text, reason, algorithm))
    return Report([*found, *alone.values()], not_captured, channels_last, _snapshots(roots))


def _is_in(path: str, outer: str) -> bool:
    return outer in ("", path) or path.startswith(outer + ".")


def _above(path: str, paths: Iterable[str]) -> str | None:
    """The nearest one that a path is, or is in."""
    return max((p for p in paths if _is_in(path, p)), key=len, default=None)


def _no_capture(path: str, reason: str) -> Why:
    return why("no capture", f"{path or 'the model'} is not captured: {reason}")


def _others_call(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The parts whose calls never come to a capture, and why."""
    if conditions.hooks_for_all():
        return {"": "a hook is registered for all modules"}
    found: dict[str, str] = {}
    for path, m in modules.items():
        if (compiler := conditions.compiled_by(m)) is not None and _above(path, found) is None:
            found[path] = f"it is compiled by {compiler}"
    return found


def _captured(root: nn.Module) -> list[Entry]:
    """What runs; of a kind of call that nothing runs for as the root is now, what did. Without what hooks ended."""
    state: State = root.__dict__[STATE]
    found: list[Entry] = []
    for of_key in state.entries.values() if state.reason is None else ():
        attached = [e for e in of_key if e.guard.is_attached()]
        found += [e for e in attached if e.guard.holds(root)][:1] or attached
    return found


def _snapshots(roots: dict[str, nn.Module]) -> dict[str, bool]:
    """The outermost ones, and whether what they were made from has changed."""
    found: dict[str, bool] = {}
    for path, root in roots.items():
        state: State = root.__dict__[STATE]
        if state.frozen:
            entries = [e for of_key in state.entries.values() for e in of_key]
            changed = any(e.versions is not None and e.versions.have_changed() for e in entries)
            outer = _above(path, found)
            found[path if outer is None else outer] = changed or (outer is not None and found[outer])
    return found


def _rows_of(root: nn.Module, at: str, entry: Entry, known: dict[nn.Module, Row]) -> dict[nn.Module, Row]:
    """Of one capture, of a root at ``at``. What is fused in any is fused."""
    rows: dict[nn.Module, Row] = {}
    for path in entry.called:
        m = root.get_submodule(path)
        if (is_conv(m) or is_norm(m)) and m not in known:
            reason = entry.why.get(path, why("alone"))
            rows[m] = Row("", "", "left", reason.text, reason.kind)
    for group, block in zip(entry.groups, entry.blocks, strict=True):
        paths = (None if n is None else str(n.target) for n in (group.conv, group.layer))
        conv, layer, bn = (None if path is None else root.get_submodule(path) for path in (*paths, group.bn_path))
        where = " where that is faster" if block.may_be_plain else ""
        if group.squeeze is not None:
            excite = group.squeeze.excite.conv
            assert excite is not None and group.conv is not None
            of_first = f"{at}.{group.conv.target}".lstrip(".")
            rows[root.get_submodule(str(excite.target))] = Row("", "", "fused", f"with {of_first}")
        if conv is not None:
            rows[conv] = Row("", "", "fused", group.describe(), "", entry.algorithms.get(str(group.conv.target), ""))  # type: ignore[union-attr]
        if layer is not None:
            rows[layer] = Row("", "", "fused", f"{group.describe()}, one pass behind PyTorch's op{where}")
        if bn is not None:
            node = group.conv or group.layer
            other = None if node is None else f"{at}.{node.target}".lstrip(".")
            text = f"{group.describe()}, one pass{where}: {group.note}" if other is None else f"with {other}"
            rows[bn] = Row("", "", "fused", text)
    return rows


def _otherwise(
    path: str, roots: dict[str, nn.Module], captured: dict[str, list[Entry]], not_captured: dict[str, str]
) -> tuple[str, Why]:
    """Of what no capture has: its state and the reason."""
    if not roots:
        return "left", why("not fused")
    above = [p for p in roots if _is_in(path, p)]
    nearest = max(above, key=len, default=None)
    if nearest is None:
        return "not called", why("no call")
    state: State = roots[nearest].__dict__[STATE]
    if state.refused:
        return "left", why("mismatch", not_captured[nearest])
    if state.reason is not None:
        return "left", _no_capture(nearest, state.reason)
    states = {p: roots[p].__dict__[STATE] for p in sorted(above, key=len, reverse=True)}
    if any(captured[p] for p in states):
        return "not called", why("no call")
    if any(s.entries for s in states.values()):
        return "pending", why("again")
    # A container that is iterated over is not called, and what called its layers could not be captured.
    refused = next((p for p, s in states.items() if s.reason is not None), None)
    if refused is None:
        return "pending", why("pending")
    return "left", _no_capture(refused, str(states[refused].reason))
