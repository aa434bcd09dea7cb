"""Sites that join a run as it goes on, and leave it: the same states as with all of them from the start."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, in_process, state_of, visits
from test_cli import refused, thinwire

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from grid import entries, federate

from thinwire import assemble
from thinwire.config import ConfigError
from thinwire.errors import Paused
from thinwire.federation import keys
from thinwire.federation.members import Member, Members, members_file
from thinwire.federation.site_run import run_settings
from thinwire.runtime import audit, course
from thinwire.runtime.job import Job, Watch

THIN: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
COUNTS: dict[str, Any] = {"name": "scaffold", "lr": 1e-3, "steps": 1, "batch_size": 4}
ROUNDS = 4
# round -> who belongs to the run from then on; west was not in the run file, and is the third
TURNS = {1: ("north", "south"), 2: ("north", "south", "west"), 3: ("north", "west"), 4: ("north", "south", "west")}
COHORTS = [
    {"kind": "only", "clients": [0, 1], "rounds": 1},
    {"kind": "all", "rounds": 1},
    {"kind": "only", "clients": [0, 2], "rounds": 1},
    {"kind": "all"},
]


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The hub's keys, north and south registered."""
    for name in ("north", "south"):
        keys.register(name, keys.make_site(name, tmp_path / "at"), tmp_path / "keys")
    return tmp_path / "keys"


def turn(home: Path, round: int) -> None:
    """Register and remove, so that those belong to the run who do from that round on."""
    for name in ("north", "south", "west"):
        if name not in TURNS[round] and keys.registered(name, home):
            keys.remove(name, home)
        elif name in TURNS[round] and not keys.registered(name, home):
            public = home.parent / "at" / f"{name}.pub"
            keys.register(name, public if public.exists() else keys.make_site(name, home.parent / "at"), home, 50)


def joined(silos: Silos, folder: Path, home: Path) -> tuple[Job, Any]:
    """The run on the sites' workers, of which the run file names two; and the grid between them."""
    job, grid, transport = federate(silos, silos.run(THIN, ROUNDS), folder)
    (folder / "federation").mkdir()
    grid.settings = run_settings(silos.run(THIN, ROUNDS), ("north", "south"), "0123456789abcdef")
    members = Members(folder, ("north", "south"), home, join=True)

    def belonging(round: int) -> Sequence[int]:
        turn(home, round)
        return members.now(round)

    transport.names = job.names = members.names
    job.caps, job.members = members.caps, belonging
    return job, grid


def test_states_are_those_of_a_run_with_the_same_cohorts(
    silos: Silos, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = joined(silos, tmp_path / "run", home)
    job.audit = True
    course.train(job)
    in_process(silos, silos.run(THIN, ROUNDS, cohort=COHORTS), tmp_path / "alone", monkeypatch)
    assert state_of(tmp_path / "run") == state_of(tmp_path / "alone")
    assert visits(tmp_path / "run") == visits(tmp_path / "alone")
    assert [[id for id, *_ in round] for round in visits(tmp_path / "run")] == [[0, 1], [0, 1, 2], [0, 2], [0, 1, 2]]
    assert {entry["client"] for entry in entries(tmp_path / "run", "west")} == {2}
    assert job.caps == {2: 50, 1: 50}  # south came back with a number
    log = audit.audit(tmp_path / "run")
    assert (log.problems, log.ended) == ([], True)
    told = [line for line in audit.read(tmp_path / "run" / audit.FILE)[0] if line["event"] == "members"]
    assert [(line["round"], *([one["name"] for one in line[k]] for k in ("joined", "left"))) for line in told] == [
        (1, ["west"], []),
        (2, [], ["south"]),
        (3, ["south"], []),
    ]


@pytest.mark.parametrize("method", [THIN, COUNTS], ids=["fedkseed", "scaffold"])
def test_a_run_that_is_cut_off_goes_on_with_the_same_numbers(
    method: dict[str, Any], silos: Silos, tmp_path: Path
) -> None:
    """In one process, where clients join and leave by the same hook."""
    ends = []
    for name, fails in (("whole", ()), ("cut", (2, 3, 4))):
        folder = tmp_path / name
        run = silos.run(method, ROUNDS)
        silos.begin(run, folder)
        (folder / "federation").mkdir()
        home = tmp_path / f"{name}-at" / "keys"
        for fail in (*fails, 0):
            turn(home, 1)
            assemble.use_threads(run)
            job = assemble.job(run, silos.rows(run), assemble.net_of(run, remember=True), folder, 0, Watch())
            members = Members(folder, ("north", "south"), home, join=True)

            def belonging(round: int, members: Members = members, fail: int = fail, home: Path = home) -> Any:
                if round == fail:
                    raise RuntimeError("as a process that is killed")
                turn(home, round)
                return members.now(round)

            job.names, job.members = members.names, belonging
            if fail:
                with pytest.raises(RuntimeError, match="as a process that is killed"):
                    course.train(job)
            else:
                course.train(job)
        assert [member.name for member in members.known] == ["north", "south", "west"]
        ends.append((state_of(folder), visits(folder)))
    assert ends[0] == ends[1]


def test_a_number_is_never_another_site_s(home: Path, tmp_path: Path) -> None:
    (tmp_path / "federation").mkdir()
    lines: list[str] = []

    def members() -> Members:
        return Members(tmp_path, ("north", "south"), home, join=True, most=9, report=lines.append)

    def register(name: str, **about: Any) -> None:
        keys.register(name, keys.make_site(name, tmp_path / f"at-{len(lines)}"), home, **about)

    assert members().now(1) == (0, 1)
    keys.remove("south", home)
    assert members().now(2) == (0,)
    register("west", rows=12)
    os.utime(home / "sites" / "west.pub", ns=(0, 10**18 * 3))
    register("east")
    os.utime(home / "sites" / "east.pub", ns=(0, 10**18 * 2))
    one = members()
    assert one.now(3) == (0, 2, 3)
    assert one.names == ["north", "south", "east", "west"]  # by when they were registered
    assert one.caps == {0: 9, 1: 9, 2: 9, 3: 12}
    register("south")  # with another key: the name is the site
    assert members().now(4) == (0, 1, 2, 3)
    found = [Member(**each) for each in json.loads(members_file(tmp_path).read_text())]
    assert found == [Member("north"), Member("south"), Member("east", 3), Member("west", 3)]
    assert lines == [
        "south takes no part any more from round 2 on",
        "east takes part from round 3 on",
        "west takes part from round 3 on",
        "south takes part from round 4 on",
    ]
    (home / "sites" / "broken.pub").write_text("no key")
    assert members().now(5) == (0, 1, 2, 3)
    assert "broken.pub: not a public key; broken does not take part" in lines[-1]
    for name in ("north", "south", "east", "west"):
        keys.remove(name, home)
    with pytest.raises(Paused, match="no site of the run is registered"):
        members().now(6)


def test_without_join_who_is_registered_stays_outside(home: Path, tmp_path: Path) -> None:
    (tmp_path / "federation").mkdir()
    keys.register("west", keys.make_site("west", tmp_path / "at"), home)
    assert Members(tmp_path, ("north", "south"), home).now(1) == (0, 1)


def test_the_commands_that_register_and_remove(tmp_path: Path) -> None:
    public, home = keys.make_site("north", tmp_path), tmp_path / "keys"
    assert thinwire("keys", "register", "north", public, "--out", home).code == 0
    result = thinwire("keys", "register", "north", public, "--out", home)
    assert (result.code, result.out) == (0, "north is registered already, with this key\n")
    other = keys.make_site("north", tmp_path / "other")
    line = refused("keys", "register", "north", other, "--out", home)
    assert line.endswith("north has another key already; to replace it: thinwire keys remove north")
    assert thinwire("keys", "remove", "north", "--out", home).code == 0
    assert "there is no site north to remove" in refused("keys", "remove", "north", "--out", home)
    assert "is not a site's name" in refused("keys", "remove", "../x", "--out", home)
    assert keys.public_keys(home) == {}
    assert thinwire("keys", "register", "north", other, "--out", home).code == 0
    assert [path.name for path in (home / "sites").iterdir()] == ["north.pub"]


def test_a_site_that_has_joined_answers_under_its_own_number_alone(silos: Silos, home: Path, tmp_path: Path) -> None:
    from thinwire.federation.asked import Refused

    _, grid = joined(silos, tmp_path / "run", home)
    settings = grid.settings
    west = grid.workers[2]
    visit = west._asked(settings)
    for name, client, why in (("east", 2, "is not west"), ("west", 1, "is not west"), ("west", 0, "is not west")):
        with pytest.raises(Refused, match=why):
            visit.seat(name, client)
    visit.seat(None, 2)  # as an older hub asks
    with pytest.raises(Refused, match="west is not one of the run's sites"):
        _ = visit.id
    visit.seat("west", 2)
    visit.seat("west", 3)
    assert visit.id == 2
    north = grid.workers[0]._asked(settings)
    north.seat("north", 5)
    assert north.id == 0


def test_shares_by_a_table_and_joining_do_not_go_together(silos: Silos) -> None:
    table = {"by": "table", "table": {"north": 0.5, "south": 0.3, "west": 0.2}}
    run = silos.run({"name": "fedavg"}, federation={"join": True, "weights": table})
    with pytest.raises(ConfigError, match=r"federation\.join: shares by a table"):
        assemble.prepared(run)


def test_a_budget_of_privacy_and_joining_do_not_go_together(silos: Silos) -> None:
    privacy = {"level": "client", "epsilon": 8.0, "delta": 0.01, "clip": 1.0, "minimum": 1}
    run = silos.run({"name": "fedavg"}, federation={"join": True}, privacy=privacy)
    with pytest.raises(ConfigError, match=r"federation\.join: a private run's budget"):
        assemble.prepared(run)
