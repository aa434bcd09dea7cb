"""The parts of secure sums: agreement, sharing, seals, circles; and sums that no mask changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="comes with: pip install 'thinwire[secure]'")
pytest.importorskip("Crypto", reason="comes with: pip install 'thinwire[secure]'")

from thinwire.privacy.masks import (
    SEALED,
    Pair,
    check_public,
    derived,
    joined,
    least_of,
    neighbours,
    opened,
    pair_mask,
    sealed,
    self_mask,
    split,
    stream,
)
from thinwire.privacy.terms import Sums, Term, even

ONE, TWO, THREE = (Pair(bytes([n]) * 16) for n in (1, 2, 3))
PLACE = b"run 1, round 2"


def test_two_ends_agree_and_a_third_place_or_round_does_not() -> None:
    key = pair_mask(ONE, TWO.public, PLACE, 4, 7)
    assert key == pair_mask(TWO, ONE.public, PLACE, 7, 4)
    others = [pair_mask(THREE, TWO.public, PLACE, 4, 7), pair_mask(ONE, TWO.public, b"round 3", 4, 7)]
    others += [pair_mask(ONE, TWO.public, PLACE, 4, 8), ONE.agree(TWO.public, b"seal", PLACE), self_mask(key, PLACE, 4)]
    assert len({key, *others}) == 6


def test_a_mask_is_chacha20_of_rfc_8439() -> None:
    """Its appendix A.1, test vector 1: key, nonce and counter of zeros."""
    assert stream(bytes(32), 16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_derivation_cannot_be_shifted_from_one_part_to_the_next() -> None:
    assert derived(b"s", b"ab", b"c") != derived(b"s", b"a", b"bc")


@pytest.mark.parametrize("bad", [bytes(32), b"\x01" + bytes(31), b"short", ONE.public])
def test_public_keys_that_are_none_or_known_are_refused(bad: bytes) -> None:
    check_public(ONE.public, TWO.public)
    with pytest.raises(ValueError, match=r"key|bytes|secret"):
        check_public(ONE.public, TWO.public, bad)


def test_only_the_peer_opens_what_is_sealed_and_only_in_its_place() -> None:
    shares = bytes(range(32))
    data = sealed(ONE, TWO.public, PLACE, 1, 2, shares)
    assert len(data) == SEALED
    assert opened(TWO, ONE.public, PLACE, 1, 2, data) == shares
    assert opened(TWO, ONE.public, b"round 3", 1, 2, data) is None
    assert opened(TWO, ONE.public, PLACE, 2, 1, data) is None
    assert opened(THREE, ONE.public, PLACE, 1, 2, data) is None
    assert opened(TWO, ONE.public, PLACE, 1, 2, bytes([data[0] ^ 1]) + data[1:]) is None
    assert opened(TWO, ONE.public, PLACE, 1, 2, sealed(ONE, TWO.public, PLACE, 1, 2, b"x" * 31)) is None


def test_any_tolerated_set_of_shares_joins_and_fewer_do_not() -> None:
    secret, least = bytes(range(16)), 4
    shares = dict(enumerate(split(secret, 6, least)))
    assert len(set(shares.values())) == 6
    for count in range(1, 7):
        for chosen in itertools.combinations(shares, count):
            some = {place: shares[place] for place in chosen}
            if count < least:
                with pytest.raises(ValueError, match="4 are needed"):
                    joined(some, least)
            else:
                assert joined(some, least) == secret
    wrong = {**shares, 0: bytes(16)}
    assert joined({place: wrong[place] for place in range(4)}, least) != secret


def test_thresholds_are_more_than_half_whatever_is_asked() -> None:
    assert [least_of(n, 2 / 3) for n in (2, 3, 4, 5, 10, 50)] == [2, 2, 3, 4, 7, 34]
    assert [least_of(n, 0.1) for n in (2, 3, 4, 5)] == [2, 2, 3, 3]
    assert [least_of(n, 1.0) for n in (2, 3, 50)] == [2, 3, 50]


@given(st.integers(2, 40), st.integers(2, 12), st.randoms(use_true_random=False))
def test_a_circle_joins_both_ways_all_alike_and_everybody(clients: int, count: int, random: object) -> None:
    ids = [3 * n + 1 for n in range(clients)]
    graph = neighbours(ids, count, [random.getrandbits(64) for _ in ids])  # type: ignore[attr-defined]
    assert all(one in graph[other] for one in ids for other in graph[one])
    assert {len(near) for near in graph.values()} == {min(count + count % 2, clients - 1)}
    seen, left = {ids[0]}, [ids[0]]
    while left:
        new = {*graph[left.pop()]} - seen
        seen |= new
        left += new
    assert seen == {*ids}
    assert all(one not in near for one, near in graph.items())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(2, 33), st.integers(0, 40), st.integers(0, 2**32))
def test_sums_at_the_edges_of_their_range_never_wrap(clients: int, bits: int, room: int, seed: int) -> None:
    terms = {
        "a": even((3, 5), 1.5, bits),
        "b": Term((), 1.0, 0, 1),
        "c": Term((70_001 if seed % 9 == 0 else 9,), 1, 2, 5),
    }
    sums, generator = Sums(terms, clients, room), np.random.default_rng(seed)
    total, plain = sums.zeros(), {name: np.zeros(size, np.int64) for name, size in sums.sizes.items()}
    for client in range(clients):
        numbers = {
            n: generator.integers(t.low - room, t.high + room, sums.sizes[n], endpoint=True) for n, t in terms.items()
        }
        if client % 3:  # all at one edge
            numbers = {n: np.full(sums.sizes[n], t.high + room if seed % 2 else t.low - room) for n, t in terms.items()}
        words = sums.words(numbers)
        sums.mask(words, bytes([client]) * 32, 1)
        sent = sums.pack(words)
        assert len(sent) == sums.nbytes
        got = sums.unpack(sent)
        sums.mask(got, bytes([client]) * 32, -1)
        sums.add(total, got)
        plain = {name: plain[name] + numbers[name] for name in plain}
    found = sums.sums(total, clients)
    assert all((found[name] == plain[name]).all() for name in plain)


def test_a_sign_takes_the_bits_of_the_count_of_clients() -> None:
    for clients, bits in ((1, 1), (3, 2), (4, 3), (7, 3), (8, 4), (50, 6)):
        assert Sums({"sign": Term((80,), 1.0, 0, 1)}, clients).nbytes == 10 * bits


def test_a_mask_hides_every_bit_that_travels() -> None:
    """Of the same numbers under other keys each bit is as often 0 as 1, within five deviations."""
    sums = Sums({"a": even((64,), 1.0, 11)}, 3)
    words = sums.words({"a": np.zeros(64, np.int64)})
    sent = []
    for n in range(400):
        masked = {name: word.copy() for name, word in words.items()}
        sums.mask(masked, n.to_bytes(32, "big"), 1)
        sent.append(np.unpackbits(np.frombuffer(sums.pack(masked), np.uint8)))
    ones = np.array(sent).sum(axis=0, dtype=np.int64)
    assert (abs(ones - 200) < 5 * 10).all()


def test_numbers_are_rounded_and_those_beyond_the_bound_are_counted() -> None:
    term = even((4,), 2.0, 8)
    found, cut = term.whole(torch.tensor([2.0, -2.5, 1e-3, 1.0]))
    assert found.tolist() == [127, -127, 0, 64]
    assert cut == 1
    for bad, line in ((torch.zeros(3), "summed"), (torch.full((4,), torch.nan), "finite")):
        with pytest.raises(ValueError, match=line):
            term.whole(bad)


def test_sums_beyond_sixty_three_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bits, 63 at most"):
        Sums({"a": even((1,), 1.0, 62)}, 4)
