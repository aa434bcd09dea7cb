import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.perturb.normal_table import quantiles
from thinwire.perturb.philox import accumulate, gaussian, parameter_id, philox4x32

# Random123, tests/kat_vectors, philox4x32 10
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_random123(counter, key, expected):
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_counters_and_keys_broadcast():
    counters = np.stack([words(counter) for counter, _, _ in KNOWN])
    keys = np.stack([words(key) for _, key, _ in KNOWN])
    np.testing.assert_array_equal(philox4x32(counters, keys), np.stack([words(answer) for *_, answer in KNOWN]))
    assert philox4x32(counters[:, None], keys[None]).shape == (3, 3, 4)


def test_addressing_is_the_documented_one():
    run_key, seed, pid, block = 0x0123456789ABCDEF, 0xFEDCBA98, 0xCAFEBABE, (5 << 32) + 7
    drawn = philox4x32(words(f"7 5 {pid:x} {seed:x}"), words("89abcdef 01234567")).tolist()
    numbers = [half for word in drawn for half in (word & 0xFFFF, word >> 16)]
    np.testing.assert_array_equal(gaussian(run_key, seed, pid, 8 * block, 8), quantiles()[numbers])


def test_golden_draws_never_change():
    """A change of any of these orphans every recorded run."""
    assert parameter_id("model.layers.0.mlp.up_proj.weight") == 0x5BF16F49
    z = gaussian(0x0123456789ABCDEF, 42, parameter_id("model.layers.0.mlp.up_proj.weight"), 3, 100_000)
    assert z[:4].tolist() == [2.3285634517669678, 0.8434048295021057, -1.074751615524292, -1.5729175806045532]
    assert (
        hashlib.sha256(z.astype("<f4").tobytes()).hexdigest()
        == "c0ad920cc7b2832de42be475d2fdf9d4eb2689dc698cf0fea75c0bbc1bac7db1"
    )
    far = gaussian(2**64 - 1, 2**32 - 1, 2**32 - 1, 2**35 - 5, 1000)
    assert (
        hashlib.sha256(far.astype("<f4").tobytes()).hexdigest()
        == "200cfc7c5d5f8df7b22642df6d959611d80160494958a57009a6034f449e0750"
    )


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 300))
def test_a_slice_is_the_slice_of_the_whole(start, skip, count):
    whole = gaussian(11, 5, 3, start, skip + count)
    assert whole.shape == (skip + count,)
    np.testing.assert_array_equal(gaussian(11, 5, 3, start + skip, count), whole[skip:])


def test_moments():
    """Five standard errors of each estimate over 2^21 numbers."""
    n = 1 << 21
    z = gaussian(1, 2, 3, 0, n).astype(np.float64)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5 + 1e-4
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() / z.var() ** 2 - 3) < 5 * (24 / n) ** 0.5 + 2e-3


def test_neighbours_seeds_parameters_and_runs_are_uncorrelated():
    """Correlations over 2^18 numbers stay below five standard errors; so do those of the squares."""
    n = 1 << 18
    z = gaussian(1, 2, 3, 0, n + 64)
    others = {f"lag {lag}": z[lag : n + lag] for lag in (1, 2, 4, 7, 8, 16, 64)}
    others |= {f"seed {seed}": gaussian(1, seed, 3, 0, n) for seed in (0, 3, 2 + 2**16, 2**32 - 1)}
    others |= {f"parameter {pid}": gaussian(1, 2, pid, 0, n) for pid in (2, 4, 2**31)}
    others |= {f"run {key}": gaussian(key, 2, 3, 0, n) for key in (0, 2, 1 + 2**32)}
    others["seed and parameter swapped"] = gaussian(1, 3, 2, 0, n)
    for what, other in others.items():
        assert abs(np.corrcoef(z[:n], other)[0, 1]) < 5 / n**0.5, what
        assert abs(np.corrcoef(z[:n] ** 2, other**2)[0, 1]) < 5 / n**0.5, what


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((2**64, 0, 0, 0, 1), "run key"),
        ((-1, 0, 0, 0, 1), "run key"),
        ((0, 2**32, 0, 0, 1), "seed"),
        ((0, -1, 0, 0, 1), "seed"),
        ((0, 0, 2**32, 0, 1), "parameter id"),
        ((0, 0, 0, -8, 1), "start"),
    ],
)
def test_addresses_out_of_range_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        gaussian(*arguments)


def test_replay_is_rounded_after_every_product_and_sum():
    weight = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    z1, z2 = (gaussian(9, seed, 4, 17, 100) for seed in (6, 1))
    a, b, half = np.float32(0.1), np.float32(-3e-4), np.float32(0.5)
    expected = half * weight + ((a * z1) + b * z2)
    np.testing.assert_array_equal(accumulate(weight, 9, 4, [6, 1], [0.1, -3e-4], 0.5, 17), expected)


def test_an_empty_replay_leaves_the_bits():
    weight = np.array([-0.0, 0.0, 1e-45, -np.inf], dtype=np.float32)
    assert accumulate(weight, 1, 1, [], []).tobytes() == weight.tobytes()
