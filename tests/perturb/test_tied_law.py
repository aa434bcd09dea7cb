"""The law tied: one pass gives what a loop over all directions does; they share no entry, and are as long as others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import tiny_net

from thinwire.methods.fedkseed import FedKSeed
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.perturb.pool import Pool
from thinwire.streams import words

KEY, NAME = 0xFEEDFACECAFEBEEF, "model.layers.3.self_attn.q_proj.weight"


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).to(dtype)


def replay(pool: Directions, weight: torch.Tensor, coefs: np.ndarray, scale: float) -> torch.Tensor:
    """The slow, obvious one: direction after direction, in float64."""
    total = weight.double() * scale
    for seed, coef in enumerate(coefs.tolist()):
        total = total + coef * pool.direction(NAME, weight.shape, seed).double()
    return total


@pytest.mark.parametrize("size", [1, 16, 37])
@pytest.mark.parametrize("scale", [1.0, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_pass_is_the_loop_over_all_directions(size: int, scale: float, dtype: torch.dtype) -> None:
    pool = Directions(KEY, "tied", size=size)
    whole = weights(43, 60, dtype=dtype)
    coefs = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    for weight in (whole, whole.t(), whole[5:, 3:30]):
        before, right = weight.clone(), replay(pool, weight, coefs, float(np.float32(scale)))
        found = pool.apply(weight, NAME, range(size), coefs, scale=scale)
        assert torch.equal(weight, before)
        close = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.5 / 128, torch.float16: 0.5 / 1024}[dtype]
        torch.testing.assert_close(found.double(), right, rtol=1.01 * close, atol=1e-5)  # rounded once
        assert not torch.allclose(found.double(), weight.double(), atol=0.1)
        inside = weight.clone()
        assert pool.apply(inside, NAME, range(size), coefs, scale=scale, out=inside) is inside
        assert torch.equal(inside, found)


def test_a_direction_that_comes_again_counts_again_and_none_changes_nothing() -> None:
    pool, weight = Directions(KEY, "tied", size=16), weights(40, 9)
    twice = pool.apply(weight, NAME, [3, 5, 3], [0.25, -1.0, 0.5])
    assert torch.equal(twice, pool.apply(weight, NAME, [5, 3], [-1.0, 0.75]))
    assert torch.equal(pool.apply(weight, NAME, [], []), weight)
    with pytest.raises(ValueError, match="direction 16 is not in a pool of 16"):
        pool.apply(weight, NAME, [0, 16], [1.0, 1.0])


@pytest.mark.parametrize("size", [16, 37])
def test_each_entry_is_of_one_direction_whose_mean_square_is_one(size: int) -> None:
    """And it is the tied view's map, written down anew: an index and a sign from the words of a stream."""
    pool, shape = Directions(KEY, "tied", size=size), (64, 50)
    all_of_them = torch.stack([pool.direction(NAME, shape, seed) for seed in range(size)]).double()
    assert torch.equal((all_of_them != 0).sum(0), torch.ones(shape, dtype=torch.int64))
    torch.testing.assert_close(all_of_them.square().mean(0), torch.ones(shape, dtype=torch.float64), rtol=1e-6, atol=0)
    counts = (all_of_them != 0).sum((1, 2)).double()
    assert (counts > 0).all()
    assert ((counts - 3200 / size).abs() < 5 * (3200 / size) ** 0.5).all()  # as even as chance makes them
    assert abs(float(all_of_them.sign().sum())) < 5 * 3200**0.5
    bits = 16 if size == 16 else 32
    from thinwire.perturb.philox import parameter_id

    drawn = words(KEY, [parameter_id(f"{NAME}#ties")], 3200).view(np.uint16 if bits == 16 else np.uint32)[0]
    index = [(int(word) >> 1) * size >> (bits - 1) for word in drawn[:3200]]
    assert all_of_them.abs().argmax(0).flatten().tolist() == index
    signs = [-1.0 if word & 1 else 1.0 for word in drawn[:3200].tolist()]
    assert all_of_them.sum(0).sign().flatten().tolist() == signs


def test_other_keys_and_other_parameters_have_other_maps() -> None:
    one = Directions(KEY, "tied", size=16)
    first = one.direction(NAME, (30, 30), 3)
    assert torch.equal(first, Directions(KEY, "tied", size=16).direction(NAME, (30, 30), 3))
    assert not torch.equal(first, Directions(KEY + 1, "tied", size=16).direction(NAME, (30, 30), 3))
    assert not torch.equal(first, one.direction(f"{NAME}2", (30, 30), 3))


@pytest.mark.parametrize("size", [0, (1 << 24) + 1])
def test_a_pool_of_no_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="numbers are not 1 to"):
        Directions(KEY, "tied", size=size)


def test_a_rebuild_reads_the_weights_once_whatever_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K coefficients, and the map is drawn once a tensor; the model is the sum over all directions."""
    from thinwire.model.views.ties import Ties

    net: Net = tiny_net(tmp_path)
    passes: list[int] = []
    plain = Ties.spread
    monkeypatch.setattr(Ties, "spread", lambda *args: [passes.append(args[2]), plain(*args)][1])
    method = FedKSeed(seeds=64, law="tied")
    pool = method._pool(KEY)
    assert isinstance(pool, Pool)
    gains = torch.from_numpy(np.random.default_rng(3).standard_normal(64).astype(np.float32)) * 1e-3
    pool.rebuild(net, gains, 0.5)
    assert len(passes) == len(set(passes)) == len(net.names)
    for name, parameter in net.parameters():
        right = 0.5 * net.base[name].double()
        for seed, gain in enumerate(gains.tolist()):
            right = right - gain * pool.directions.direction(name, parameter.shape, seed).double()
        torch.testing.assert_close(parameter.detach().double(), right, rtol=1e-5, atol=1e-6)
