"""Which recordings are kept: of each kind of call one, and further ones where several calls wait for backward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from .recording import Need, Recording

MOST_OF_A_KIND = 4
"""Recordings. Each has what forward saves in memory of its own, for as long as it is kept."""


class Kind:
    """The recordings of one kind of call."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.most = MOST_OF_A_KIND
        self.beside = 0
        """Calls that found none free, since one was."""
        self.need = Need()

    def free(self) -> Recording | None:
        """The first one that no backward is to come for: a loop's first call has the same one in each step."""
        for recording in self.recordings:
            if not recording.is_waiting():
                self.beside = 0
                return recording
        return None

    def needs_another(self) -> bool:
        """Asked by a call that found none free. It is noted on what waits, and counts once their backward has come: a
        result that is dropped, as a step's that is left out, or held in evaluation is no reason for more memory."""
        if len(self.recordings) < min(self.need.calls, self.most):
            return True
        self.beside += 1
        for recording in self.recordings:
            recording.waits_beside(len(self.recordings) + self.beside - 1)
        return False

    def add(self, recording: Recording) -> None:
        self.recordings.append(recording)
        recording.need = self.need


class Kinds:
    """All recordings of a model, the least recently called kind first. Further ones have the room that is left."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kinds: OrderedDict[Hashable, Kind] = OrderedDict()

    def all(self) -> list[Recording]:
        return [r for kind in list(self.kinds.values()) for r in kind.recordings]

    def __len__(self) -> int:
        return len(self.all())

    def find(self, key: Hashable) -> Kind | None:
        kind = self.kinds.get(key)
        if kind is not None:
            self.kinds.move_to_end(key)
        return kind

    def add(self, key: Hashable, recording: Recording) -> None:
        self.kinds.setdefault(key, Kind()).add(recording)

    def has_room(self) -> bool:
        return len(self) < self.most

    def pop_one(self) -> Recording:
        """A further one of the least recently called kind that has any, else the only one of the first kind."""
        for kind in self.kinds.values():
            if len(kind.recordings) > 1:
                return kind.recordings.pop()
        return self.kinds.popitem(last=False)[1].recordings.pop()

    def pop_all(self) -> list[Recording]:
        recordings = self.all()
        self.kinds.clear()
        return recordings
