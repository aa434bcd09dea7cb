"""Who belongs to a run: the sites of its file, and those that were registered since; who was removed has left.

What makes a site a member is its key among the hub's (`thinwire keys register`, `remove`). A client's number is the
place of its name in members.json of the run's folder, which only grows: a number is never another site's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from thinwire import files
from thinwire.errors import Paused
from thinwire.federation.keys import caps_of, public_keys
from thinwire.records import read_json


@dataclass(frozen=True)
class Member:
    """A site of a run. `joined`: its first round; `left`: the first without it, since it was last removed."""

    name: str
    joined: int = 1
    left: int | None = None


class Members:
    """The sites of a run's folder. `names`: of all that ever belonged to it, by number; it grows in its place.

    `named`: those of the run file. `keys`: the folder that `thinwire keys` fills. With `join` other names that are
    registered there become members. `most`: the rows that a site may claim which was registered without a number.
    """

    def __init__(
        self,
        folder: Path,
        named: Sequence[str],
        keys: Path,
        join: bool = False,
        most: int | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.keys, self.join, self.most, self.report = members_file(folder), keys, join, most, report
        self.known = read_json(list[Member], self.path) if self.path.exists() else [Member(name) for name in named]
        self.names = [member.name for member in self.known]
        self.public: dict[str, bytes] = {}  # name -> key of those that belong to it now
        self.caps: dict[int, int] = {}

    def now(self, round: int) -> tuple[int, ...]:
        """The clients that belong to the run from that round on, as the keys are now. Paused where there is none."""
        self.public = public_keys(self.keys, self.report)
        before = self.known
        if self.join:
            new = [name for name in self.public if name not in self.names]
            self.known = [*self.known, *(Member(name, round) for name in new)]
            self.names.extend(new)
        self.known = [self._at(member, round) for member in self.known]
        for member in (member for member in self.known if member not in before):
            takes = "takes part" if member.left is None else "takes no part any more"
            self.report(f"{member.name} {takes} from round {round} on")
        if self.known != before or not self.path.exists():
            files.write(self.path, json.dumps([asdict(member) for member in self.known], indent=2))
        most = {id: self.most for id in range(len(self.names)) if self.most is not None}
        self.caps.update(most | caps_of(self.keys, self.names))
        there = tuple(id for id, member in enumerate(self.known) if member.left is None)
        if not there:
            raise Paused("no site of the run is registered (thinwire keys register)")
        return there

    def _at(self, member: Member, round: int) -> Member:
        if member.name in self.public:
            return replace(member, left=None)
        return member if member.left is not None else replace(member, left=round)


def members_file(folder: Path) -> Path:
    """Where a run's folder has its members."""
    return folder / "federation" / "members.json"
