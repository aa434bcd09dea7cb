import numpy as np
import pytest
import torch

from thinwire.perturb import directions, philox
from thinwire.perturb.directions import Directions

NAME = "model.layers.3.self_attn.q_proj.weight"
POOL = Directions(key=0xFEEDFACECAFEBEEF)
SEEDS, COEFS, SCALE = [3, 4000, 3, 2**32 - 1], [0.1, -2e-3, 1e-5, 0.7], 0.99


def draw(*shape, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape).astype(np.float32)).to(dtype)


def expected(weight, seeds=SEEDS, coefs=COEFS, scale=SCALE):
    """The specification on the row-major float32 values of `weight`, rounded once to its dtype."""
    flat = weight.detach().to(torch.float32).contiguous().view(-1).numpy()
    result = philox.accumulate(flat, POOL.key, philox.parameter_id(NAME), seeds, coefs, scale)
    return torch.from_numpy(result).view(weight.shape).to(weight.dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.detach(), b.detach())


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(directions, "TILE", 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7,), (37, 53), (2, 3, 5, 7)])
def test_every_dtype_and_shape_is_the_float32_result_rounded_once(dtype, shape, small_tiles):
    weight = draw(*shape, dtype=dtype)
    before = weight.clone()
    result = POOL.apply(weight, NAME, SEEDS, COEFS, scale=SCALE)
    assert same(result, expected(weight))
    assert same(weight, before)
    assert POOL.apply(weight, NAME, SEEDS, COEFS, scale=SCALE, out=weight) is weight
    assert same(weight, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[5:, 3:30],
        lambda t: t[:, 4],
        lambda t: t.view(4, 25, 5, 12).transpose(1, 2),
        lambda t: t.view(10, 10, 6, 10).contiguous(memory_format=torch.channels_last),
    ],
)
def test_tensors_that_are_not_contiguous(view, dtype, small_tiles):
    whole = draw(100, 60, dtype=dtype)
    weight = view(whole)
    assert not weight.is_contiguous()
    want = expected(weight)
    assert same(POOL.apply(weight, NAME, SEEDS, COEFS, scale=SCALE), want)
    # contiguous to not, and in place through the view
    assert same(POOL.apply(weight.contiguous(), NAME, SEEDS, COEFS, scale=SCALE, out=torch.empty_like(weight)), want)
    pointer = weight.data_ptr()
    POOL.apply(weight, NAME, SEEDS, COEFS, scale=SCALE, out=weight)
    assert same(weight, want)
    assert weight.data_ptr() == pointer


def test_in_place_through_a_view_leaves_the_rest():
    whole = draw(20, 20)
    before = whole.clone()
    POOL.apply(whole[:, ::2], NAME, SEEDS, COEFS, out=whole[:, ::2])
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    assert not torch.equal(whole[:, ::2], before[:, ::2])


def test_float64_is_computed_in_float64():
    weight = draw(30, 7).to(torch.float64)
    want = SCALE * weight
    for seed, coef in zip(SEEDS, COEFS, strict=True):
        want = want + coef * POOL.direction(NAME, (30, 7), seed).to(torch.float64)
    result = POOL.apply(weight, NAME, SEEDS, COEFS, scale=SCALE)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, want, rtol=1e-14, atol=1e-14)


def test_a_direction_is_what_apply_adds():
    zeros = torch.zeros(6, 5)
    z = POOL.direction(NAME, (6, 5), 17)
    assert z.dtype == torch.float32
    assert same(POOL.apply(zeros, NAME, [17], [1.0]), z)
    assert POOL.direction(NAME, (), 17).shape == ()
    assert not torch.equal(z, POOL.direction("another", (6, 5), 17))
    assert not torch.equal(z, Directions(key=1).direction(NAME, (6, 5), 17))


def test_a_parameter_that_requires_grad_stays_a_leaf():
    weight = torch.nn.Parameter(draw(9, 9))
    want = expected(weight)
    fresh = POOL.apply(weight, NAME, SEEDS, COEFS, scale=SCALE)
    assert not fresh.requires_grad
    assert POOL.apply(weight, NAME, SEEDS, COEFS, scale=SCALE, out=weight) is weight
    assert weight.requires_grad
    assert weight.is_leaf
    assert same(fresh, want)
    assert same(weight, want)


def test_no_seeds_leave_the_bits_and_scale_still_scales():
    weight = torch.tensor([-0.0, 0.0, 3.0])
    assert torch.equal(POOL.apply(weight, NAME, [], []).view(torch.int32), weight.view(torch.int32))
    assert POOL.apply(weight, NAME, np.array([], np.int64), np.array([]), scale=0.5)[2] == 1.5


def test_seeds_and_coefs_as_arrays():
    weight = draw(50)
    arrays = np.array(SEEDS, dtype=np.uint32)[::-1], np.array(COEFS)[::-1]
    assert same(POOL.apply(weight, NAME, *arrays), expected(weight, SEEDS[::-1], COEFS[::-1], 1.0))


def test_global_generators_stay_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    POOL.apply(draw(300, 300), NAME, SEEDS, COEFS)
    POOL.direction(NAME, (10,), 1)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_an_unsupported_dtype_is_named(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        POOL.apply(torch.zeros(3, dtype=dtype), NAME, [1], [1.0])


@pytest.mark.parametrize(
    ("seeds", "coefs", "scale", "text"),
    [
        ([1], [float("nan")], 1.0, "coefs must be finite"),
        ([1], [float("inf")], 1.0, "coefs must be finite"),
        ([1], [1e39], 1.0, "coefs must be finite in float32"),
        ([1], [1.0], float("nan"), "scale must be finite"),
        ([1, 2], [1.0], 1.0, "2 seeds"),
        ([-1], [1.0], 1.0, "seed"),
        ([2**32], [1.0], 1.0, "seed"),
        ([1.5], [1.0], 1.0, "integers"),
        ([[1]], [[1.0]], 1.0, "one dimension"),
    ],
)
def test_illegal_replays_are_refused_and_write_nothing(seeds, coefs, scale, text):
    weight = draw(5)
    before = weight.clone()
    with pytest.raises(ValueError, match=text):
        POOL.apply(weight, NAME, seeds, coefs, scale=scale, out=weight)
    assert torch.equal(weight, before)


def test_an_out_that_does_not_fit_is_refused():
    weight = draw(4, 5)
    for out in (torch.empty(5, 4), torch.empty(4, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="out is"):
            POOL.apply(weight, NAME, [1], [1.0], out=out)


def test_an_unknown_law_or_key_is_refused():
    with pytest.raises(ValueError, match="unknown law"):
        Directions(key=1, law="cauchy")
    with pytest.raises(ValueError, match="run key"):
        Directions(key=2**64)
