"""What is rebuilt from one reply: the update, the tokens of the rows that made it, and which of some rows they were."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from thinwire.data.batch import Dataset, Example
from thinwire.keys import Key
from thinwire.leaks.reading import Change, cosine, error
from thinwire.leaks.visits import Visits
from thinwire.model.net import Net

APART = 3  # times the middle row's change: a row of the embedding that changes more belongs to a token that was read


class Update(NamedTuple):
    """How near a rebuilt update is to the true one: |found - true| / |true|, and the cosine."""

    error: float
    cosine: float


class Tokens(NamedTuple):
    """Of the tokens that were read off the embedding how many are in the rows, and of those how many were read."""

    precision: float
    recall: float


class Guess(NamedTuple):
    """How often the candidate whose own visit is most like the reply is a row of it, of `tries`; `chance`: by luck."""

    first: int
    tries: int
    chance: float


class Found(NamedTuple):
    """What one who looks rebuilds. `tokens`: None where the embedding is not trained; `guess`: without candidates."""

    update: Update
    tokens: Tokens | None
    guess: Guess | None


def reconstructed(
    visits: Visits, candidates: Sequence[Example], tries: int, rows: int, key: Key, outside: bool = False
) -> Found:
    """What the server rebuilds, or in a run private of clients everybody else does, who knows the others' replies.

    The update is that of a visit to the client's own rows. Tokens and guesses are of `tries` visits to `rows` of the
    candidates each, the first one for the tokens. Visits: 2, then `tries` and one for each candidate.
    """
    reading, data = visits.reading, replace(visits.data, pack=0, focus=None)
    up, truth = visits.visit(visits.data)

    def seen_of(some: Sequence[Example]) -> Change:
        seen = reading.seen(visits.id, visits.reply(replace(data, examples=tuple(some))))
        shown = reading.outside(seen) if outside else seen
        if not tokens:
            tokens.append(tokens_of(visits.net, reading.weights(shown), some, data))
        return shown.change

    seen = reading.seen(visits.id, up)
    update = reading.weights(reading.outside(seen) if outside else seen)
    near, tokens = Update(error(update, truth), cosine(update, truth)), list[Tokens | None]()
    del update, truth
    picked = [key.fold("rows", i).permutation(len(candidates))[:rows].tolist() for i in range(tries)]
    made = [seen_of([candidates[i] for i in places]) for places in picked] if candidates else []
    likest = [(-2.0, -1)] * len(made)
    for place, candidate in enumerate(candidates if made else ()):
        guess = visits.simulated(replace(data, examples=(candidate,)))
        alike = [cosine(reading.seen(visits.id, guess).change, change) for change in made]
        likest = [max(known, (new, place)) for known, new in zip(likest, alike, strict=True)]
    first = sum(place in places for (_, place), places in zip(likest, picked, strict=True)) if made else 0
    guess_of = Guess(first, len(made), min(1.0, rows / len(candidates))) if made else None
    return Found(near, tokens[0] if tokens else None, guess_of)


def tokens_of(net: Net, update: Change, rows: Sequence[Example], data: Dataset) -> Tokens | None:
    """The tokens whose rows of the embedding an update changes, against those of the rows; None: it is not trained.

    Those of a closed set of answers are no secret and count on neither side; nor does an open answer's last token,
    which nothing is predicted from. Where the head is tied to the embedding, or noise is on it, all rows change: those
    count that change by more than APART times the middle one.
    """
    embedding = net.model.get_input_embeddings().weight
    name = next((name for name, p in net.parameters() if p is embedding), None)
    if name is None:
        return None
    public = set(itertools.chain.from_iterable(data.candidates or ()))
    moved = update[name].flatten(1).norm(dim=1)
    read = {*(moved > APART * float(moved.median())).nonzero().flatten().tolist()} - public
    there = {token for e in rows for token in (*e.prompt, *(() if data.candidates else e.answer[:-1]))} - public
    right = len(read & there)
    return Tokens(right / len(read) if read else 0.0, right / len(there) if there else 0.0)
