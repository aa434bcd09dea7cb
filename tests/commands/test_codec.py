"""thinwire fit-codec, from a run file to a run that takes what it made."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire import cli
from thinwire.compress.learned import codec_file


def thinwire(*args: str | Path) -> tuple[int, str, str]:
    """The command in this process, from its entry point on: status, stdout, stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["thinwire", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("main() returned")


def recipe(folder: Path, codec: str = "learned") -> Path:
    sides = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_folder(folder / "model", **sides)
    write_jsonl(folder / "rows.jsonl", tiny_rows(60))
    (folder / "run.toml").write_text(
        f"""
        rounds = 2
        threads = 1
        model = {{ path = "{folder / "model"}", lora = {{ rank = 8 }} }}
        data = {{ path = "{folder / "rows.jsonl"}", clients = 4, heldout = 4, max_length = 64 }}
        eval = {{ rows = 4, batch_size = 4 }}
        [method]
        name = "cgfed"
        codec = "{codec}"
        artefact = "{folder / "codec.safetensors"}"
        spared = 0.3
        lr = 1e-2
        steps = 2
        batch_size = 2
        """
    )
    return folder / "run.toml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and the codec that was fitted for it; report.json is what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    status, out, err = thinwire("fit-codec", recipe(folder), "--json", "--snapshots", folder / "seen")
    assert status == 0, err
    (folder / "report.json").write_text(out)
    return folder


def test_the_report_has_the_controls_and_the_bytes(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    updates = load_file(made / "seen" / "round-0002.safetensors")
    raw = sum(t.numel() for t in updates.values())  # of four clients, 4 bytes a number
    assert {name.partition("/")[0] for name in updates} == {"0", "1", "2", "3"}
    assert 8 * raw < report["gathered_bytes_up"] < 8 * (raw + 4000)
    assert report["snapshots"] == 3  # of the last client and the last round none
    assert report["heldout_cosine"] > report["heldout_shifted"] + 0.2
    assert report["heldout_bytes"] <= raw / 64
    assert {"train_mean_cosine", "zero_cosine", "eden_cosine", "heldout_mean", "codec_bytes"} <= set(report)


def test_a_run_takes_what_was_fitted(made: Path) -> None:
    status, _, err = thinwire("run", made / "run.toml", "--out", made / "out")
    assert status == 0, err
    lines = [json.loads(line) for line in (made / "out" / "rounds.jsonl").read_text().splitlines()]
    assert lines[-1]["metrics"]["cosine"] > 0.5
    size = json.loads((made / "report.json").read_text())["codec_bytes"]
    assert lines[0]["bytes_down"] > lines[1]["bytes_down"] + 4 * size - 8000  # all four are newcomers once


def test_another_rank_is_refused_with_both_fingerprints(made: Path) -> None:
    status, _, err = thinwire("run", made / "run.toml", "model.lora.rank=4", "--out", made / "other")
    assert (status, err.count("\n")) == (2, 1)
    assert "method.artefact" in err
    assert "rank 8" in err
    assert "rank 4" in err


def test_the_published_autoencoder(tmp_path: Path) -> None:
    file = recipe(tmp_path, "resnet")
    status, out, err = thinwire("fit-codec", file, "--iterations", "3", "--scaling", "largest", "--local")
    assert status == 0, err
    assert "loss_curve" in out
    found = codec_file.read(tmp_path / "codec.safetensors")
    assert found.kind == "resnet"
    assert sum(t.numel() for n, t in found.tensors.items() if n.endswith(("weight", "bias"))) == 246_785 + 246_698
    assert torch.isfinite(found.tensors["range"]).all()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("method.name=fedavg", "method.name"),
        ("method.spared=0.0", "method.spared"),
        ("method.codec=eden", "method.codec"),
        ("rounds=1", "rounds"),
        ("data.clients=2", "rounds"),
    ],
)
def test_what_cannot_be_is_reported_in_one_line(change: str, field: str, made: Path) -> None:
    status, _, err = thinwire("fit-codec", made / "run.toml", change, "--out", made / "never")
    assert (status, err.count("\n")) == (2, 1), err
    assert field in err
    assert not (made / "never").exists()


def test_a_place_that_is_not_there(made: Path) -> None:
    status, _, err = thinwire("fit-codec", made / "run.toml", "--out", made / "no" / "codec")
    assert (status, err.count("\n")) == (2, 1)
    assert "there is no folder" in err
