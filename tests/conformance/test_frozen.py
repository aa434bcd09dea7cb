"""What must not change by moving code: the sha256 of every frame and of the last state of three rounds of each row.

The numbers stand in frozen.json, by processor, for a product's rounding depends on it, and are those of the libraries
in constraints.txt: with others the test skips. `python
tests/conformance/test_frozen.py` writes those of this machine: only where a row is new, or its bytes are meant to be
others, which is then in the change log.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from federation import Federation  # noqa: E402
from pinned import other_versions  # noqa: E402
from rows import ROWS, net_for, opened  # noqa: E402

from thinwire import wire  # noqa: E402
from thinwire.core import Method  # noqa: E402
from thinwire.model.net import Net  # noqa: E402

TABLE = HERE / "frozen.json"
ROUNDS = 3


def processor() -> str:
    """What the rounding of products depends on, beside the versions of the libraries."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return " ".join(about.get(name, "?") for name in ("vendor_id", "cpu family", "model"))


def digest(frame: wire.Frame) -> str:
    """The first half of a frame's sha256."""
    return hashlib.sha256(bytes(frame)).hexdigest()[:32]


def digests(method: Method, net: Net, folder: Path) -> dict[str, list[str]]:
    """Of three rounds: of each frame, in the order in which they travel, and of the state after them."""
    frames: list[str] = []
    federation = Federation(method, net, folder, rounds=ROUNDS, watch=lambda frame: frames.append(digest(frame))).run()
    return {"frames": frames, "state": [digest(wire.encode(federation.state))]}


def test_frames_and_states_are_what_they_were(row: str, method: Method, net: Net, tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text())
    if processor() not in table:
        pytest.skip(f"no digests of this processor ({processor()}); there are those of {', '.join(table)}")
    if others := other_versions():
        pytest.skip(", ".join(others))
    assert digests(method, net, tmp_path) == table[processor()][row]


def test_every_row_is_frozen() -> None:
    assert all(set(rows) == set(ROWS) for rows in json.loads(TABLE.read_text()).values())


def main() -> None:
    """Write the table."""
    import tempfile

    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        made = opened(Path(folder) / "model")
        rows = {name: digests(ROWS[name].method, net_for(name, made), Path(folder) / name) for name in sorted(ROWS)}
    TABLE.write_text(json.dumps(table | {processor(): rows}, indent=0) + "\n")


if __name__ == "__main__":
    main()
