"""Every codec by its name: the bytes promised, the length of an update under error feedback, what does not exist."""

from __future__ import annotations

import pytest
import torch
from updates import update

from thinwire.compress.catalogue import BUCKETS, ERRORS, Code, Name, TensorName, code_of, tensor_code
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.entropy.packing import to_tensor
from thinwire.compress.learned import autoencoder, codebooks
from thinwire.compress.learned.lora_image import Image
from thinwire.methods.cgfed import Coded
from thinwire.wire.frame import length

SHAPES = {f"{i}.{f}": (8, 512) if f == "A" else (512, 8) for i in range(8) for f in "AB"}
IMAGE = Image.packed(SHAPES)


NEEDS = ("components", "resnet", "learned")


def learnt(name: Name) -> dict[str, torch.Tensor]:
    if name == "components":
        return codebooks.untrained()
    if name == "learned":
        return codebooks.fit(IMAGE, [update(IMAGE, 0)], most=1 << 12, rounds=1)
    x = update(IMAGE, 0)
    return autoencoder.tables_of(autoencoder.AutoEncoder.drawn(0), [x], torch.ones(1))


@pytest.mark.parametrize("ratio", [16, 32, 64])
@pytest.mark.parametrize("name", ["eden", "powersgd", "topk", "qsgd", "sign", "svd", *NEEDS])
def test_bytes_are_those_of_the_ratio(name: Name, ratio: int) -> None:
    if (name, ratio) in {("sign", 16), ("resnet", 16), ("resnet", 32)}:
        with pytest.raises(ValueError, match="ratio"):
            code_of(name, ratio, IMAGE, {"scale": torch.ones(1)})
        return
    code = code_of(name, ratio, IMAGE, learnt(name) if name in NEEDS else None)
    x = update(IMAGE, 1)
    data = code.encode(x, 5)
    assert 0.8 < len(data) / (4 * IMAGE.count / ratio) < 1.05
    assert code.decode(data, x.shape, 5).shape == x.shape


@pytest.mark.parametrize("name", ["components", "learned"])
def test_a_whole_frame_is_as_much_shorter(name: Name) -> None:
    code = code_of(name, 16, IMAGE, learnt(name)).encode(update(IMAGE, 1), 5)
    up = Coded(to_tensor(code), 2**31, False, 0.9, 1000, 2.5, 0)
    assert length(up, run=2**32 - 1, round=100, client=1000) <= 4 * IMAGE.count // 16


@pytest.mark.parametrize(("name", "size"), [("blocks", 4224), ("eden", 4100), ("factors", 1632), ("topk", 331)])
def test_a_codec_of_tensors_has_its_own_settings(name: TensorName, size: int) -> None:
    code, x = (
        tensor_code(name, bits=4, rank=16, share=0.03),
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)),
    )
    assert len(code.encode(x, 5)) == pytest.approx(size, rel=0.1)
    for bits in (2.5, 0):
        with pytest.raises(ValueError, match="bits"):
            tensor_code(name, bits)


def test_no_codec_is_bitwise() -> None:
    code, x = code_of("none", 64, IMAGE), update(IMAGE, 1)
    assert torch.equal(code.decode(code.encode(x, 0), x.shape, 0), x)
    with pytest.raises(ValueError, match="bytes"):
        code.decode(b"123", x.shape, 0)


@pytest.mark.parametrize("name", ["eden", "powersgd", "topk", "sign", "svd"])
def test_what_error_feedback_keeps_stays_bounded(name: Name) -> None:
    code, x = code_of(name, 64, IMAGE, contract=True), update(IMAGE, 2)
    kept, sent = torch.zeros_like(x), torch.zeros_like(x)
    for round in range(20):
        told = code.decode(code.encode(x + kept, round), x.shape, round)
        sent, kept = sent + told, x + kept - told
    torch.testing.assert_close(sent + kept, 20 * x, rtol=1e-3, atol=1e-5)
    assert float(kept.norm()) < 12 * float(x.norm())


@pytest.mark.parametrize("bits", list(ERRORS))
def test_edens_errors(bits: float) -> None:
    x, code = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)), Eden(bits)
    error = float((code.decode(code.encode(x, 1), x.shape, 1) - x).square().sum() / x.square().sum())
    assert error == pytest.approx(ERRORS[bits], rel=0.03)


def test_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="fit-codec"):
        code_of("learned", 64, IMAGE)
    assert set(BUCKETS) == {16, 32, 64}


def test_every_code_refuses_what_it_did_not_make() -> None:
    names: tuple[Name, ...] = ("none", "eden", "powersgd", "topk", "qsgd", "sign", "svd", *NEEDS)
    for name in names:
        code: Code = code_of(name, 64, IMAGE, learnt(name) if name in NEEDS else None)
        data = code.encode(update(IMAGE, 1), 0)
        with pytest.raises(ValueError, match=r"."):
            code.decode(data[: len(data) // 2], (IMAGE.height, IMAGE.width), 0)


def test_a_latent_out_of_range_or_not_finite_is_refused() -> None:
    code = code_of("resnet", 64, IMAGE, learnt("resnet"))
    size = IMAGE.count // 64
    shape = (IMAGE.height, IMAGE.width)
    for value in (1e6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beyond what was trained on"):
            code.decode(torch.full((size,), value).numpy().tobytes(), shape, 0)
    with pytest.raises(ValueError, match="latent of"):
        code.decode(bytes(4 * size + 4), shape, 0)
