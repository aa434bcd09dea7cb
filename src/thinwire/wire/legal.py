"""What is legal whatever the method: the numbers of a reply beside its update, the rate and the keys of a broadcast."""

from __future__ import annotations

from typing import Any

from thinwire.wire.errors import Illegal

LARGEST = 6e4  # a change of a weight beyond this is no training; float16 still holds it
LARGEST_RATE = 100.0  # as the field lr of every method
LARGEST_LOSS = 1e9  # nats a token; a float's largest would overflow the mean
MOST = 1 << 31  # examples, or steps; no client of a consortium has more


def check_report(up: Any, most: int = MOST) -> None:
    """Illegal where a field `examples` is not in 1..most, `skipped` is no count, or `loss` is infinite or beyond all.

    NaN is the loss of a client that took no step. A payload without these fields passes.
    """
    examples, skipped, loss = (getattr(up, name, None) for name in ("examples", "skipped", "loss"))
    if isinstance(examples, int) and not 1 <= examples <= most:
        raise Illegal(f"examples is {examples}" + (f", of {most} at most" if examples > most else ""))
    if isinstance(skipped, int) and not 0 <= skipped <= MOST:
        raise Illegal(f"skipped is {skipped}")
    if isinstance(loss, float) and abs(loss) > LARGEST_LOSS:
        raise Illegal(f"a loss of {loss:g}")


def check_rate(lr: float) -> None:
    """Illegal for a learning rate that no run file can ask for."""
    if not 0 <= lr <= LARGEST_RATE:
        raise Illegal(f"a rate of {lr}")


def check_keys(*keys: int) -> None:
    """Illegal for a key of directions, of draws or of a code that is not in [0, 2**64)."""
    for key in keys:
        if not 0 <= key < 1 << 64:
            raise Illegal(f"key {key} is not in [0, 2**64)")
