"""The trials: what befalls a run or its folder, and what must come of it."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from preloaded import Ended, Fault, thinwire
from workshop import ROUNDS, STOPPED, Verdict, Workshop, left, records, result, tree


@dataclass(frozen=True)
class Trial:
    """`kind` is its row of the table; `name` distinguishes it from all others."""

    kind: str
    name: str
    run: Callable[[Workshop], Verdict]


def trials(shop: Workshop, methods: tuple[str, ...], every: int, few: bool) -> Iterator[Trial]:
    """All of them: at every `every`-th call of each method's run; with `few`, of the others a sample."""
    for name in methods:
        calls, opened = shop.calls(name), shop.calls(name, "opened")
        draw = random.Random(name)
        yield from _kills(name, calls, every, draw)
        yield from _errors(name, calls, opened, shop.calls(name, "reads"), 2 * every, draw)
        yield Trial("writes that take half of what they are given", f"short {name}", partial(short, name))
        damaged = list(_damages(shop, name))
        yield from damaged if not few else draw.sample(damaged, min(len(damaged), 12))
    for name in methods[:1] if few else methods[:2]:
        points = [number for number, *_ in shop.calls(name)]
        chosen = points[:8] + points[8 :: 4 * every] if not few else [1, 6, points[len(points) // 2]]
        for at in chosen:
            for second in ("again", "--resume", "other settings"):
                yield Trial(f"two at once: {second}", f"two {second} {name} {at}", partial(two, name, at, second))
        for what in ("rows", "model"):
            yield Trial(f"changed before a resume: {what}", f"changed {what} {name}", partial(changed, name, what))


# ---- processes


def _kills(name: str, calls: list[tuple[int, str, str]], every: int, draw: random.Random) -> Iterator[Trial]:
    for mode in ("before", "after", "half"):
        fit = [number for number, call, _ in calls if mode != "half" or call == "write"]
        for turn, at in enumerate(
            fit[draw.randrange(min(every, len(fit))) :: max(1, every // (2 if mode == "half" else 1))]
        ):
            again = turn % 3 == 2
            kind = {"half": "killed with half of a write done"}.get(mode, f"killed {mode} a call")
            yield Trial(
                kind, f"{mode} {name} {at}{' again' if again else ''}", partial(killed, name, Fault(mode, at), again)
            )


def killed(name: str, fault: Fault, again: bool, shop: Workshop) -> Verdict:
    """Killed, perhaps once more on the way on, and gone on with."""
    place = shop.place()
    ended = shop.go(name, place, fault=fault)
    if ended.status != -9:
        return Verdict.bad("was not killed", ended)
    if again:
        ended = shop.go_on(name, place, Fault("before", 3 + fault.at // 2))
        if ended.status not in (-9, 0):
            return unexpected(ended)
    return same(shop, name, place)


def _errors(
    name: str,
    calls: list[tuple[int, str, str]],
    opened: list[tuple[int, str, str]],
    reads: list[tuple[int, str, str]],
    every: int,
    draw: random.Random,
) -> Iterator[Trial]:
    changing = [number for number, *_ in calls]
    for error in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE):
        code, openings = errno.errorcode[error], error == errno.EMFILE
        points = [number for number, *_ in opened] if openings else changing
        for mode, word in (("fail_from", "from a call on"), ("fail_once", "once")):
            for at in points[draw.randrange(min(every, len(points))) :: every]:
                fault = Fault(mode, at, error, openings)
                yield Trial(f"{code} {word}", f"{mode} {code} {name} {at}", partial(failed, name, fault))
    for error in (errno.EIO, errno.EMFILE):
        code = errno.errorcode[error]
        for at in [number for number, *_ in reads][draw.randrange(min(every // 2, len(reads))) :: max(1, every // 2)]:
            fault = Fault("fail_once", at, error, True)
            yield Trial(
                f"{code} once where a resume opens a file", f"resume {code} {name} {at}", partial(unread, name, fault)
            )


def failed(name: str, fault: Fault, shop: Workshop) -> Verdict:
    """A call fails: one line, and it goes on once there is room again; an error that does no harm may pass."""
    place = shop.place()
    ended = shop.go(name, place, fault=fault)
    if ended.status != 0 and ended.line is None:
        return unexpected(ended)
    if ended.status == 0 and (place / "run" / "summary.json").exists():
        return same(shop, name, place, ended)
    return same(shop, name, place)


def unread(name: str, fault: Fault, shop: Workshop) -> Verdict:
    """A resume cannot open one file, for once: nothing may be lost by that."""
    place = shop.copy(name)
    ended = shop.go(name, place, "--resume", fault=fault)
    if ended.status != 0 and ended.line is None:
        return unexpected(ended)
    began = next((n for n in range(1, ROUNDS + 1) if f"round {n}/{ROUNDS}:" in ended.out), ROUNDS)
    if began == 1 or (began <= STOPPED and not shop.reported(name, ended, place)):
        return Verdict.bad(f"begins again at round {'1' if began == 1 else 'before'} in silence", ended.out)
    return same(shop, name, place, ended if ended.status == 0 else None)


def short(name: str, shop: Workshop) -> Verdict:
    """Each write takes half of what it is given, as the system may at any time."""
    place = shop.place()
    return same(shop, name, place, shop.go(name, place, fault=Fault("short")))


def same(shop: Workshop, name: str, place: Path, ended: Ended | None = None, **options: bool) -> Verdict:
    """Whether the run, gone on with if it has not `ended`, ends as the undisturbed one, and leaves nothing behind."""
    ended = ended or shop.go_on(name, place)
    if ended.status != 0:
        return Verdict.bad("does not go on", ended.line) if ended.line else unexpected(ended)
    try:
        difference = result(place / "run").difference(shop.undisturbed(name), **options)
    except (OSError, ValueError) as error:
        return Verdict.bad("exit 0 without a whole result", error)
    if difference is not None:
        return Verdict.bad(difference, ended.out)
    if files := left(place / "run"):
        return Verdict.bad("same, with temporary files left behind", files)
    shutil.rmtree(place)
    return Verdict("same", True)


def unexpected(ended: Ended) -> Verdict:
    """An end that no user should see."""
    if ended.status is None:
        return Verdict.bad("hangs", ended.out)
    if "Traceback" in ended.err:
        return Verdict.bad("traceback", ended.err)
    return Verdict.bad(f"ends with {ended.status} and {len(ended.err.splitlines())} lines", ended.err)


# ---- files of a folder that was stopped, or has ended


def _damages(shop: Workshop, name: str) -> Iterator[Trial]:
    folder = shop.stopped(name) / "run"
    newest, before = (f"state/round-{round:06d}" for round in (STOPPED, STOPPED - 1))
    sets: list[tuple[str, str, tuple[str, ...]]] = []
    for file in ("state.frame", "progress.json"):
        sets.append((f"{file}, the newest", "on", (f"{newest}/{file}",)))
        sets.append((f"{file}, both", "line", (f"{newest}/{file}", f"{before}/{file}")))
    versions = sorted(folder.glob("state/versions/*.safetensors"))
    sets += [("a version of the weights", "bytes", (str(path.relative_to(folder)),)) for path in versions]
    memories = sorted(folder.glob("state/clients/*/*.safetensors"))
    sets += [("a client's memory", "on or line", (str(path.relative_to(folder)),)) for path in memories]
    sets += [(f"{file}.jsonl", "records", (f"{file}.jsonl",)) for file in ("rounds", "evals")]
    sets.append(("run.toml", "on or line", ("run.toml",)))
    for what, right, files in sets:
        for how in ("flip", "cut", "empty", "gone"):
            label = f"{how} {name} {' '.join(files)}"
            yield Trial(f"{what}: {how}", label, partial(damaged, name, "stopped", how, files, right))
    for file in ("summary.json", "rounds.jsonl", "evals.jsonl"):
        for how in ("cut", "empty", "gone"):
            right = "on or line" if file == "summary.json" else "ended"
            label = f"ended {how} {name} {file}"
            yield Trial(
                f"{file} of a run that has ended: {how}", label, partial(damaged, name, "ended", how, (file,), right)
            )


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Flip a bit, cut, empty or remove a file."""
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flip" and data:
        at = draw.randrange(len(data))
        # a digit of a text that becomes another one is what nobody can see: the top bit shows in a text
        data[at] ^= 0x80 if path.suffix in (".jsonl", ".toml", ".json") else 1 << draw.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) * 2 // 3] if how == "cut" else b"")


def damaged(name: str, kind: str, how: str, files: tuple[str, ...], right: str, shop: Workshop) -> Verdict:
    """Damage, then `--resume`. Right is: it goes `on` to the same end and reports it, refuses in a `line` with nothing
    lost, goes on with more `bytes`, keeps all `records` that are whole and names those that are not, or has `ended`."""
    place = shop.copy(name, kind)
    folder = place / "run"
    whole, draw = tree(folder), random.Random(f"{name} {how} {files}")
    kept = {file: (folder / file).read_bytes() for file in files}
    for file in files:
        damage(folder / file, how, draw)
    intact = lines_left(kept, folder) if right == "records" else []
    hurt = tree(folder)
    ended = shop.go(name, place, "--resume")
    if ended.status != 0:
        return refused(shop, name, place, ended, right, whole, hurt, kept)
    reported = shop.reported(name, ended, place)
    if right == "ended":
        return (
            Verdict("the run has ended, nothing is touched", True)
            if tree(folder) == hurt
            else Verdict.bad("files changed")
        )
    if right == "line":
        return Verdict.bad("goes on without a checkpoint that it could read", ended.out)
    if right == "records":
        return recorded(shop, name, folder, intact, reported)
    verdict = same(shop, name, place, ended, bytes_differ=right == "bytes")
    checkpoint = any("round-" in file for file in files)
    if verdict.good and checkpoint and not reported:
        return Verdict.bad("same, but nothing is reported of the damage", ended.out)
    return Verdict("same, and the damage is reported", True) if verdict.good and reported else verdict


def refused(
    shop: Workshop,
    name: str,
    place: Path,
    ended: Ended,
    right: str,
    whole: dict[str, str],
    hurt: dict[str, str],
    kept: dict[str, bytes],
) -> Verdict:
    """A refusal must be one line, touch nothing, and the run go on once the files are back."""
    if ended.line is None:
        return unexpected(ended)
    if right in ("on", "bytes"):
        return Verdict.bad("refused, though what is left would do", ended.line)
    if right != "ended" and (
        changed := [path for path, had in tree(place / "run").items() if hurt.get(path, had) != had]
    ):
        return Verdict.bad("refused, with files changed", (changed, ended.line))
    if missing := [path for path in hurt if not (place / "run" / path).exists()]:
        return Verdict.bad("refused, with files gone", (missing, ended.line))
    for file, data in kept.items():
        (place / "run" / file).write_bytes(data)
    assert set(whole) <= set(tree(place / "run"))
    verdict = same(shop, name, place)
    return Verdict("refused in a line, nothing lost", True) if verdict.good else verdict


def lines_left(kept: dict[str, bytes], folder: Path) -> list[object]:
    """The records that the damage has left as they were."""
    (file, before), *_ = kept.items()
    now = (folder / file).read_bytes().splitlines() if (folder / file).exists() else []
    return [json.loads(line) for line in now if line in before.splitlines()]


def recorded(shop: Workshop, name: str, folder: Path, intact: list[object], reported: list[str]) -> Verdict:
    """Of a run whose records were damaged: its model, the records that were whole, and that it reports the damage."""
    try:
        got, want = result(folder), shop.undisturbed(name)
        held = [*records(folder / "rounds.jsonl"), *records(folder / "evals.jsonl")]
    except (OSError, ValueError) as error:
        return Verdict.bad("exit 0 without whole records", error)
    if (got.sha256, got.weights) != (want.sha256, want.weights):
        return Verdict.bad("another model")
    if any(record not in held for record in intact):
        return Verdict.bad("records lost that were whole", f"{len(intact)} were, {len(held)} are there")
    if got.difference(want) is None:
        return Verdict("same", True)
    if not reported:
        return Verdict.bad("records lost in silence")
    return Verdict("same model, lost records are reported", True)


# ---- two processes, other inputs


def two(name: str, at: int, second: str, shop: Workshop) -> Verdict:
    """One process stands still before a call, a second begins: one of them ends as if alone, the other is refused."""
    place = shop.place()
    first = shop.start(name, place, fault=Fault("stop", at))
    if not first.stopped():
        return unexpected(first.end())
    more = {"again": [], "--resume": ["--resume"], "other settings": ["method.lr=3e-2"]}[second]
    other = shop.go(name, place, *more)
    first.go_on()
    ends = (first.end(), other)
    winners = [end for end in ends if end.status == 0]
    losers = [end for end in ends if end.status != 0]
    if len(winners) != 1 or losers[0].line is None:
        return Verdict.bad(
            "both go on" if len(winners) > 1 else "not one line", [(end.status, end.err) for end in ends]
        )
    if winners[0] is other and second == "other settings":
        return Verdict("one runs, one is refused", (place / "run" / "summary.json").exists())
    verdict = same(shop, name, place, winners[0])
    return Verdict("one runs, one is refused", True) if verdict.good else verdict


def changed(name: str, what: str, shop: Workshop) -> Verdict:
    """A row or the start model changes between a kill and a resume: refused, or reported."""
    from tiny import tiny_folder, tiny_rows, write_jsonl

    place = shop.place()
    tiny_folder(place / "model")
    write_jsonl(place / "rows.jsonl", tiny_rows(40, closed=True))
    file = place / "run.toml"
    file.write_text(shop.run_file(name, place))
    ended = thinwire("run", file, "--out", place / "run", folder=place, fault=Fault("before", shop.half_way(name)))
    if ended.status != -9:
        return Verdict.bad("was not killed", ended)
    if what == "rows":
        write_jsonl(place / "rows.jsonl", tiny_rows(40, 1, closed=True))
    else:
        shutil.rmtree(place / "model")
        tiny_folder(place / "model", seed=1)
    ended = thinwire("run", file, "--out", place / "run", "--resume", folder=place)
    if ended.status == 0:
        reported = shop.reported(name, ended, place)
        return (
            Verdict("goes on, and the change is reported", True)
            if reported
            else Verdict.bad("goes on in silence", ended.out)
        )
    return Verdict("refused in a line", True) if ended.line else unexpected(ended)
