"""Many thin files over one base model in a talk, and thin files that a stranger has made."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Result, refused, thinwire
from tiny import BOS, CHOICES, tiny_folder, tiny_rows, write_jsonl

from thinwire import wire
from thinwire.assemble import thin as thin_file
from thinwire.assemble.thin import BASE, Shelf, Thin
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import to_tensor
from thinwire.keys import Key
from thinwire.model import numbers
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import AnyView, Filter, Lora, Tied

TARGETS = ("q_proj", "v_proj")
FILES: dict[str, tuple[AnyView, int]] = {  # a view and a seed
    "ward": (Tied(numbers=3000, targets=TARGETS), 0),
    "mill": (Tied(numbers=3000, targets=TARGETS), 0),
    "few": (Tied(numbers=500, rank=2, targets=TARGETS), 1),
    "weights": (Tied(numbers=3000, over="weights"), 0),
    "factors": (Lora(rank=2, targets=TARGETS), 0),
    "parted": (Lora(rank=2, targets=TARGETS, keep=("*.B",)), 0),
    "norms": (Filter(), 0),
}
SHOWN = json.dumps({"prompt": "{input}: it was", "answer": " {output}", "choices": CHOICES, "max_length": 64})


def make(model: Path, view: AnyView, seed: int, bits: int = 8, dtype: str = "bfloat16", draw: int = 0) -> Thin:
    """A thin file of numbers drawn at random."""
    key = Key.root(seed)
    net = Net.open(str(model), dtype, view=view, view_key=key.fold(view.kind))
    change = 0.3 * torch.randn(net.size, generator=torch.Generator().manual_seed(draw))
    levels = to_tensor(Blocks(bits, 1024).encode(change, 0))
    base, text = numbers.digest(net), view.model_dump_json()
    return Thin(str(model), base, dtype, text, seed, SHOWN, None, bits, 1024, levels, None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("thin")
    model = tiny_folder(place / "model")
    for draw, (name, (view, seed)) in enumerate(FILES.items()):
        thin_file.write(place / f"{name}.thin", make(model, view, seed, draw=draw))
    return place


def spoken(*args: str | Path, text: str) -> Result:
    """`thinwire chat` that is given `text` through a pipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        return thinwire("chat", *args)


def seen(net: Net) -> torch.Tensor:
    """What the model computes."""
    with torch.inference_mode():
        return net.model(torch.tensor([[BOS, *b"amber birch"]])).logits.clone()


def test_each_file_computes_what_it_does_alone_and_the_base_is_untouched(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Net.open(str(place / "model"), "bfloat16")
    start = {name: p.detach().clone() for name, p in plain.parameters()}
    untouched = seen(plain)
    alone = {name: seen(thin_file.opened(place / f"{name}.thin")[0]) for name in FILES}
    loads: list[Any] = []
    inner = thin_file.load

    def counted(*args: Any) -> Any:
        loads.append(args)
        return inner(*args)

    monkeypatch.setattr(thin_file, "load", counted)
    shelf = Shelf([place / f"{name}.thin" for name in FILES])
    assert len(loads) == 1
    assert shelf.names == list(FILES)
    nets = {name: shelf.use(name)[0] for name in FILES}
    assert nets["ward"] is nets["mill"]
    places = [{p.data_ptr() for n, p in net.model.named_parameters() if "embed" in n} for net in nets.values()]
    assert all(here == places[0] for here in places)  # one copy of the weights in memory
    for name in (*FILES, *reversed(FILES)):
        net, _ = shelf.use(name)
        assert torch.equal(seen(net), alone[name]), name
        net, _ = shelf.use(BASE)
        assert torch.equal(seen(net), untouched), name
        mine = {n.replace(".base_layer.", "."): p for n, p in net.model.named_parameters()}
        for n, tensor in start.items():
            assert torch.equal(mine[n].view(torch.int16), tensor.view(torch.int16)), (name, n)  # also a zero's sign
    assert len({logits.numpy().tobytes() for logits in map(torch.Tensor.float, alone.values())}) == len(FILES)


def test_a_talk_switches_between_them(place: Path, tmp_path: Path) -> None:
    ward, mill = tmp_path / "ward.thin", tmp_path / "mill.thin"
    spoken_to = json.dumps({"prompt": "{input}: it was", "answer": " {output}"})
    for file, name in ((ward, "weights"), (mill, "ward")):
        thin_file.write(file, replace(thin_file.read(place / f"{name}.thin"), shown=spoken_to))
    line, short = "amber birch\n", "--max-new-tokens=4"
    alone = [spoken(path, short, text=line).out for path in (ward, mill)]
    base = spoken(ward, short, text="/use base\n" + line).out
    text = f"{line}/use mill\n{line}/use base\n{line}/use nobody\n/use\n/use ward\n{line}"
    found = spoken(ward, mill, short, text=text)
    assert found.code == 0
    assert found.out == alone[0] + alone[1] + base + alone[0]
    assert len({*alone, base}) > 1
    notes = found.err.splitlines()
    assert notes[:3] == [f"* ward: {ward}", f"  mill: {mill}", "  base: no file: the model alone"]
    assert "thinwire: no file is called nobody; there are: ward, mill, base" in notes
    assert [note for note in notes if note.endswith("answers")] == [
        f"thinwire: {name} answers" for name in ("mill", "base", "ward")
    ]


def test_each_is_scored_on_a_line_of_its_own(place: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(8, closed=True))
    rows, files = f"data.path={tmp_path / 'rows.jsonl'}", [place / f"{name}.thin" for name in ("ward", "weights")]
    alone = [thinwire("eval", file, rows) for file in files]
    found = thinwire("eval", *files, rows)
    assert (found.code, found.err) == (0, "")
    lines = [f"{file.stem}: {line}" for file, one in zip(files, alone, strict=True) for line in one.out.splitlines()]
    assert found.out.splitlines() == lines
    assert list(json.loads(thinwire("eval", *files, rows, "--json").out)) == ["ward", "weights"]


def test_preferences_are_scored_against_the_base(place: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": "never"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shown = json.dumps({"template": "completion", "loss": "dpo", "beta": 0.5, "max_length": 64})
    moved = replace(thin_file.read(place / "few.thin"), shown=shown)
    still = replace(moved, bits=0, block=0, levels=None, numbers=torch.zeros(500))
    for name, thin in (("moved", moved), ("still", still)):
        thin_file.write(tmp_path / f"{name}.thin", thin)
    files = [tmp_path / f"{name}.thin" for name in ("moved", "still")]
    found = json.loads(thinwire("eval", *files, f"data.path={tmp_path / 'pairs.jsonl'}", "--json").out)
    assert (found["still"][0]["loss"], found["still"][0]["accuracy"]) == (pytest.approx(math.log(2), abs=1e-6), 0)
    assert abs(found["moved"][0]["loss"] - math.log(2)) > 1e-4


def test_names_are_stems_made_unique(place: Path, tmp_path: Path) -> None:
    for name in ("ward", "base"):
        (tmp_path / f"{name}.thin").write_bytes((place / "ward.thin").read_bytes())
    shelf = Shelf([place / "ward.thin", tmp_path / "ward.thin", tmp_path / "base.thin"])
    assert shelf.names == ["ward", "ward-2", "base-2"]


def test_files_that_do_not_go_together_are_refused_before_the_talk(place: Path, tmp_path: Path) -> None:
    ward = place / "ward.thin"
    other = tiny_folder(tmp_path / "other", seed=5)
    view, seed = FILES["ward"]
    thin_file.write(tmp_path / "elsewhere.thin", make(other, view, seed))
    thin_file.write(tmp_path / "float.thin", make(place / "model", view, seed, dtype="float32"))
    thin_file.write(tmp_path / "classes.thin", replace(thin_file.read(ward), classes=["a", "b"]))
    thin_file.write(tmp_path / "short.thin", replace(thin_file.read(ward), levels=None, numbers=torch.zeros(2999)))
    (tmp_path / "cut.thin").write_bytes(ward.read_bytes()[:-9])
    for second, why in (
        (tmp_path / "elsewhere.thin", f"{tmp_path}/elsewhere.thin: it is of another base model"),
        (tmp_path / "float.thin", "another dtype than"),
        (tmp_path / "classes.thin", "another classes than"),
        (tmp_path / "cut.thin", f"{tmp_path}/cut.thin: no thin file"),
        (tmp_path / "short.thin", "does not have the 3,000 numbers of its view"),
        (tmp_path / "none.thin", f"{tmp_path}/none.thin: No such file"),
        (ward, f"{ward}: the file is there twice"),
        (tmp_path, f"{tmp_path}: Is a directory"),
    ):
        assert why in refused("chat", ward, second)


def packed(found: Thin, **fields: Any) -> bytes:
    return bytes(wire.encode(replace(found, **fields)))


def bfloat16_nan(levels: torch.Tensor) -> torch.Tensor:
    """The levels under a scale that is no number."""
    wrong = levels.clone()
    wrong[:2] = torch.tensor([0xC0, 0x7F], dtype=torch.uint8)
    return wrong


def bfloat16_inf(levels: torch.Tensor) -> torch.Tensor:
    wrong = levels.clone()
    wrong[:2] = torch.tensor([0x80, 0x7F], dtype=torch.uint8)
    return wrong


Make = Callable[[Thin, bytes], bytes]


def on_levels(hand: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    """With a hand on the levels."""

    def make(found: Thin, _: bytes) -> bytes:
        assert found.levels is not None
        return packed(found, levels=hand(found.levels))

    return make


LONG = "x" * (1 << 20)
STRANGE: dict[str, Make] = {
    "numbers of 2^31": lambda f, _: packed(f, view=f.view.replace("3000", str(1 << 31))),
    "the most numbers that a view has": lambda f, _: packed(f, view=f.view.replace("3000", str(1 << 24))),
    "a huge rank": lambda f, _: packed(f, view='{"kind": "lora", "rank": 1000000000, "targets": ["q_proj"]}'),
    "the largest rank": lambda f, _: packed(f, view='{"kind": "lora", "rank": 16, "targets": ["q_proj"]}'),
    "all weights": lambda f, _: packed(f, view='{"kind": "full"}'),
    "a part that nothing is": lambda f, _: packed(f, view='{"kind": "full", "keep": ["nothing"]}'),
    "a million targets": lambda f, _: packed(f, view='{"kind": "lora", "targets": [' + '"q_proj",' * 200000 + '"a"]}'),
    "a view as deep as it is long": lambda f, _: packed(f, view="[" * 200000),
    "a long view": lambda f, _: packed(f, view=f.view + " " * (1 << 20)),
    "prompts as deep": lambda f, _: packed(f, shown="[" * 200000),
    "prompts deep within": lambda f, _: packed(f, shown='{"prompt": ' + "[" * 100000 + "]" * 100000 + "}"),
    "long prompts": lambda f, _: packed(f, shown=json.dumps({"prompt": LONG, "answer": LONG})),
    "a number beyond all": lambda f, _: packed(f, shown='{"max_length": ' + "9" * 5000 + "}"),
    "levels and numbers": lambda f, _: packed(f, numbers=torch.zeros(3000)),
    "no bits": lambda f, _: packed(f, bits=0),
    "nine bits": lambda f, _: packed(f, bits=9),
    "other bits": lambda f, _: packed(f, bits=4),
    "negative bits": lambda f, _: packed(f, bits=-8),
    "a huge block": lambda f, _: packed(f, block=1 << 40),
    "a block of one": lambda f, _: packed(f, block=1),
    "levels that are cut": on_levels(lambda x: x[:-1]),
    "levels that go on": on_levels(lambda x: torch.cat([x, x])),
    "levels of floats": on_levels(torch.Tensor.float),
    "levels in a table": on_levels(lambda x: x.view(2, -1)),
    "a scale that is no number": on_levels(bfloat16_nan),
    "a scale without end": on_levels(bfloat16_inf),
    "a level that is none": on_levels(lambda x: torch.cat([x[:-1], torch.full((1,), 255).byte()])),
    "numbers beyond all": lambda f, _: packed(f, levels=None, numbers=torch.full((3000,), 1e38)),
    "numbers of another dtype": lambda f, _: packed(f, levels=None, numbers=torch.zeros(3000).double()),
    "a negative seed": lambda f, _: packed(f, seed=-1),
    "another seed": lambda f, _: packed(f, seed=(1 << 64) - 1),
    "no classes": lambda f, _: packed(f, classes=[]),
    "one class twice": lambda f, _: packed(f, classes=["a", "a"]),
    "a million classes": lambda f, _: packed(f, classes=[str(i) for i in range(1 << 20)]),
    "a base with a zero in its name": lambda f, _: packed(f, model="a\0b"),
    "a base with a long name": lambda f, _: packed(f, model="/" + "a" * 5000),
    "a base with no name": lambda f, _: packed(f, model=""),
    "bytes at the end": lambda _, b: b + b"\0" * 16,
    "another version": lambda _, b: b[:3] + b"\2" + b[4:],
    "another kind": lambda _, b: b.replace(b"Thin", b"Fat!", 1),
    "a header beyond the file": lambda _, b: b[:4] + b"\xff\xff\xff\x7f" + b[8:],
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_stranger_makes_is_one_line(name: str, place: Path, tmp_path: Path) -> None:
    file, ward = tmp_path / "strange.thin", place / "ward.thin"
    body = STRANGE[name](thin_file.read(ward), ward.read_bytes())
    if "bytes" in name or "another" in name or "header" in name:  # whose checksum is right all the same
        import xxhash

        body = body[:-8] + xxhash.xxh3_64(body[:-8]).intdigest().to_bytes(8, "little")
    file.write_bytes(body)
    result = spoken(file, text="amber\n")
    assert (result.code, result.err.count("\n"), result.out) == (2, 1, ""), result
    assert len(result.err) < 500
    assert str(file) in result.err or "a base" in name, result.err
    assert "Traceback" not in result.err


CLAIMS = {
    "numbers": {"view": '{"kind": "tied", "numbers": 16777216}'},
    "rank": {"view": '{"kind": "lora", "rank": 16, "targets": ["q_proj"]}'},
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_size_that_is_only_claimed_is_never_made(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(thin_file.read(place / "ward.thin"), **CLAIMS[name])
    thin_file.write(place / "claimed.thin", found)

    def made(*_: Any, **__: Any) -> Any:
        raise AssertionError("what the header claims was made")

    monkeypatch.setattr(thin_file.Net, "over", made)
    with pytest.raises(ModelError, match="does not have the"):
        thin_file.opened(place / "claimed.thin")
    (place / "claimed.thin").unlink()
