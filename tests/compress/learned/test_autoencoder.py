"""The published autoencoder: counted, shaped, trained, and the generators left alone."""

from __future__ import annotations

import pytest
import torch

from thinwire.compress.learned.autoencoder import AutoEncoder, decoder, encoder, fit, latent_shape


def test_parameters_are_as_many_as_the_paper_counts() -> None:
    assert sum(p.numel() for p in encoder().parameters()) == 246_785
    assert sum(p.numel() for p in decoder().parameters()) == 246_698


def test_the_latent_is_one_64th_at_the_papers_size() -> None:
    with torch.device("meta"):  # the shapes alone: 8 million numbers take seconds
        half = encoder().eval()
        latent = half(torch.empty(1, 1, 4096, 2048))
        assert tuple(decoder().eval()(latent).shape) == (1, 1, 4096, 2048)
    assert tuple(latent.shape[1:]) == latent_shape(4096, 2048) == (64, 64, 32)
    assert 64 * latent.numel() == 4096 * 2048


@pytest.mark.parametrize(("height", "width"), [(128, 192), (1600, 576)])
def test_a_latent_has_the_shape_that_is_announced(height: int, width: int) -> None:
    with torch.no_grad():
        latent = AutoEncoder.drawn(1).eval().encoder(torch.randn(1, 1, height, width))
    assert tuple(latent.shape[1:]) == latent_shape(height, width)


@pytest.mark.parametrize("sides", [(100, 128), (64, 128), (128, 0)])
def test_sides_that_are_not_served(sides: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        latent_shape(*sides)


def test_training_lowers_the_loss_and_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state()
    model = AutoEncoder.drawn(0)
    images = [torch.full((128, 128), 0.5), torch.full((128, 128), 0.25)]
    losses = fit(model, images, 40, batch=2, lr=5e-3)
    assert losses[-1] < losses[0] / 2
    assert torch.equal(before, torch.get_rng_state())
    again = fit(AutoEncoder.drawn(0), images, 2, batch=2, lr=5e-3)
    assert again == losses[:2]
