"""How much of recorded LoRA updates each codec carries at 1/16, 1/32 and 1/64 of float32.

    python benchmarks/codecs.py FOLDER [--late ROUNDS] [--clients N] [--iterations N] [--json FILE]

FOLDER has the updates that `thinwire fit-codec RECIPE --snapshots FOLDER` gathers, a file a round, all clients in each.
Learnt codecs are fitted on the rounds before the last ROUNDS (1), of all but the last N clients (6), and all codecs are
judged on those rounds and clients: both are held out. The autoencoder is trained for so many iterations (0: left out).

cosine: of an update with its decoding; mean of 5: of the mean of five clients' updates with that of the decodings;
shifted: of an update with the decoding of another client's code; error: |decoded - x|^2 / |x|^2; bytes: of a code.
The reference of each row is EDEN's cosine at the same ratio.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from rows import Row, finish
from safetensors.torch import load_file
from torch import Tensor

from thinwire.compress.catalogue import Code, Name, TensorCode, code_of, tensor_code
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.learned import autoencoder, codebooks
from thinwire.compress.learned.fidelity import Fidelity, cosine, fidelity
from thinwire.compress.learned.lora_image import Image


@dataclass(frozen=True)
class FactorSvd:
    """The leading directions of each factor by itself, in so many bits a number, of as many as `size` bytes hold."""

    image: Image
    rank: int
    bits: int
    size: int

    def encode(self, x: Tensor, key: int) -> bytes:
        """The largest factors' halves, and which they are."""
        blocks = [f if f.shape[0] <= f.shape[1] else f.T for f in self.image.unstack(x).values()]
        order = sorted(range(len(blocks)), key=lambda b: -float(blocks[b].norm()))
        out: dict[int, bytes] = {}
        taken = len(blocks) // 8 + 1
        for b in order:
            left, values, right = torch.linalg.svd(blocks[b], full_matrices=False)
            root = values[: self.rank].sqrt()
            halves = [(left[:, : self.rank] * root).T.contiguous(), (right[: self.rank].T * root).T.contiguous()]
            data = b"".join(Blocks(self.bits, half.shape[1]).encode(half, 0) for half in halves)
            if taken + len(data) <= self.size:
                out[b] = data
                taken += len(data)
        marks = bytes(sum(1 << i for i in range(8) if 8 * j + i in out) for j in range(len(blocks) // 8 + 1))
        return marks + b"".join(out[b] for b in sorted(out))

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The image back."""
        body, factors = memoryview(data), {}
        marks, at = body[: len(self.image.shapes) // 8 + 1], len(self.image.shapes) // 8 + 1
        for b, (name, full) in enumerate(self.image.shapes.items()):
            if not marks[b // 8] >> b % 8 & 1:
                factors[name] = torch.zeros(full)
                continue
            halves = []
            for side in (min(full), max(full)):
                code = Blocks(self.bits, side)
                size = code.size(side * self.rank)
                halves.append(code.decode(body[at : at + size], (self.rank, side), 0))
                at += size
            block = halves[0].T @ halves[1]
            factors[name] = (block if full[0] <= full[1] else block.T).contiguous()
        return self.image.stack(factors)


def rounds_of(folder: Path) -> tuple[Image, list[list[Tensor]]]:
    """The layout, and the updates as images: of each round, of each client."""
    rounds, image = [], None
    for path in sorted(folder.glob("r*.safetensors")):
        tensors = load_file(path)
        clients = sorted({int(name.partition("/")[0]) for name in tensors})
        if image is None:
            names = [name.partition("/")[2] for name in tensors if name.startswith(f"{clients[0]}/")]
            names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
            image = Image.packed({name: tuple(tensors[f"{clients[0]}/{name}"].shape) for name in names}, 1)
        rounds.append([image.stack({name: tensors[f"{c}/{name}"] for name in image.shapes}) for c in clients])
    if image is None:
        raise SystemExit(f"{folder}: no updates there")
    return image, rounds


def flat(ratio: int) -> Iterator[tuple[str, TensorCode]]:
    """Those of flat tensors of about as many bytes; ternary takes H(density) + density bits a number."""
    if ratio == 16:
        yield "2 bits", tensor_code("blocks", 2, block=1024)
        return
    density = {64: 0.084, 32: 0.227}[ratio]
    for block in (4096, None):
        yield f"ternary {density:.1%}, {block or 'one'} block", tensor_code("ternary", density=density, block=block)
    if ratio == 64:
        yield "half of ternary 22.7%", tensor_code("ternary", density=0.227, part=0.5)
    yield f"sketch {32 / ratio:g}", tensor_code("sketch", ratio=32 / ratio)


def codes(image: Image, ratio: int, tables: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, Code]]:
    """Every codec that there is at this ratio."""
    size = 4 * image.count // ratio
    for name in get_args(Name):
        held = [kind for kind in tables if kind.partition(" ")[0] == name]
        if name == "none" or (name == "resnet" and (ratio != 64 or not held)) or (name == "sign" and ratio == 16):
            continue
        for kind in held or [name]:
            yield kind, code_of(name, ratio, image, tables.get(kind))
    yield from flat(ratio)
    for rank, bits in {64: ((1, 4), (1, 2), (2, 2)), 32: ((2, 4),), 16: ((4, 4),)}[ratio]:
        yield f"svd of each factor, rank {rank}, {bits} bits", FactorSvd(image, rank, bits, size)


def trained(seen: Sequence[Tensor], iterations: int, scale: Tensor) -> tuple[dict[str, Tensor], str]:
    """The published autoencoder after so many iterations, and its loss curve."""
    model = autoencoder.AutoEncoder.drawn(0)
    curve = autoencoder.fit(model, [x * scale for x in seen], iterations)
    marks = sorted({0, *(len(curve) * i // 6 for i in range(6)), len(curve) - 1})
    return autoencoder.tables_of(model, seen, scale), ", ".join(f"{i + 1}: {curve[i]:.3g}" for i in marks)


def main() -> None:
    """Fit, judge, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--late", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    console = Console(width=130)
    image, rounds = rounds_of(options.folder)
    early, late = rounds[: -options.late], rounds[-options.late :]
    seen = [x for updates in early for x in updates[: -options.clients]]
    judged = [updates[-options.clients :][:5] for updates in late]
    tables = {"components": codebooks.untrained(), "learned": codebooks.fit(image, seen[:: max(1, len(seen) // 28)])}
    if options.iterations:
        largest = max(float(x.abs().max()) for x in seen)
        for kind, scale in (("resnet (letter)", 1.0), ("resnet (scaled)", 0.95 / largest)):
            tables[kind], curve = trained(seen, options.iterations, torch.tensor([scale]))
            console.print(f"{kind}: loss {curve}")
    mean = torch.stack(seen).mean(0)
    others = [x for updates in judged for x in updates]
    pairs = [cosine(updates[i], updates[i - 1]) for updates in judged for i in range(len(updates))]
    console.print(
        f"{len(seen)} updates of {image.count} numbers seen, {len(others)} judged; "
        f"cosine of two clients' updates {sum(pairs) / len(pairs):.3f}; predictors: zero 0, "
        f"train mean {sum(cosine(mean, x) for x in others) / len(others):.3f}"
    )
    rows = []
    for ratio in (64, 32, 16):
        table = Table("codec", "bytes", "cosine", "mean of 5", "shifted", "error", title=f"1/{ratio} of float32")
        found: dict[str, Fidelity] = {}
        for name, code in codes(image, ratio, tables):
            found[name] = fidelity(code, judged)
            f = found[name]
            table.add_row(name, f"{f.bytes:,.0f}", *(f"{v:.3f}" for v in (f.cosine, f.mean, f.shifted, f.error)))
        console.print(table)
        for name, f in found.items():
            rows.append(Row(f"1/{ratio} {name}", f.cosine, found["eden"].cosine, "cosine"))
            rows.append(Row(f"1/{ratio} {name}, mean of 5", f.mean, found["eden"].mean, "cosine"))
    finish(rows)


if __name__ == "__main__":
    main()
