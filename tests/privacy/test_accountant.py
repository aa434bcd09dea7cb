"""Epsilon is what the kept accountant's reference and published values say."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from thinwire.privacy.accountant import epsilon, least_noise

MNIST = (
    1.1,
    256 / 60000,
    60 * 60000 // 256,
    1e-5,
)  # 60 epochs of 60,000 rows in batches of 256


def reference(noise: float, rate: float, releases: int, delta: float) -> float:
    accountant = pld.PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), releases)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("setting", [MNIST, (1.0, 0.02, 100, 1e-5), (0.7, 0.1, 40, 1e-4)])
def test_equal_to_the_accountants_reference(setting: tuple[float, float, int, float]) -> None:
    assert epsilon(*setting) == pytest.approx(reference(*setting), abs=1e-3)


def test_below_the_looser_bound_of_moments() -> None:
    """By Renyi orders (Mironov et al. 2019) this is 2.6; an account of the whole loss is below it, and near."""
    orders = rdp.RdpAccountant()
    orders.compose(dp_accounting.PoissonSampledDpEvent(MNIST[1], dp_accounting.GaussianDpEvent(MNIST[0])), MNIST[2])
    assert orders.get_epsilon(1e-5) == pytest.approx(2.6, abs=0.05)
    assert 0.85 * orders.get_epsilon(1e-5) < epsilon(*MNIST) < orders.get_epsilon(1e-5)


@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (2.0, 5), (4.0, 16)])
def test_composed_normals_are_one_of_less_noise(noise: float, releases: int) -> None:
    """T releases of noise s are one of s / sqrt(T), whose delta is known in closed form (Balle and Wang 2018)."""
    spent, one = epsilon(noise, 1.0, releases, 1e-5), noise / math.sqrt(releases)

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = below(0.5 / one - spent * one) - math.exp(spent) * below(-0.5 / one - spent * one)
    assert delta == pytest.approx(1e-5, rel=0.02)


def test_nothing_released_spends_nothing() -> None:
    assert epsilon(1.0, 0.5, 0, 1e-5) == 0


@pytest.mark.parametrize(("most", "rate", "releases"), [(8.0, 0.05, 200), (1.0, 0.05, 200), (4.0, 1.0, 6)])
def test_the_least_noise_is_within_the_budget_and_hardly_more_than_needed(
    most: float, rate: float, releases: int
) -> None:
    noise = least_noise(most, rate, releases, 1e-5)
    assert epsilon(noise, rate, releases, 1e-5) <= most
    assert epsilon(0.98 * noise, rate, releases, 1e-5) > most
