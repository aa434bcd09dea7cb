"""The rounds that a comparison's budget buys each method, at costs that are measured first where it needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from thinwire.compare import measure
from thinwire.compare.plan import ALONE, Plan, Settings, clients_of, first_cohort, merge
from thinwire.config import ConfigError, Run


def afford(plan: Plan, settings: Settings) -> None:
    """Set the rounds that the budget buys the plan, where that is known by now; raises ConfigError."""
    run = plan.run_of(plan.seeds[0], None)
    amount, unit, plan.note = settings.amount, settings.budget, ""
    # Alone and in one place nothing need travel: there a budget of bytes bounds nothing.
    if amount is None or plan.name == "base" or (unit == "bytes" and plan.name in ALONE):
        plan.rounds = run.rounds
    elif unit == "rounds":
        plan.rounds = int(amount)
        plan.note = "" if plan.rounds else f"{amount:g} rounds are none"
    elif unit != "passes" and plan.cost is None:
        plan.rounds = None  # to be measured
    else:
        first = each = _passes(run) / plan.steps_of
        if unit == "passes" and math.isnan(each):
            raise ConfigError(
                f"compare.budget: the method of {plan.name} does not report how many passes a visit takes"
            )
        if plan.cost is not None and unit == "seconds":
            first = each = plan.cost.client_seconds / plan.steps_of
        elif plan.cost is not None and unit == "bytes":
            first, each = plan.cost.newcomer_bytes, plan.cost.returning_bytes
        bought = 1 + int((amount - first) / each) if amount >= first else 0
        plan.rounds = min(bought, plan.most)
        if bought > plan.most:
            plan.note = f"the budget would buy {bought:,} rounds"
        elif not bought:
            plan.note = f"{amount:g} {unit} buy less than a round, which costs a client {first:g}"
    if plan.rounds:
        plan.tree = merge(plan.tree, {"rounds": plan.rounds})


def price(plan: Plan, out: Path, report: Callable[[str], None]) -> None:
    """Measure what the plan costs either side, or read what was measured; RuntimeError where its rounds fail."""
    if plan.name == "base" or plan.shuffled:
        return
    run, folder = plan.priced(), out / plan.name / "cost"
    plan.cost = measure.read(folder)
    if plan.cost is None:
        report(f"measuring {plan.name}: two rounds, with a process for either side")
        cohort = first_cohort(run, 1 if run.data.pooled else clients_of(run))
        try:
            plan.cost = measure.measure(run, cohort, folder)
        except RuntimeError as error:
            raise RuntimeError(f"{plan.name}, measured apart: {error}") from None


def settle(made: Sequence[Plan], settings: Settings) -> None:
    """Set all rounds anew, now that costs are known; raises ConfigError where the budget buys nobody a round."""
    for plan in made:
        if plan.shuffled:
            plan.cost = next(other.cost for other in made if other.name == plan.name and not other.shuffled)
        afford(plan, settings)
    check_rounds(made)


def check_rounds(made: Sequence[Plan]) -> None:
    """ConfigError where the budget buys nobody a round."""
    trained = [plan for plan in made if plan.name != "base"]
    if all(plan.rounds == 0 for plan in trained):
        raise ConfigError(f"compare.amount: it buys nobody a round: {trained[-1].name}: {trained[-1].note}")


def _passes(run: Run) -> float:
    return run.method.work(1).rows * run.model.view.forward_share
