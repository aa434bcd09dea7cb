"""What a server and its sites compare before a run: also what a chat template writes."""

from __future__ import annotations

import pytest
from silos import Silos

from thinwire import assemble, config
from thinwire.data import rendering
from thinwire.federation.fingerprint import difference, fingerprints


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def test_a_template_that_writes_something_else_is_another_prompt(silos: Silos, monkeypatch: pytest.MonkeyPatch) -> None:
    run = silos.run({"name": "fedavg", "lr": 1e-3})
    data = config.Data(path=run.data.path, template="chat")
    talking, net = run.model_copy(update={"data": data}), assemble.net_of(run)
    net.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{{ strftime_now('%Y') }}{{ m.content }}{% endfor %}"
    )
    before = fingerprints(talking, net), fingerprints(run, net)
    assert before == (fingerprints(talking, net), fingerprints(run, net))
    monkeypatch.setattr(rendering, "CLOCK", rendering.CLOCK.replace(year=2031))
    reason = difference(fingerprints(talking, net), before[0])
    assert reason is not None
    assert reason.startswith("prompt template: ")
    assert difference(fingerprints(run, net), before[1]) is None


def test_how_preferences_are_read_is_part_of_the_prompt(silos: Silos) -> None:
    run = silos.run({"name": "fedavg", "lr": 1e-3})
    net = assemble.net_of(run)
    found = []
    for fields in ({}, {"loss": "dpo"}, {"loss": "dpo", "beta": 0.2}):
        data = config.Data(path=run.data.path, template="completion", **fields)
        found.append(fingerprints(run.model_copy(update={"data": data}), net))
    for one, other in ((0, 1), (1, 2)):
        reason = difference(found[one], found[other])
        assert reason is not None
        assert reason.startswith("prompt template: ")
