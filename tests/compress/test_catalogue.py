"""Every codec by its name: the bytes promised, the length of an update under error feedback, what does not exist."""

from __future__ import annotations

import contextlib
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import update

from thinwire.compress.catalogue import (
    BUCKETS,
    ERRORS,
    WITHIN,
    Code,
    Name,
    Part,
    TensorCode,
    TensorName,
    code_of,
    sizes,
    tensor_code,
)
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.codecs.sketch import Sketch
from thinwire.compress.codecs.ternary import Ternary
from thinwire.compress.entropy.packing import to_tensor
from thinwire.compress.learned import autoencoder, codebooks
from thinwire.compress.learned.lora_image import Image
from thinwire.methods.cgfed import Coded
from thinwire.streams import words
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


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("none", 32768),
        ("sign", 1040),
        ("ternary", 344),
        ("blocks", 4224),
        ("eden", 4100),
        ("factors", 1632),
        ("topk", 331),
        ("sketch", 1026),
        ("nnadq", 12296),
    ],
)
def test_a_codec_of_tensors_has_its_own_settings(name: TensorName, size: int) -> None:
    code, x = (
        tensor_code(name, bits=4, rank=16, share=0.03, density=0.05, ratio=1),
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)),
    )
    data = code.encode(x, 5)
    assert len(data) == pytest.approx(size, rel=0.1)
    least, most = sizes(code, x.shape)
    assert least <= len(data) <= most
    if name in ("blocks", "eden", "factors", "topk"):
        for bits in (2.5, 0):
            with pytest.raises(ValueError, match="bits"):
                tensor_code(name, bits)


def test_every_name_is_a_code_that_refuses_what_it_has_not() -> None:
    assert isinstance(tensor_code("sign", block=128), Blocks)
    assert tensor_code("blocks", 3, block=64) == Blocks(3, 64)
    assert tensor_code("ternary", density=0.2, block=64) == Ternary(0.2, 64)
    assert tensor_code("sketch", ratio=0.5, part=0.5) == Part(Sketch(0.5), 0.5)
    for name, own, wrong in (
        ("ternary", {"density": 0}, "density 0 is not in"),
        ("sketch", {"ratio": 2}, "ratio 2 is not in"),
        ("nnadq", {"coarseness": 0}, "coarseness 0.* is not above 0"),
        ("sign", {"part": 0}, "share 0 is not in"),
        ("sign", {"block": 0}, "block 0 is not in"),
        ("factors", {"part": 0.5}, "part 0.5: factors are of whole matrices"),
    ):
        with pytest.raises(ValueError, match=wrong) as error:
            tensor_code(name, **own)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_a_row_as_a_block_has_its_own_scale() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    code = tensor_code("sign", block=96)
    found = code.decode(code.encode(x, 0), x.shape, 0)
    assert torch.equal(found, x.sign() * x.abs().double().mean(1, keepdim=True).float().bfloat16().float())


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
        decoded = code.decode(code.encode(x + kept, round), x.shape, round)
        sent, kept = sent + decoded, x + kept - decoded
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


EVERY = {
    "none": tensor_code("none"),
    "sign": tensor_code("sign"),
    "ternary": tensor_code("ternary", density=0.1),
    "ternary, blocks": tensor_code("ternary", density=0.1, block=64),
    **{f"{bits} bits": tensor_code("blocks", bits, block=64) for bits in range(2, 9)},
    "eden 4": tensor_code("eden", 4),
    "eden 1": tensor_code("eden", 1, contract=True),
    "eden 0.5": tensor_code("eden", 0.5, contract=True),
    "topk": tensor_code("topk", 8, share=0.1),
    "factors": tensor_code("factors", 8, rank=4),
    "sketch": tensor_code("sketch"),
    "sketch 0.3": tensor_code("sketch", ratio=0.3),
    "nnadq": tensor_code("nnadq"),
    "a third of signs": tensor_code("sign", part=1 / 3),
    "a half of ternary": tensor_code("ternary", density=0.2, part=0.5),
    "a half of a sketch": tensor_code("sketch", ratio=0.5, part=0.5),
}
KINDS = pytest.mark.parametrize("code", EVERY.values(), ids=list(EVERY))


def test_every_tensor_code_is_tried() -> None:
    names = {type(code).__name__ for code in EVERY.values()}
    assert names == {kind.__name__ for kind in get_args(TensorCode)}


@KINDS
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (48, 40)])
def test_sizes_and_shapes_of_every_tensor_code(code: TensorCode, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-5
    for of in (x, torch.zeros(shape), x * 1e-40):
        data = code.encode(of, 3)
        least, most = sizes(code, shape)
        assert least <= len(data) <= most
        found = code.decode(data, shape, 3)
        assert found.shape == x.shape
        assert found.isfinite().all()
        assert code.decode(code.encode(found, 3), shape, 3).isfinite().all()
        assert of.any() or not found.any()


@KINDS
def test_with_a_debt_all_that_was_learned_is_sent_in_the_end(code: TensorCode) -> None:
    draw = torch.Generator().manual_seed(0)
    steady, debt = torch.randn(48, 40, generator=draw), torch.zeros(48, 40)
    learned, sent, lost = torch.zeros(48, 40, dtype=torch.float64), torch.zeros(48, 40, dtype=torch.float64), []
    for turn in range(400):
        x = steady + 0.3 * torch.randn(48, 40, generator=draw)
        found = code.decode(code.encode(x + debt, turn), x.shape, turn)
        debt = x + debt - found
        learned, sent = learned + x, sent + found
        lost.append(float(debt.norm() / learned.norm()))
    torch.testing.assert_close(learned - sent, debt.double(), rtol=0, atol=1e-3)
    # what is owed grows slower and slower, so its share of all falls; of one scale for all it is slowest
    assert lost[399] < 0.72 * lost[199] + 1e-6
    assert lost[399] < 0.1


@KINDS
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_no_tensor_code_makes_anything_else_of_any_bytes(code: TensorCode, data: st.DataObject) -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    good = bytearray(code.encode(x, 3))
    for _ in range(data.draw(st.integers(0, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([-4, -1, 0, 0, 1, 4]))
    bad = bytes(good[: len(good) + cut] if cut < 0 else good + bytes(cut))
    shape = data.draw(st.sampled_from([(6, 40), (240,), (241,), (0,), (2**40, 2**40), (-6, -40)]))
    with contextlib.suppress(ValueError):
        found = code.decode(bad, shape, 3)
        assert found.shape == shape
        assert found.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(-(2.0**50), 2.0**50, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-50), min_size=1, max_size=80
    ),
    st.sampled_from([name for name in EVERY if name not in ("eden 4", "eden 1", "eden 0.5", "factors", "nnadq")]),
    st.integers(0, 2**64 - 1),
)
def test_no_tensor_code_expands(values: list[float], name: str, key: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    code = EVERY[name]
    left = x - code.decode(code.encode(x, key), x.shape, key)
    assert float(left.double().norm()) <= float(x.double().norm()) * (1 + 1e-5)


@settings(deadline=None)
@given(st.integers(0, 300), st.sampled_from([0.001, 0.3, 0.5, 1.0]), st.integers(0, 2**64 - 1))
def test_a_part_is_that_of_the_key(count: int, share: float, key: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(1))
    code, draws = Part(Blocks(1, 16), share), words(key, [0], max(1, count))[0].tolist()
    some = min(count, max(1, round(share * count)))
    picked = sorted(sorted(range(count), key=lambda i: draws[i])[:some]) if share < 1 else list(range(count))
    data = code.encode(x, key)
    assert data == Blocks(1, 16).encode(x[picked], 0)
    found = code.decode(data, x.shape, key)
    wanted = torch.zeros(count)
    wanted[picked] = Blocks(1, 16).decode(data, (some,), 0)
    assert torch.equal(found, wanted)
    assert code.picked(count, key).tolist() == picked
    assert code.kept(count) == some


def test_what_goes_up_and_down_under_a_key_covers_the_same_and_all_of_it_in_time() -> None:
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    up, down = (Part(inner, 0.5) for inner in (Blocks(1, 64), Blocks(4)))
    a, b = up.decode(up.encode(x, 9), (4096,), 9), down.decode(down.encode(y, 9), (4096,), 9)
    assert torch.equal(a != 0, b != 0)
    assert int((a != 0).sum()) == 2048
    assert bool((a.sign() == x.sign())[a != 0].all())
    assert not torch.equal(a != 0, up.decode(up.encode(x, 10), x.shape, 10) != 0)
    assert float(torch.cosine_similarity(x, a, dim=0)) == pytest.approx(math.sqrt(0.5) * 0.798, abs=0.03)
    often = np.bincount(np.concatenate([up.picked(512, key) for key in range(400)]), minlength=512)
    assert abs(often / 400 - 0.5).max() < 5 * 0.5 / math.sqrt(400)


def test_a_parts_code_draws_from_a_key_of_its_own() -> None:
    x, code = torch.randn(300, generator=torch.Generator().manual_seed(0)), Part(Sketch(0.5), 0.5)
    own = int(words(7, [WITHIN], 1)[0, 0])
    assert code.encode(x, 7) == Sketch(0.5).encode(x[torch.from_numpy(code.picked(300, 7))], own)
    with pytest.raises(ValueError, match="key"):
        code.encode(x, 1 << 64)
    with pytest.raises(ValueError, match="key"):
        code.decode(b"", (3,), -1)
    with pytest.raises(ValueError, match="bytes for 150 elements"):
        code.decode(code.encode(x, 7)[:-1], (300,), 7)
    with pytest.raises(ValueError, match="finite"):
        code.encode(torch.tensor([math.nan]), 0)
    with pytest.raises(ValueError, match="bytes"):
        Part(Blocks(1, 64), 0.5).decode(b"1234", (1 << 60,), 0)
