"""What a policy calls the way in which rows are shown."""

from __future__ import annotations

from typing import Any

from thinwire.config import Data
from thinwire.federation.policy import task_of


def data(**fields: Any) -> Data:
    return Data(path="rows.jsonl", **fields)


def test_each_format_string_of_a_run_is_part_of_what_a_site_allows() -> None:
    own = {"prompt": "{a}", "answer": "{b}"}
    found = [data(template="chat"), data(**own), data(**{**own, "answer": "{secret}"})]
    found += [data(**own, loss="dpo", rejected=rejected) for rejected in ("{c}", "{secret}")]
    assert len({task_of(each) for each in found}) == len(found)
    assert task_of(found[0]) == task_of(data(template="chat", loss="dpo")) == "chat"
