"""CG-FedLLM: the published equations, the gate, the codec's delivery, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_net
from tiny import tiny_encoder

from thinwire import wire
from thinwire.compress.learned import codebooks, codec_file
from thinwire.compress.learned.codec_file import Artefact
from thinwire.keys import Key
from thinwire.methods.cgfed import CGFed, Coded, alike
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.tgap import Tgap
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.views import Lora
from thinwire.train.local import Local
from thinwire.train.weights import fill

LOCAL: dict[str, Any] = {"lr": 1e-2, "steps": 3, "batch_size": 4}
HIDDEN = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def view(folder: Path, rank: int = 8) -> Net:
    view = Lora(rank=rank, alpha=16.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    return Net.open(str(folder), view=view)


@pytest.fixture(scope="module")
def net(folder: Path) -> Net:
    tiny_net(folder, **HIDDEN)
    return view(folder)


@pytest.fixture(scope="module")
def file(net: Net, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learned codec made from the replies of the first stage."""
    federation = Federation(Tgap(**LOCAL, spared=0.5), net, tmp_path_factory.mktemp("tgap"))
    image = CGFed(codec="none").image(net)
    seen = []
    for round in range(1, 3):
        for id in range(3):
            down = federation.method.broadcast(federation.state, federation.server(round, (id,)), id, None)
            up = federation.method.client_update(down, federation.client(id, round))
            seen.append(image.stack(up.update))
        federation.step()
    tables = codebooks.fit(image, seen, most=1 << 12, rounds=1)
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    codec_file.write(path, Artefact("learned", codec_file.fingerprint(net.model, image), tables))
    return path


def factors(federation: Federation) -> torch.Tensor:
    return torch.cat([t.flatten().float() for t in federation.state.weights.values()])


def test_no_codec_on_states_is_fedavg_bit_for_bit(net: Net, tmp_path: Path) -> None:
    plain = Federation(FedAvg(**LOCAL), net, tmp_path / "plain").run(3)
    coded = Federation(CGFed(**LOCAL, codec="none", encode="state"), net, tmp_path / "coded").run(3)
    assert torch.equal(factors(plain), factors(coded))


def test_no_codec_on_increments_is_fedavg_but_for_rounding(net: Net, tmp_path: Path) -> None:
    plain = Federation(FedAvg(**LOCAL), net, tmp_path / "plain").run(1)
    coded = Federation(CGFed(**LOCAL, codec="none"), net, tmp_path / "coded").run(1)
    assert float((factors(plain) - factors(coded)).norm() / factors(plain).norm()) < 1e-6


def test_the_gradient_is_one_step_of_sgd_for_one_batch(net: Net, tmp_path: Path) -> None:
    fields = LOCAL | {"steps": 1, "lr": 0.1, "clip": 0.0}
    plain = Federation(FedAvg(**fields, optimiser="sgd"), net, tmp_path / "plain").run(2)
    coded = Federation(CGFed(**fields, codec="none", encode="gradient"), net, tmp_path / "coded").run(2)
    torch.testing.assert_close(factors(plain), factors(coded), rtol=1e-5, atol=1e-7)
    assert not torch.equal(factors(coded), torch.cat([net.base[n].flatten() for n in net.names]))


def test_the_literal_sum_moves_by_the_clients_times_the_mean(net: Net, tmp_path: Path) -> None:
    start = torch.cat([net.base[n].flatten() for n in net.names])
    fields = LOCAL | {"weighting": "uniform", "codec": "none"}
    mean = Federation(CGFed(**fields), net, tmp_path / "mean").run(1)
    total = Federation(CGFed(**fields, average="sum"), net, tmp_path / "sum").run(1)
    torch.testing.assert_close(factors(total) - start, 3 * (factors(mean) - start), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("codec", ["eden", "powersgd", "topk", "svd", "sign", "qsgd", "components"])
def test_each_codec_moves_the_factors_the_right_way(codec: Any, net: Net, tmp_path: Path) -> None:
    start = torch.cat([net.base[n].flatten() for n in net.names])
    plain = Federation(CGFed(**LOCAL, codec="none"), net, tmp_path / "plain").run(1)
    coded = Federation(CGFed(**LOCAL, codec=codec, ratio=32, gate=0), net, tmp_path / "coded")
    at = coded.step()
    assert alike(factors(plain) - start, factors(coded) - start) > 0.3
    raw = 4 * start.numel()
    assert all(0.7 * raw / 32 < visit.bytes_up < 1.1 * raw / 32 + 200 for visit in at.visits.values())


def test_the_learned_codec_and_its_delivery(net: Net, file: Path, tmp_path: Path) -> None:
    method = CGFed(**LOCAL, codec="learned", artefact=str(file), spared=0.5, gate=0)
    federation = Federation(method, net, tmp_path)
    first, second = federation.step((0, 1)), federation.step((0, 2))
    tables = sum(t.numel() * t.element_size() for t in codec_file.read(file).tensors.values())
    raw = 4 * factors(federation).numel()
    for visit in (first.visits[0], first.visits[1], second.visits[2]):  # newcomers
        assert raw + tables < visit.bytes_down < raw + tables + 4000
    assert raw < second.visits[0].bytes_down < raw + 4000
    assert federation.metrics["cosine"] > 0.6
    assert federation.metrics["alike"] < 0.9
    assert all(visit.bytes_up < raw / 64 + 200 for visit in second.visits.values())


def test_a_client_that_lost_the_codec_is_asked_once_more(net: Net, file: Path, tmp_path: Path) -> None:
    federation = Federation(CGFed(**LOCAL, codec="learned", artefact=str(file)), net, tmp_path)
    federation.step()
    for path in federation.versions.folder.glob("*.safetensors"):
        path.unlink()
    at = federation.step()
    assert all(visit.error is None for visit in at.visits.values())
    assert at.ledger.sent[0] > 2 * 4 * factors(federation).numel()  # both frames are counted


def test_below_the_gate_eden_travels_at_the_same_bytes(net: Net, tmp_path: Path) -> None:
    shut = Federation(CGFed(**LOCAL, codec="topk", gate=1.0), net, tmp_path / "shut")
    at = shut.step()
    eden = Federation(CGFed(**LOCAL, codec="eden", gate=0), net, tmp_path / "eden")
    other = eden.step()
    assert shut.metrics["fallbacks"] == 3
    assert eden.metrics["fallbacks"] == 0
    assert torch.equal(factors(shut), factors(eden))
    assert at.visits[0].bytes_up == other.visits[0].bytes_up
    assert shut.metrics["cosine"] < 0.6


def test_an_update_beyond_what_the_codec_was_trained_on_goes_by_eden(net: Net, file: Path, tmp_path: Path) -> None:
    made = codec_file.read(file)
    codec_file.write(
        tmp_path / "far", Artefact(made.kind, made.fingerprint, {**made.tensors, "range": torch.tensor([1e6, 1e7])})
    )
    federation = Federation(CGFed(**LOCAL, codec="learned", artefact=str(tmp_path / "far"), gate=0), net, tmp_path)
    at = federation.step()
    assert federation.metrics["fallbacks"] == 3
    assert all(visit.error is None for visit in at.visits.values())


@pytest.mark.parametrize("codec", ["eden", "powersgd", "sign"])
def test_error_feedback_at_the_clients(codec: Any, net: Net, tmp_path: Path) -> None:
    """What was sent and what is kept add up to what was learnt: on fixed factors, over rounds."""
    method = CGFed(**LOCAL, codec=codec, ratio=32, feedback=True, gate=0)
    federation, image = Federation(method, net, tmp_path), method.image(net)
    sent, wanted = torch.zeros(image.height, image.width), torch.zeros(image.height, image.width)
    for round in range(1, 5):
        client = federation.client(0, round)
        down = method.broadcast(federation.state, federation.server(round, (0,)), 0, None)
        up = method.client_update(down, client)
        learnt, _, _ = method.learn(down.weights, federation.client(0, round), down.lr, first=False)
        sent = sent + method._decoded(federation.state, up, image)
        wanted = wanted + image.stack(learnt)
        client.memory.commit()  # type: ignore[attr-defined]
    torch.testing.assert_close(sent + federation.client(0, 5).memory["residue"], wanted, rtol=1e-3, atol=1e-5)


def test_powersgd_starts_where_it_ended(net: Net, tmp_path: Path) -> None:
    federation = Federation(CGFed(**LOCAL, codec="powersgd", ratio=32, gate=0), net, tmp_path)
    federation.run(1)
    basis = federation.client(0, 2).memory["basis"]
    assert basis.shape[0] == federation.method.image(net).width  # type: ignore[attr-defined]


def test_a_coded_downlink(net: Net, tmp_path: Path) -> None:
    federation = Federation(CGFed(**LOCAL, downlink="coded", ratio=16), net, tmp_path, rounds=5)
    raw = 4 * factors(federation).numel()
    first, second = federation.step((0, 1)), federation.step((0, 2))
    assert first.visits[0].bytes_down > raw  # a newcomer
    assert second.visits[2].bytes_down > raw
    assert raw / 17 < second.visits[0].bytes_down < raw / 16 + 1500
    federation.step((0, 1, 2))
    method, state = federation.method, federation.state
    client = federation.client(0, 4)
    method.receive(method.broadcast(state, federation.server(4, (0,)), 0, federation.held[0]), client)
    got = torch.cat([p.detach().flatten() for _, p in net.parameters()])
    assert torch.equal(got, factors(federation))


def test_the_server_keeps_what_the_coded_downlink_loses(net: Net, tmp_path: Path) -> None:
    start = torch.cat([net.base[n].flatten() for n in net.names])
    coded = Federation(CGFed(**LOCAL, codec="none", downlink="coded", ratio=16), net, tmp_path / "coded").run(1)
    raw = Federation(CGFed(**LOCAL, codec="none"), net, tmp_path / "raw").run(1)
    image = CGFed(codec="none").image(net)
    order = image.unstack(coded.state.residue)
    kept = torch.cat([order[name].flatten() for name in net.names])
    torch.testing.assert_close(factors(coded) + kept, factors(raw), rtol=1e-4, atol=1e-6)
    assert not torch.equal(factors(coded), start)


def test_the_bound_clips_what_is_sent(net: Net, tmp_path: Path) -> None:
    start = torch.cat([net.base[n].flatten() for n in net.names])
    federation = Federation(CGFed(**LOCAL, codec="none", bound=1e-3), net, tmp_path).run(1)
    assert 0 < float((factors(federation) - start).norm()) < 1.001e-3


def test_the_two_stages_share_the_rows_out(net: Net, tmp_path: Path) -> None:
    federation = Federation(CGFed(**LOCAL), net, tmp_path)
    seen: dict[bool, set[Any]] = {}

    def spy(self: Any, client: Any, lr: float) -> Local:
        seen[len(seen) == 0] = {id(e) for e in client.data.examples}
        return Local(0.0, 0, [])

    method = CGFed(**LOCAL, spared=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CGFed, "train", spy)
        for first in (True, False):
            method.learn(federation.state.weights, federation.client(2, 1), 1e-3, first)
    whole = {id(e) for e in federation.data[2].examples}
    assert seen[True] | seen[False] == whole
    assert not seen[True] & seen[False]
    assert len(seen[True]) == round(0.3 * len(whole))


def test_stage_one_with_and_without_federation(net: Net, tmp_path: Path) -> None:
    together = Federation(Tgap(**LOCAL), net, tmp_path / "a").run(2)
    apart = Federation(Tgap(**LOCAL, federated=False), net, tmp_path / "b").run(2)
    start = torch.cat([net.base[n].flatten() for n in net.names])
    assert not torch.equal(factors(together), start)
    assert torch.equal(factors(apart), start)
    assert set(apart.client(0, 3).memory) == set(net.names)
    raw = 4 * start.numel()
    assert raw < together.history[0].visits[0].bytes_up < raw + 4000  # counted as any other reply


def test_an_artefact_for_another_rank_is_refused_with_both_fingerprints(
    folder: Path, file: Path, net: Net, tmp_path: Path
) -> None:
    other = view(folder, rank=4)
    method = CGFed(codec="learned", artefact=str(file))
    with pytest.raises(ModelError, match=r"rank 8, packed .* this run has .* rank 4, packed"):
        Federation(method, other, tmp_path)
    with pytest.raises(ModelError, match=r"layout.*codec|paper"):
        Federation(CGFed(codec="learned", artefact=str(file), layout="paper"), net, tmp_path)
    with pytest.raises(ModelError, match="is of the codec learned, not resnet"):
        Federation(CGFed(codec="resnet", artefact=str(file)), net, tmp_path)
    with pytest.raises(ModelError, match=r"method\.artefact: cannot read"):
        Federation(CGFed(codec="learned", artefact=str(tmp_path / "no")), net, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codec": "learned"}, "artefact"),
        ({"codec": "resnet", "artefact": "x", "ratio": 32}, "ratio"),
        ({"codec": "sign", "ratio": 16}, "ratio"),
        ({"feedback": True, "encode": "state"}, "feedback"),
        ({"average": "sum", "downlink": "coded"}, "average"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CGFed(**fields)


def test_a_view_of_other_than_factors_alone_is_refused(folder: Path, net: Net, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.lora: missing; cgfed codes"):
        CGFed().fits(tiny_net(folder))
    view = Lora(rank=2, alpha=4.0, targets=("query",))
    encoder = str(tiny_encoder(tmp_path / "encoder"))
    head = Net.open(encoder, view=view, classes=("one", "other"), head_key=Key.root(0))
    with pytest.raises(ModelError, match=r"^model\.lora: cgfed codes factors alone, .*head too: classifier\.weight$"):
        CGFed().fits(head)
    CGFed().fits(net)


@pytest.mark.parametrize("damage", ["shorter", "cosine", "scale", "float"])
def test_bad_codes_are_dropped(damage: str, net: Net, file: Path, tmp_path: Path) -> None:
    def tamper(client: int, frame: wire.Frame) -> wire.Frame:
        if client != 1:
            return frame
        header, up = frame.header(), wire.decode(Coded, frame)
        code = up.code.clone()
        if damage == "scale":
            code[:4] = torch.tensor([0, 0, 128, 127], dtype=torch.uint8)  # infinity
        up = {
            "shorter": replace(up, code=code[:-1]),
            "cosine": replace(up, cosine=float("nan")),
            "scale": replace(up, code=code),
            "float": replace(up, code=code.float()),
        }[damage]
        return wire.encode(up, run=header.run, round=header.round, client=1, held=header.held)

    federation = Federation(CGFed(**LOCAL, codec="learned", artefact=str(file)), net, tmp_path, tamper=tamper)
    at = federation.step()
    assert "Illegal" in str(at.visits[1].error)
    assert at.visits[0].error is None


def test_a_step_from_a_version_that_is_gone(net: Net, tmp_path: Path) -> None:
    federation = Federation(CGFed(**LOCAL, downlink="coded", ratio=16), net, tmp_path)
    federation.run(2)
    for path in federation.versions.folder.glob("*.safetensors"):
        path.unlink()
    at = federation.step()
    assert all(visit.error is None for visit in at.visits.values())
    fill(net, federation.state.weights)
