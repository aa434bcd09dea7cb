"""The model card of a run: README.md beside the weights. It describes the data and never shows any of it."""

from __future__ import annotations

import statistics
from typing import Any

import tomli_w

from thinwire import __version__
from thinwire.assemble.rows import Rows
from thinwire.config import Run, method_name
from thinwire.config.schema import without_none
from thinwire.privacy.released import in_words
from thinwire.records import SCORES


def card(run: Run, rows: Rows, summary: dict[str, Any], classes: tuple[str, ...] | None = None) -> str:
    """The text of the card: front matter that the hub reads, then method, data, bytes and scores.

    Neither rows nor the names of clients or files are in it; `summary` is that of the run.
    """
    held = [len(rows) for rows in rows.clients.values()]
    task = "text-generation" if classes is None else "text-classification"
    if run.data.loss == "contrastive":
        task = "sentence-similarity"
    name = run.model.path.rstrip("/").rpartition("/")[2]
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        "tags: [thinwire, federated-learning]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"{name}, fine-tuned where the data lie, with [thinwire](https://github.com/thinwire/thinwire) {__version__}.",
        "",
        "## Method",
        "",
        f"{method_name(run.method)} ({type(run.method).paper or 'no paper'}), {summary['rounds']} rounds, "
        f"seed {run.seed}, {summary['parameters']:,} trained parameters of {run.model.dtype}.",
        "",
        "```toml",
        tomli_w.dumps(without_none(run.method.model_dump(mode="json"))).strip(),
        "```",
        "",
    ]
    if (kept := summary.get("kept")) is not None:
        lines += [
            f"The weights are those of round {kept['round']}, which the loss on {kept['on']} rows has chosen.",
            "",
        ]
    if run.model.view.factors is not None:
        alone = "they stand alone in `adapter/`, for peft"
        if run.method.moves_base:
            alone = "the weights below them have changed too, so that there is no adapter for the start model"
        lines += [f"The LoRA factors are merged into these weights; {alone}.", ""]
    if run.model.view.front:
        alone = "These weights are the start model's: the prompt in front of every row stands in `adapter/`"
        lines += [f"{alone}. Without it they know nothing of what was trained.", ""]
    if (promised := summary.get("privacy")) is not None:
        counted = [f"- {line}" for line in promised["not_counted"]]
        lines += ["## Privacy", "", f"{in_words(promised)}.", "", "Not counted in it:", "", *counted, ""]
    lines += [
        "## Data",
        "",
        (
            f"{sum(held):,} rows with {len(held):,} clients: {min(held):,} to {max(held):,} each, "
            f"{statistics.median(held):,g} in the middle. No row has left its client; none is shown here."
            if held
            else "Rows at sites of their own, which no row has left; how many there are was not asked."
        ),
        "",
        f"- partition: {run.data.partition}"
        + (f", alpha {run.data.alpha:g}" if run.data.partition == "dirichlet" else ""),
        f"- at most {run.data.max_length} tokens a row",
    ]
    if classes is not None:
        lines.append(f"- classes: {len(classes)}, named in config.json")
    elif run.data.prompt is None and run.data.loss != "contrastive":
        lines.append(f"- template: {run.data.template}")
    if run.data.loss == "dpo":
        lines.append(f"- objective: DPO with beta {run.data.beta:g} against the start model")
    if run.data.loss == "contrastive":
        lines.append(f"- objective: the nearest of a batch's positives, scale {run.data.scale:g}; accuracy is recall@1")
        lines.append("- vectors: the mean over a text's tokens, of length 1; sentence-transformers reads the folder so")
    lines += [
        "",
        "## Bytes",
        "",
        "| way | bytes, all rounds and clients | times the model's size |",
        "| --- | ---: | ---: |",
        *(
            f"| {way} | {summary[f'bytes_{way}']:,} | {summary[f'bytes_{way}'] / max(1, summary['model_bytes']):.4g} |"
            for way in ("down", "up")
        ),
        "",
        "Each is the sum of the lengths of the frames that were sent.",
        "",
        "## Scores",
        "",
        "| held-out rows | score | before | after |",
        "| --- | --- | ---: | ---: |",
    ]
    first, final = ({row["split"]: row for row in summary[when]} for when in ("first", "final"))
    for split in {**first, **final}:  # sites that were absent at an end have no row there
        before, after = first.get(split, {}), final.get(split, {})
        scored = f"{split} ({(after or before)['rows']:,} rows)"
        for field, score in SCORES.items():
            if before.get(field) is not None or after.get(field) is not None:
                lines.append(f"| {scored} | {score.title} | {_cell(before.get(field))} | {_cell(after.get(field))} |")
    return "\n".join([*lines, ""])


def _cell(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"
