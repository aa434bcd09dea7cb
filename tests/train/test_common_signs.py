"""Signs under common scales: what is sent and what is owed are what was learnt; their mean is that of the decoded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.feedback import on_grid
from thinwire.privacy.secure import Secure
from thinwire.train.common_signs import CommonSigns, encode
from thinwire.wire import Illegal

CODE = Blocks(1, 8)
SCALES = torch.tensor([1e-3, 0.0, 2.5e-4]).to(torch.bfloat16)


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(21, generator=torch.Generator().manual_seed(seed)) * 1e-3


def test_what_is_sent_and_what_is_owed_are_what_was_learnt_to_the_bit() -> None:
    debt, learnt, sent = (
        torch.zeros(21, dtype=torch.float64),
        torch.zeros(21, dtype=torch.float64),
        torch.zeros(21).double(),
    )
    for round in range(5):
        data, _, debt = encode(CODE, numbers(round), debt, SCALES)
        learnt += on_grid(numbers(round))
        sent += on_grid(CODE.decode(data, (21,), 0))
    assert torch.equal(sent + debt, learnt)
    assert torch.equal(sent[8:16], torch.zeros(8).double())


def test_own_scales_are_the_mean_magnitudes_of_what_is_wanted() -> None:
    debt = numbers(9).double()
    _, own, _ = encode(CODE, numbers(1), debt, SCALES)
    wanted = (on_grid(numbers(1)) + debt).abs()
    means = torch.stack([part.mean() for part in wanted.split(8)])
    assert own.double() == pytest.approx(means, rel=2**-8)


def test_the_mean_of_bits_is_the_mean_of_what_they_decode_to() -> None:
    method = SimpleNamespace(weighting="uniform", gradient="backward")
    linear = CommonSigns(method, Secure(), CODE, "numbers")
    client, state = (
        SimpleNamespace(net=SimpleNamespace(size=21)),
        SimpleNamespace(numbers=torch.zeros(21), scales=SCALES),
    )
    bits, decoded = torch.zeros(21).double(), torch.zeros(21).double()
    for seed in range(3):
        data, own, _ = encode(CODE, numbers(seed), torch.zeros(21, dtype=torch.float64), SCALES)
        up = SimpleNamespace(change=torch.frombuffer(bytearray(data), dtype=torch.uint8), scales=own)
        bits += linear.parts(None, up, client)["numbers"] / 3
        decoded += CODE.decode(data, (21,), 0).double() / 3
    update = linear.of_terms(state, None, {"numbers": bits, "scales": SCALES.double()})
    assert torch.allclose(update.tensors["numbers"].double(), decoded, atol=1e-9)


@pytest.mark.parametrize(
    "bad", [SCALES[:2], SCALES.float(), torch.tensor([1e-3, -1.0, 0.0]).to(torch.bfloat16), SCALES * float("inf")]
)
def test_scales_of_another_form_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(Illegal, match="common scales"):
        encode(CODE, numbers(0), torch.zeros(21, dtype=torch.float64), bad)
