"""The run's start model, and the classes that it distinguishes where it is a classifier."""

from __future__ import annotations

from pathlib import Path

import torch

from thinwire import config
from thinwire.assemble.rows import Rows, in_words, template_of
from thinwire.config import ConfigError, Run
from thinwire.data.classes import classes_of as find_classes
from thinwire.keys import Key
from thinwire.model import autocast
from thinwire.model.classifier import Task, labels_of, task_of
from thinwire.model.embedder import check_pooling
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.resolve import resolve
from thinwire.runtime.cohort import check
from thinwire.train.parallel import ask_shards, device_of


def _task(run: Run, folder: Path) -> Task:
    """What the run's model in a folder is for; ConfigError where its rows are of something else."""
    task = task_of(folder, run.task)
    if task == "classification" and run.data.loss == "dpo":
        raise ConfigError(f'data.loss: "dpo" is of answers in words, and {run.model.path} is a classifier')
    return task


def classes_of(run: Run, folder: Path) -> tuple[str, ...] | None:
    """The classes of the run's classifier in a folder, in the model's order; None if the model is causal.

    Nor has one of embeddings any. They are those of the model, or data.choices for a fresh head; ConfigError where the
    two differ, or none is there.
    """
    if _task(run, folder) != "classification":
        return None
    own, wanted = labels_of(folder), run.data.choices
    if own is None and wanted is None:
        raise ConfigError(f"data.choices: missing; {run.model.path} gets a new head, so list its classes")
    if own is None or wanted is None:
        return own or wanted
    if set(own) == set(wanted):
        return own
    if len(own) != len(wanted) or own != tuple(map(str, range(len(own)))):
        raise ConfigError(f"data.choices: the classes of the model in {run.model.path} are {', '.join(own)}")
    return wanted  # its classes have numbers and no names


def check_clients(run: Run, clients: int) -> None:
    """ConfigError where so many clients cannot make the run's rounds, or a gate has no rows to measure losses on."""
    check(run.cohort, run.method, clients)
    if run.method.measures and run.data.public is None:
        raise ConfigError("data.public: missing; method.aggregation measures losses on rows that the server holds")


def settled(run: Run, rows: Rows) -> Run:
    """The run with the classes of a fresh classifier found in the clients' rows, unless it lists them itself.

    ConfigError for a cohort, or a field of the method, of clients that have no rows, and for rounds of too few clients.
    """
    if not rows.clients:  # a server of a federation has nobody's rows
        return run
    check_clients(run, len(rows.clients))
    folder = resolve(run.model.path)
    fresh = _task(run, folder) == "classification" and labels_of(folder) is None
    if not fresh or run.data.choices is not None:
        return run
    held = [row for rows in rows.clients.values() for row in in_words(run.data, rows)]
    found = find_classes(held, template_of(run.data, True))
    return run.model_copy(update={"data": run.data.model_copy(update={"choices": found})})


def net_of(run: Run, remember: bool = False, hollow: bool = False) -> Net:
    """The run's start model in memory (unless hollow), in the run's view.

    ModelError: there is no such model, or the method cannot train it.
    """
    model = run.model
    if hollow and run.method.hollow and model.view.kind != "full":
        name = config.method_name(run.method)
        raise ModelError(
            f"model.{'lora' if model.lora else 'view'}: a client of {name} has no weights in memory to train a view of"
        )
    if model.view.keep and not run.method.keeps:
        raise ModelError(f"model.view.keep: {config.method_name(run.method)} trains nothing that stays at its clients")
    if run.data.pack and model.view.front:
        raise ConfigError("data.pack: a prompt stands in front of a row, and not of each of its examples; leave it out")
    folder = resolve(model.path)
    if embeds := run.task == "embedding":
        check_pooling(folder)
        if run.method.hollow:
            name = config.method_name(run.method)
            raise ConfigError(
                f'data.loss: "contrastive" is of whole encoders, and a client of {name} has a smaller one'
            )
    net = Net.open(
        folder,
        model.dtype,
        remember=remember,
        device=device_of(model.device),
        view=model.view,
        view_key=Key.root(run.seed).fold(model.view.kind),
        hollow=hollow,
        classes=classes_of(run, folder),
        head_key=Key.root(run.seed).fold("head"),
        bits=model.bits,
        embeds=embeds,
    )
    autocast.round_products(net.model, model.autocast)
    if model.shards and len(kinds := {p.dtype for _, p in net.trained()}) > 1:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ConfigError(f"model.shards: what is trained has to be of one dtype, and here is {found}")
    ask_shards(net.model, model.shards)
    run.method.fits(net)
    return net


def use_threads(run: Run) -> None:
    """Let torch, and the kernels with it, use as many threads as the run sets."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
