"""Whether a run's replies can be added up under masks: refused in a line before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from thinwire.assemble.agreement import agreement_of, size_of
from thinwire.config import ConfigError, Run, method_name
from thinwire.core import Averaged
from thinwire.privacy.secure import Secure
from thinwire.runtime.endpoint import Action
from thinwire.runtime.job import Job

Promise = Callable[[int, int, str], None]  # see runtime.masked


def secure_of(run: Run) -> Secure | None:
    """The run's table [privacy.secure]; None where there is none."""
    return None if run.privacy is None else run.privacy.secure


def check_secure(run: Run, names: Sequence[str]) -> None:
    """ConfigError for secure sums that cannot be had with the method, the weights, or cohorts of these clients."""
    secure = secure_of(run)
    if secure is None:
        return
    _check_sums(run, secure)
    assert isinstance(run.method, Averaged)
    assert run.privacy is not None
    if run.privacy.level == "client" and not run.method.linear(secure).clippable:
        raise ConfigError(
            f"privacy.level: what {method_name(run.method)} adds up under masks has a length of its own, which no clip "
            "bounds: record, or no privacy.secure"
        )
    if run.privacy.level is not None and run.method.weighting != "uniform":
        raise ConfigError('method.weighting: must be "uniform" in a private run under privacy.secure')
    agreed, own = agreement_of(run), {"examples": "examples", "uniform": "equal"}[run.method.weighting]
    if agreed is not None and (agreed.by not in ("method", own) or agreed.bounded):
        raise ConfigError(
            "federation.weights: under privacy.secure a client weighs its own reply, as method.weighting has it, and "
            "no share can depend on others"
        )
    if run.federation is not None and run.federation.late:
        raise ConfigError("federation.late: under privacy.secure a late reply is in no sum; leave it out")
    if run.federation is not None and (run.federation.keep_replies or run.federation.cross):
        raise ConfigError("federation.keep_replies, cross: under privacy.secure the server has no replies to keep")
    least = min((size_of(segment, len(names)) for segment in run.cohort), default=0) if names else secure.minimum
    if least < secure.minimum:
        raise ConfigError(f"privacy.secure.minimum: a round of {least} clients is smaller than {secure.minimum}")


def masked_clients(run: Run, promise: Promise | None = None, vouch: Any = None) -> Mapping[str, Action]:
    """What the clients of a run at one place do beside joining; nothing where it has no secure sums.

    `promise` and `vouch` as in runtime.masked. ConfigError where they cannot be had.
    """
    secure = secure_of(run)
    if secure is None:
        return {}
    _check_sums(run, secure)
    from thinwire.runtime.masked import MaskedClients  # what it needs comes with an extra

    return MaskedClients(secure, promise, vouch).actions


def secured(run: Run, job: Job) -> Job:
    """The job with its rounds under masks, where the run has them so."""
    secure = secure_of(run)
    if secure is None:
        return job
    from thinwire.runtime.secure import SecureRound

    return replace(job, round=SecureRound(secure), actions={**job.actions, **masked_clients(run)})


def _check_sums(run: Run, secure: Secure) -> None:
    for package in ("cryptography", "Crypto"):
        if find_spec(package) is None:
            raise ConfigError(f"privacy.secure: {package} is not installed: pip install 'thinwire[secure]'")
    from thinwire.runtime.sums import linear_of

    linear_of(run.method, secure)
