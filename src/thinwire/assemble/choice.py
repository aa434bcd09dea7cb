"""By which rows' loss a run's best round is chosen, and when the run ends before its last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from thinwire.config import ConfigError, Run
from thinwire.records import SELECTION, Record


def choice_of(run: Run) -> str | None:
    """The split by whose loss the round is chosen; None: the first that is scored."""
    return run.eval.on or (SELECTION if run.data.selection is not None else None)


def check_choice(run: Run, splits: Sequence[str]) -> None:
    """ConfigError where a round is to be chosen by rows that are none of these splits, nor the clients' own."""
    if run.eval.keep == "last" and not run.eval.patience and run.eval.target is None:
        return
    if isinstance(run.data.selection, float) and SELECTION not in splits:
        raise ConfigError("data.selection: a share is of rows in this process; sites hold theirs: name a file")
    sites = run.federation is not None and run.federation.evaluate
    there, on = [*splits, *(["sites"] if sites else [])], choice_of(run)
    if not there:
        raise ConfigError("eval.patience, eval.target, eval.keep: no rows are held out to show which round is better")
    if on is not None and on not in there:
        raise ConfigError(f"eval.on: no rows are called {on!r}; there are {', '.join(there)}")
    if (run.eval.warmup or 0) >= run.rounds:
        raise ConfigError(f"eval.warmup: {run.eval.warmup} rounds of {run.rounds} leave none to choose")


def stop_of(run: Run) -> Callable[[Record], str | None] | None:
    """What ends the run: the reason in a line, None where it goes on. See Job.stop."""
    patience, target = run.eval.patience, run.eval.target
    if not patience and target is None:
        return None

    def stop(now: Record) -> str | None:
        if target is not None and now["loss"] is not None and now["loss"] <= target:
            return f"the loss on {now['on']} is {now['loss']:.4f}, and eval.target {target:g}"
        if patience and now["waited"] >= patience:
            found = "no finite loss" if now["best"] is None else f"{now['best_loss']:.4f} after round {now['best']}"
            return f"{now['waited']} evaluations on {now['on']} no better than {found} (eval.patience)"
        return None

    return stop
