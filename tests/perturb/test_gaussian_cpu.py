import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.perturb import gaussian_cpu, philox
from thinwire.streams import words
from thinwire.threads import CHUNK, TILE


def bits(array):
    return array.view(np.uint32)


def weights(n, seed=0):
    """Weights over the whole range of float32: ordinary, denormal, huge and negative zero."""
    rng = np.random.default_rng(seed)
    exponents = rng.choice([0, -2, -40, 30], n)
    weight = (rng.standard_normal(n) * 10.0**exponents).astype(np.float32)
    weight[::17] = -0.0
    return weight


COEFS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-1, 1, width=32)
SIZES = (
    st.integers(0, 40) | st.sampled_from([TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 9]) | st.integers(0, 3 * TILE)
)
STARTS = st.integers(0, 3 * TILE) | st.integers(2**35 - 2 * TILE, 2**35 + 20) | st.integers(0, 2**62 - 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(deadline=None, max_examples=200)
@given(
    n=SIZES,
    start=STARTS,
    pairs=st.lists(st.tuples(st.integers(0, 2**32 - 1), COEFS), max_size=4),
    scale=st.just(1.0) | COEFS,
    run_key=st.integers(0, 2**64 - 1),
    pid=st.integers(0, 2**32 - 1),
    in_place=st.booleans(),
)
def test_the_kernel_equals_the_specification_to_the_bit(n, start, pairs, scale, run_key, pid, in_place):
    seeds, coefs = [seed for seed, _ in pairs], [coef for _, coef in pairs]
    weight = weights(n)
    expected = philox.accumulate(weight, run_key, pid, seeds, coefs, scale, start)
    given_weight = weight.copy()
    out = given_weight if in_place else np.full(n, np.nan, np.float32)
    gaussian_cpu.accumulate(given_weight, out, run_key, pid, seeds, coefs, scale, start)
    # an overflow may make a NaN, whose sign is not part of the specification
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(out)[number], bits(expected)[number])
    assert np.isnan(out[~number]).all()
    if not in_place:
        np.testing.assert_array_equal(bits(given_weight), bits(weight))


@pytest.mark.parametrize("coef", [1e-41, 3e-45, 1e-38, 0.1, 1e30, 2e36])
def test_many_seeds_with_denormal_and_large_coefs(coef):
    """64 seeds over two tiles: a fused multiply-add or flushed denormals would show in thousands of elements."""
    rng = np.random.default_rng(3)
    seeds, coefs = rng.integers(0, 2**32, 64), (coef * rng.uniform(-1, 1, 64)).astype(np.float32)
    weight = weights(2 * TILE)
    out = np.empty_like(weight)
    gaussian_cpu.accumulate(weight, out, 5, 6, seeds, coefs, 0.999)
    expected = philox.accumulate(weight, 5, 6, seeds, coefs, 0.999)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(bits(out), bits(expected))


@pytest.mark.parametrize("start", [0, 5, CHUNK - 3])
@pytest.mark.parametrize("in_place", [True, False])
def test_any_number_of_threads_gives_the_same_bits(start, in_place):
    weight = weights(3 * CHUNK + 1234)
    expected = philox.accumulate(weight, 5, 6, [7, 8], [0.1, 0.2], 0.9, start)
    for threads in (None, 1, 2, 3):
        given_weight = weight.copy()
        out = given_weight if in_place else np.empty_like(weight)
        gaussian_cpu.accumulate(given_weight, out, 5, 6, [7, 8], [0.1, 0.2], 0.9, start, threads=threads)
        np.testing.assert_array_equal(bits(out), bits(expected))


def test_arrays_that_do_not_fit_are_refused():
    weight = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="weight must be contiguous float32"):
        gaussian_cpu.accumulate(weight[::2], weight[:8], 0, 0, [1], [1.0])
    with pytest.raises(ValueError, match="out must be contiguous float32"):
        gaussian_cpu.accumulate(weight, weight.astype(np.float64), 0, 0, [1], [1.0])
    with pytest.raises(ValueError, match="out has 8"):
        gaussian_cpu.accumulate(weight, weight[:8], 0, 0, [1], [1.0])
    with pytest.raises(ValueError, match="2 seeds"):
        gaussian_cpu.accumulate(weight, weight, 0, 0, [1, 2], [1.0])
    with pytest.raises(ValueError, match="start"):
        gaussian_cpu.accumulate(weight, weight, 0, 0, [1], [1.0], start=-1)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 200, 401])
def test_words_are_those_of_the_specification(count: int) -> None:
    key, streams = 0xFEDCBA9876543210, [0, 7, 2**32 - 1, 2**32, 2**64 - 1]
    found = words(key, streams, count)
    assert found.shape == (len(streams), count)
    for row, stream in zip(found, streams, strict=True):
        blocks = np.arange((count + 1) // 2, dtype=np.uint64)
        counter = np.zeros((blocks.size, 4), np.uint64)
        counter[:, 0], counter[:, 2], counter[:, 3] = blocks, stream % 2**32, stream // 2**32
        drawn = philox.philox4x32(counter, [key % 2**32, key // 2**32]).astype(np.uint64)
        pairs = drawn[:, ::2] | drawn[:, 1::2] << np.uint64(32)
        assert row.tolist() == pairs.reshape(-1)[:count].tolist()
