"""Canaries: rows that nobody has, each put among a client's rows by a fair coin; who sees the run guesses the coins.

A row's scores, higher for one that was learnt:

    final   its loss before the run less its loss after it
    moves   sum over rounds of -<d, gradient of its loss at the round's start>, d what the client's reply moves: the
            server's view; in a run private of clients d is what the round moves the model, which all see

The gradient is met along d alone, by a central difference of two passes forward. Members are guessed where a score is
among the highest, others where it is among the lowest; of those between nothing is guessed. How many are guessed is
fixed before anything is seen; two scores share the share of bounds that may be wrong, and the better one counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from thinwire.assemble import Start
from thinwire.assemble.privacy import budget_of
from thinwire.data.batch import Dataset, Example, collate
from thinwire.errors import ConfigError
from thinwire.keys import Key
from thinwire.leaks.bound import LEVEL, bound
from thinwire.leaks.reading import Change, Reading, length, put, weights_of
from thinwire.model.net import Net
from thinwire.privacy.secrets import Secrets
from thinwire.runtime.course import Course, Watch
from thinwire.runtime.job import Job
from thinwire.runtime.seats import Seats
from thinwire.train.objective import example_losses

Floats = NDArray[np.float64]
NEAR = 1e-2  # of the weights' length: how far along a round's move a derivative is taken
PIECE = 32  # canaries that pass together
LEAST = 8  # with fewer no bound is above 0


class Guessed(NamedTuple):
    """By one score: guesses right, of so many, and the epsilon that they rule out."""

    right: int
    guesses: int
    epsilon: float


class Leak(NamedTuple):
    """What canaries show. `epsilon`: the better score's bound; `most`: that of guesses all of which are right.

    `claimed`: what the run promises at `delta`, None for one that is not private; `members`: canaries that were in.
    """

    scores: dict[str, Guessed]
    epsilon: float
    most: float
    claimed: float | None
    delta: float
    canaries: int
    members: int
    rows: int  # of the client, without canaries

    @property
    def beyond(self) -> bool:
        """Whether the run leaks more than it promises."""
        return self.claimed is not None and self.epsilon > self.claimed


def leak(start: Start, count: int, guesses: int, secrets: Secrets, place: Path, delta: float) -> Leak:
    """A whole run with canaries, in an empty folder."""
    job = start.job(place, Watch())
    client = host(job)
    data, key = job.clients[client], job.key.fold("canaries")
    canaries = drawn(data, job.net, count, key)
    coins = np.zeros(count, np.bool_)
    coins[secrets.sampled(count, 0.5)] = True
    held = list(job.clients)
    members = tuple(canary for canary, coin in zip(canaries, coins, strict=True) if coin)
    held[client] = replace(data, examples=data.examples + members)
    budget = budget_of(start.run, {id: len(rows) for id, rows in enumerate(held)}, len(held))
    nothing: dict[str, Any] = {"evaluate": list, "actions": {}, "survey": None, "stop": None, "keep": "last"}
    job = replace(job, clients=held, budget=budget, caps={}, audit=False, replies=False, eval_every=0, **nothing)
    found, rounds = scored(job, client, replace(data, examples=tuple(canaries)))
    level = LEVEL / len(found)
    scores = {}
    for name, score in found.items():
        right = guessed_right(score, coins, guesses)
        scores[name] = Guessed(right, guesses, bound(right, guesses, count, delta, level))
    claimed = None if budget is None else budget.statement(rounds)["epsilon"]
    best, most = max(each.epsilon for each in scores.values()), bound(guesses, guesses, count, delta, level)
    return Leak(scores, best, most, claimed, delta, count, int(coins.sum()), len(data))


def host(job: Job) -> int:
    """The client that comes most often, the first of them: canaries go to it."""
    seats = Seats(job.key, job.rounds)
    cohorts = [seats.cohort(job.segments, len(job.names), round) for round in range(1, job.rounds + 1)]
    return max(range(len(job.names)), key=lambda who: (sum(who in cohort for cohort in cohorts), -who))


def guessed_right(scores: Floats, coins: NDArray[np.bool_], guesses: int) -> int:
    """Of guesses, half of them about the highest scores and half about the lowest, how many are right."""
    order = np.argsort(scores, kind="stable")
    lowest, highest = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int(coins[highest].sum() + (~coins[lowest]).sum())


def drawn(data: Dataset, net: Net, count: int, key: Key) -> list[Example]:
    """Rows as long as some of the data's, of random tokens and with a random answer; special tokens stay in place."""
    special = {*net.tokenizer.all_special_ids}
    tokens = [t for t in range(min(*net.rows, len(net.tokenizer))) if t not in special]
    known, found = {e.prompt for e in data.examples}, list[Example]()
    answers = {e.choice or 0: e.answer for e in data.examples}
    for i in range(count):
        for turn in range(100):
            here = key.fold(i, turn)
            like = data.examples[int(here.fold("like").integers(len(data), 1)[0])]
            words = here.fold("words").integers(len(tokens), len(like)).tolist()
            row = [t if t in special else tokens[w] for t, w in zip((*like.prompt, *like.answer), words, strict=True)]
            prompt, answer, choice = tuple(row[: len(like.prompt)]), tuple(row[len(like.prompt) :]), like.choice
            if data.candidates is not None:
                choice = sorted(answers)[int(here.fold("answer").integers(len(answers), 1)[0])]
                answer = answers[choice]
            if prompt not in known:
                break
        else:
            raise ConfigError("--canaries: this client has rows of all kinds that there are; ask for fewer")
        known.add(prompt)
        found.append(replace(like, prompt=prompt, answer=answer, choice=choice, place=f"canary {i}"))
    return found


def scored(job: Job, client: int, canaries: Dataset) -> tuple[dict[str, Floats], int]:
    """Run the job; each canary's scores, and the rounds that were run."""
    method, net, moves = job.method, job.net, np.zeros(len(canaries))
    private = job.budget is not None and job.budget.protection is not None
    course = Course(job)
    met = list[tuple[Change, Change]]()

    def seen(round: int, id: int, up: Any) -> None:
        if id != client or private:
            return
        cohort = course.seats.cohort(job.segments, len(job.names), round)
        reading = Reading(method, net, course.state, course.seats.server(round, cohort))
        met.append((reading.before(), reading.weights(reading.seen(id, up))))

    course.job.seen = seen
    course.begin()
    method.materialise(course.state, net)
    first = losses(net, canaries)
    while not course.ended:
        before = weights_of(method, course.state, net) if private else {}
        course.round()
        if private:
            after = weights_of(method, course.state, net)
            met.append((before, {name: after[name] - before[name] for name in after}))
        for start, move in met:
            moves -= slopes(net, canaries, start, move)
        met.clear()
    method.materialise(course.state, net)
    return {"final": first - losses(net, canaries), "moves": moves}, course.progress.round


def slopes(net: Net, canaries: Dataset, start: Change, move: Change) -> Floats:
    """Of each canary the derivative of its loss along a move of the weights."""
    far = length(move)
    if not far:
        return np.zeros(len(canaries))
    factor, found = min(1.0, NEAR * (length(start) or far) / far), []
    for sign in (1, -1):
        put(net, start, move, sign * factor)
        found.append(losses(net, canaries))
    return (found[0] - found[1]) / (2 * factor)


@torch.inference_mode()
def losses(net: Net, canaries: Dataset) -> Floats:
    """Each canary's loss under the weights in the net."""
    rows, parts = canaries.examples, range(0, len(canaries), PIECE)
    batches = [collate(rows[at : at + PIECE], canaries.pad, canaries.candidates) for at in parts]
    found = torch.cat([example_losses(net.model, batch)[0] for batch in batches])
    known: Floats = np.nan_to_num(found.double().cpu().numpy(), nan=1e9, posinf=1e9)
    return known
