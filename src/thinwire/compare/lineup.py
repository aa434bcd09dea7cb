"""What is to be run under each name of a comparison, checked as far as it can be before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from thinwire import config
from thinwire.compare.budget import afford, check_rounds
from thinwire.compare.plan import PRESETS, Job, Plan, Settings, Tree, clients_of, first_cohort, merge
from thinwire.config import ConfigError
from thinwire.methods import METHODS


def load(path: Path, overrides: Sequence[str]) -> tuple[Tree, Settings]:
    """The tree of the run file without [compare], and that table; raises ConfigError."""
    tree = config.read(path, overrides)
    try:
        settings = Settings.model_validate(tree.pop("compare", {}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("compare", *first["loc"])))
        raise ConfigError(f"{path}: {place}: {first['msg']}, got {first['input']!r:.60}") from None
    return tree, settings


def plans(tree: Tree, settings: Settings, names: Sequence[str], control: bool) -> list[Plan]:
    """What is to be run under each name, checked as far as it can be before anything runs; raises ConfigError."""
    if settings.amount is not None and settings.budget in ("seconds", "bytes") and not settings.costs:
        raise ConfigError(f"compare.costs: a budget in {settings.budget} is bought at costs that are measured first")
    known = sorted({*PRESETS, *METHODS, *settings.methods})
    if not set(names) - {"base", "local"}:
        raise ConfigError("--methods: needs a method beside the base model and local training, whose runs score it")
    made: list[Plan] = []
    for name in names:
        if name not in known:
            raise ConfigError(f"--methods: {name!r} is not known; known: {', '.join(known)}")
        changes = PRESETS.get(name, {"method": {"name": name}} if name in METHODS else {})
        own = dict(settings.methods.get(name, {}))
        seeds = tuple(own.pop("seeds", settings.seeds))
        control_seeds = tuple(own.pop("control_seeds", settings.control_seeds or seeds))
        grid = tuple(own.pop("grid", settings.grid))
        mine = merge(merge(tree, changes), own)
        plan = Plan(name, mine, seeds, grid, settings.validation, settings.tuning_rounds)
        run = plan.run_of(seeds[0], None)
        plan.most, clients = run.rounds, clients_of(run)
        if name == "local":
            some = min(settings.alone or clients, clients)
            plan.clients = tuple(i * clients // some for i in range(some))
        elif name == "centralised":
            each = len(first_cohort(config.parse(tree | {"seed": seeds[0]}), clients))
            plan.tree = merge(mine, {"method": {"steps": run.method.model_dump()["steps"] * each}})
            plan.steps_of = each
        afford(plan, settings)
        made.append(plan)
        if control and control_seeds and name != "base":
            twin = copy.deepcopy(plan)
            # its curve is of no interest, so no round of it is chosen, and none ends it
            changes = {"data": {"shuffle_answers": True}, "eval": {"every": 0, "patience": 0, "keep": "last"}}
            twin.shuffled, twin.tree = True, merge(twin.tree, changes)
            for name in ("target", "on", "warmup"):
                twin.tree["eval"].pop(name, None)
            twin.seeds = control_seeds
            made.append(twin)
    check_rounds(made)
    return made


def check_models(made: Sequence[Plan]) -> None:
    """ModelError where a model is not to be had, or has no layers for the factors that some run puts beside them."""
    from thinwire.model.classifier import labels_of, task_of
    from thinwire.model.load import load
    from thinwire.model.resolve import resolve

    runs = [plan.run_of(plan.seeds[0], None) for plan in made]
    for model, wanted in dict.fromkeys((run.model, run.task) for run in runs):
        folder = resolve(model.path)
        task, classes = task_of(folder, wanted), labels_of(folder) or ("one", "other")
        named = classes if task == "classification" else None
        empty, _, _ = load(folder, empty=True, classes=named, embeds=task == "embedding")
        model.view.trained(empty)


def check_output(made: Sequence[Plan], out: Path) -> None:
    """ConfigError where the output holds a run of another configuration, but for its tuned rate."""
    for plan in made:
        priced = [Job(f"{plan.name}/cost", plan.priced())] if plan.name != "base" and not plan.shuffled else []
        for job in [*priced, *plan.tuning().values(), *plan.final().values()]:
            file = out / job.name / "run.toml"
            if not file.exists():
                continue
            there = config.load(file)
            # how often it was scored on the way makes no other run of it
            there = there.model_copy(update={"eval": there.eval.model_copy(update={"every": job.run.eval.every})})
            if plan.lr is None and "/tune/" not in job.name and plan.grid:
                same = there.method.model_copy(update={"lr": job.run.method.model_dump().get("lr")})
                there = there.model_copy(update={"method": same})
            if (difference := job.run.first_difference(there)) is not None:
                raise ConfigError(f"{out / job.name}: holds another run: {difference}")


def share(made: Sequence[Plan], part: str) -> list[Plan]:
    """What machine I of N runs, I/N in `part`: whole names, a control with its name; raises ConfigError."""
    try:
        i, n = map(int, part.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise ConfigError(f"--part: {part!r} is not I/N with I from 1 to N")
    names = list(dict.fromkeys(plan.name for plan in made))
    return [plan for plan in made if names.index(plan.name) % n == i - 1]
