"""A codec as a file, and whom it fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from thinwire.compress.learned.codec_file import Artefact, fingerprint, read, write
from thinwire.compress.learned.lora_image import Image


def test_round_trip(tmp_path: Path) -> None:
    made = Artefact("learned", "for this", {"a": torch.arange(3), "b": torch.zeros(2, dtype=torch.float16)})
    write(tmp_path / "c", made)
    found = read(tmp_path / "c")
    assert (found.kind, found.fingerprint) == ("learned", "for this")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in made.tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_what_is_no_codec(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "garbage").write_bytes(b"no")
    for name, message in (("other", "no codec"), ("garbage", "cannot read"), ("absent", "cannot read")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


def test_a_fingerprint_distinguishes_model_rank_and_layout() -> None:
    def frozen(out: int) -> nn.Module:
        return nn.Linear(64, out).requires_grad_(False)

    def shapes(rank: int) -> dict[str, tuple[int, int]]:
        return {"A": (rank, 64), "B": (64, rank)}

    marks = [
        fingerprint(frozen(8), Image.packed(shapes(8), 1)),
        fingerprint(frozen(9), Image.packed(shapes(8), 1)),
        fingerprint(frozen(8), Image.packed(shapes(4), 1)),
        fingerprint(frozen(8), Image.paper(shapes(8), 1)),
    ]
    assert len(set(marks)) == 4
    assert "rank 4" in marks[2]
    assert "paper 64 x 16" in marks[3]
