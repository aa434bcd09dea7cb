import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.perturb.philox import parameter_id, philox4x32
from thinwire.perturb.sign_cpu import MATRIX_BLOCKS, accumulate, matrix, reference, signs
from thinwire.threads import CHUNK, TILE


def bits(array):
    return array.view(np.uint32)


def weights(n, seed=0):
    """Weights over the whole range of float32: ordinary, denormal, huge and negative zero."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal(n) * 10.0 ** rng.choice([0, -2, -40, 30], n)).astype(np.float32)
    weight[::17] = -0.0
    return weight


def slow_replay(weight, run_key, pid, seeds, coefs, scale, start):
    """The definition of replay, one number at a time."""
    one = np.float32
    groups = {}
    for seed, coef in zip(seeds, coefs, strict=True):
        by_bit = groups.setdefault(seed // 32, [one(0)] * 32)
        by_bit[seed % 32] = by_bit[seed % 32] + one(coef)
    out = []
    for e, w in enumerate(weight, start):
        total = one(0)
        for group in sorted(groups):
            c = groups[group]
            z = [signs(run_key, 32 * group + i, pid, e, 1)[0] for i in range(32)]
            for first in (0, 8, 16, 24):
                byte = z[first] * c[first]
                for i in range(first + 1, first + 8):
                    byte = byte + z[i] * c[i]
                total = total + byte
        out.append(one(scale) * w + total)
    return np.array(out, np.float32)


def test_addressing_is_the_documented_one():
    run_key, pid, block = 0x0123456789ABCDEF, 0xCAFEBABE, (5 << 32) + 7
    for seed in (0, 1, 31, 32, 4095, 0xFEDCBA98, 2**32 - 1):
        words = philox4x32([7, 5, pid, seed // 32], [0x89ABCDEF, 0x01234567]).tolist()
        expected = [1 if word >> seed % 32 & 1 else -1 for word in words]
        assert signs(run_key, seed, pid, 4 * block, 4).tolist() == expected


def test_golden_draws_never_change():
    """A change of any of these orphans every recorded run."""
    pid = parameter_id("model.layers.0.mlp.up_proj.weight")
    z = signs(0x0123456789ABCDEF, 42, pid, 3, 100_000)
    assert z.dtype == np.float32
    assert "".join("+" if sign > 0 else "-" for sign in z[:32]) == "+++-+---++-++--+---++-++-+++--++"
    assert (
        hashlib.sha256(z.astype("<f4").tobytes()).hexdigest()
        == "925d4833378619a0a9b86adf3c4ef7bb870cab86213f6c5e4b4eebebccf3a6ea"
    )
    far = signs(2**64 - 1, 2**32 - 1, 2**32 - 1, 2**34 - 5, 1000)
    assert (
        hashlib.sha256(far.astype("<f4").tobytes()).hexdigest()
        == "724725595db4d655517d75384c1ddf3dce6073ecf9da515ba2844a93c77b99f8"
    )


def test_a_golden_replay_never_changes():
    weight = (np.arange(1000, dtype=np.float32) - 500) / 7
    coefs = 1 / (np.arange(200) + 1)
    moved = reference(weight, 7, 9, np.arange(200) * 5 % 331, coefs, 0.9, 3)
    assert (
        hashlib.sha256(moved.astype("<f4").tobytes()).hexdigest()
        == "faef40544c3c1a21007b047821133fbfda470505fede070117c8e4245cbd62a8"
    )


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 300), st.integers(0, 100))
def test_a_slice_is_the_slice_of_the_whole(start, skip, count, seed):
    whole = signs(11, seed, 3, start, skip + count)
    assert whole.shape == (skip + count,)
    np.testing.assert_array_equal(signs(11, seed, 3, start + skip, count), whole[skip:])


@pytest.mark.parametrize("seed", [0, 2, 31, 32, 4095, 2**32 - 1])
def test_every_element_is_one_or_minus_one_and_the_mean_is_zero(seed):
    n = 1 << 20
    z = signs(1, seed, 3, 0, n)
    assert np.array_equal(np.abs(z), np.ones(n))
    assert abs(z.mean(dtype=np.float64)) < 4 / n**0.5


def test_neighbours_seeds_parameters_and_runs_are_uncorrelated():
    """Correlations over 2^18 signs stay below four standard errors."""
    n = 1 << 18
    z = signs(1, 40, 3, 0, n + 64)
    others = {f"lag {lag}": z[lag : n + lag] for lag in (1, 2, 3, 4, 5, 8, 16, 64)}
    others |= {f"seed {seed}": signs(1, seed, 3, 0, n) for seed in (8, 39, 41, 72, 40 + 2**16, 2**32 - 1)}
    others |= {f"parameter {pid}": signs(1, 40, pid, 0, n) for pid in (1, 2, 4, 2**31)}
    others |= {f"run {key}": signs(key, 40, 3, 0, n) for key in (0, 2, 1 + 2**32)}
    # seed 40 is of group 1: its counter with the group and the parameter swapped
    others["group and parameter swapped"] = signs(1, 3 * 32 + 8, 1, 0, n)
    for what, other in others.items():
        assert abs(np.mean(z[:n] * other, dtype=np.float64)) < 4 / n**0.5, what


def test_no_two_of_three_groups_of_seeds_are_correlated():
    n = 1 << 16
    z = matrix(5, 6, np.arange(96), 0, n)
    correlation = z.T @ z / n - np.eye(96)
    assert np.abs(correlation).max() < 5 / n**0.5
    # half of the 4,560 pairs lie within 0.6745 standard errors; the share has a standard error of 0.0074
    share = np.mean(np.abs(correlation[np.triu_indices(96, 1)]) < 0.6745 / n**0.5)
    assert abs(share - 0.5) < 4 * 0.0074


@pytest.mark.parametrize("seeds", [[3], [3, 3], [31, 64], [40, 5, 31, 40, 0, 900, 33], list(range(30, 70))])
def test_replay_is_summed_in_the_documented_order(seeds):
    weight = weights(40)
    coefs = np.random.default_rng(1).uniform(-1, 1, len(seeds)).astype(np.float32)
    expected = slow_replay(weight, 9, 4, seeds, coefs, 0.5, 17)
    np.testing.assert_array_equal(bits(reference(weight, 9, 4, seeds, coefs, 0.5, 17)), bits(expected))


def test_replay_is_the_sum_of_the_directions():
    """Whole coefficients, so that no sum is rounded."""
    rng = np.random.default_rng(2)
    seeds, coefs = rng.integers(0, 500, 300), rng.integers(-99, 99, 300)
    weight = rng.integers(-99, 99, 1000).astype(np.float32)
    expected = weight + sum(coef * signs(9, seed, 4, 5, 1000) for seed, coef in zip(seeds, coefs, strict=True))
    np.testing.assert_array_equal(reference(weight, 9, 4, seeds, coefs, 1.0, 5), expected)


def test_an_empty_replay_leaves_the_bits():
    weight = np.array([-0.0, 0.0, 1e-45, -np.inf], dtype=np.float32)
    assert reference(weight, 1, 1, [], []).tobytes() == weight.tobytes()
    out = np.empty_like(weight)
    accumulate(weight, out, 1, 1, [], [])
    assert out.tobytes() == weight.tobytes()


COEFS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-1, 1, width=32) | st.just(-0.0)
SIZES = (
    st.integers(0, 40) | st.sampled_from([TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 9]) | st.integers(0, 3 * TILE)
)
STARTS = st.integers(0, 3 * TILE) | st.integers(2**34 - 2 * TILE, 2**34 + 20) | st.integers(0, 2**62 - 1)
SEEDS = st.integers(0, 70) | st.integers(0, 4095) | st.integers(0, 2**32 - 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(deadline=None, max_examples=200)
@given(
    n=SIZES,
    start=STARTS,
    pairs=st.lists(st.tuples(SEEDS, COEFS), max_size=1) | st.lists(st.tuples(SEEDS, COEFS), max_size=40),
    scale=st.just(1.0) | COEFS,
    run_key=st.integers(0, 2**64 - 1),
    pid=st.integers(0, 2**32 - 1),
    in_place=st.booleans(),
)
def test_the_kernel_equals_the_specification_to_the_bit(n, start, pairs, scale, run_key, pid, in_place):
    seeds, coefs = [seed for seed, _ in pairs], [coef for _, coef in pairs]
    weight = weights(n)
    expected = reference(weight, run_key, pid, seeds, coefs, scale, start)
    given_weight = weight.copy()
    out = given_weight if in_place else np.full(n, np.nan, np.float32)
    accumulate(given_weight, out, run_key, pid, seeds, coefs, scale, start)
    # an overflow may make a NaN, whose sign is not part of the specification
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(out)[number], bits(expected)[number])
    assert np.isnan(out[~number]).all()
    if not in_place:
        np.testing.assert_array_equal(bits(given_weight), bits(weight))


@pytest.mark.parametrize("coef", [0.0, -0.0, 1e-41, 3e-45, 1e-38, 0.1, 1e30, 1e35])
def test_whole_pools_with_denormal_and_large_coefs(coef):
    rng = np.random.default_rng(3)
    weight = weights(2 * TILE)
    for seeds in (np.arange(320), rng.permutation(4096)[:320], np.array([77])):
        coefs = (coef * rng.uniform(-1, 1, seeds.size)).astype(np.float32)
        out = np.empty_like(weight)
        accumulate(weight, out, 5, 6, seeds, coefs, 0.999)
        expected = reference(weight, 5, 6, seeds, coefs, 0.999)
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(bits(out), bits(expected))


@pytest.mark.parametrize("seeds", [[7], [7, 8, 4000]])
@pytest.mark.parametrize("start", [0, 5, CHUNK - 3])
@pytest.mark.parametrize("in_place", [True, False])
def test_any_number_of_threads_gives_the_same_bits(seeds, start, in_place):
    weight = weights(3 * CHUNK + 1234)
    coefs = np.linspace(0.1, 0.2, len(seeds))
    expected = reference(weight, 5, 6, seeds, coefs, 0.9, start)
    for threads in (None, 1, 2, 3):
        given_weight = weight.copy()
        out = given_weight if in_place else np.empty_like(weight)
        accumulate(given_weight, out, 5, 6, seeds, coefs, 0.9, start, threads=threads)
        np.testing.assert_array_equal(bits(out), bits(expected))


@settings(deadline=None, max_examples=150)
@given(
    first=st.sampled_from([0, 32, 70]),
    ordered=st.integers(0, 100),
    others=st.lists(SEEDS, max_size=40),
    start=STARTS,
    count=st.integers(0, 10) | st.integers(0, 3 * 4 * MATRIX_BLOCKS),
    fill=st.booleans(),
)
def test_the_matrix_has_the_directions_as_columns(first, ordered, others, start, count, fill):
    """Seeds: a range, of which whole groups are copied straight to their place, and then any."""
    seeds = [*range(first, first + ordered), *others]
    out = np.full((count, len(seeds)), np.nan, np.float32) if fill else None
    found = matrix(2**63 + 9, 77, np.array(seeds, np.int64), start, count, out)
    assert found is out or out is None
    assert found.dtype == np.float32
    expected = [signs(2**63 + 9, seed, 77, start, count) for seed in seeds]
    np.testing.assert_array_equal(found, np.stack(expected, axis=1) if seeds else np.empty((count, 0)))


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
    run_key, seed, pid, start, count = arguments
    weight = np.zeros(count, np.float32)
    with pytest.raises(ValueError, match=text):
        signs(*arguments)
    with pytest.raises(ValueError, match=text):
        reference(weight, run_key, pid, [seed], [1.0], start=start)
    with pytest.raises(ValueError, match=text):
        accumulate(weight, weight, run_key, pid, [seed], [1.0], start=start)
    with pytest.raises(ValueError, match=text):
        matrix(run_key, pid, [seed], start, count)


def test_arrays_that_do_not_fit_are_refused():
    weight = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="weight must be contiguous float32"):
        accumulate(weight[::2], weight[:8], 0, 0, [1], [1.0])
    with pytest.raises(ValueError, match="out must be contiguous float32"):
        accumulate(weight, weight.astype(np.float64), 0, 0, [1], [1.0])
    with pytest.raises(ValueError, match="out has 8"):
        accumulate(weight, weight[:8], 0, 0, [1], [1.0])
    with pytest.raises(ValueError, match="2 seeds"):
        accumulate(weight, weight, 0, 0, [1, 2], [1.0])
    with pytest.raises(ValueError, match="2 seeds"):
        reference(weight, 0, 0, [1, 2], [1.0])
    for out in (np.zeros((2, 16), np.float32), np.zeros((16, 2)), np.zeros((2, 16), np.float32).T):
        with pytest.raises(ValueError, match="out must be contiguous float32"):
            matrix(0, 0, [1, 2], 0, 16, out)
