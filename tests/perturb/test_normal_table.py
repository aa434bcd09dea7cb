import hashlib
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

import thinwire.perturb
from thinwire.perturb.normal_table import HALF, exact_half, quantiles

FILE = Path(thinwire.perturb.__file__).with_name("gaussian_table.npy")


def test_the_file_is_the_frozen_one():
    half = np.load(FILE)
    assert half.dtype == np.dtype("<f4")
    assert half.shape == (HALF,)
    digest = hashlib.sha256(half.tobytes()).hexdigest()
    assert digest == "6621a18f629e82396c088501c1095eae46f6d8033b42db7b4158e0f4cf34a0ce"


def test_every_quantile_is_within_one_ulp_of_an_independent_one():
    law = NormalDist()
    expected = np.array([law.inv_cdf((HALF + j + 0.5) / 65536) for j in range(HALF)])
    half = quantiles()[HALF:]
    assert (np.abs(half - expected) <= np.spacing(half)).all()


def test_samples_are_correctly_rounded():
    pytest.importorskip("mpmath")
    indices = [
        0,
        1,
        2,
        HALF - 3,
        HALF - 2,
        HALF - 1,
        *np.random.default_rng(0).integers(0, HALF, 200).tolist(),
    ]
    np.testing.assert_array_equal(quantiles()[HALF:][indices], exact_half(indices))


def test_the_table_is_symmetric_ascending_and_read_only():
    table = quantiles()
    np.testing.assert_array_equal(table, -table[::-1])
    assert (np.diff(table) > 0).all()
    assert not table.flags.writeable


def test_the_law_of_the_table():
    table = quantiles().astype(np.float64)
    assert table.mean() == 0
    assert abs((table**2).mean() - 1) < 1e-4
    assert abs((table**4).mean() / (table**2).mean() ** 2 - 3) < 2e-3
    assert table.max() < 4.33
