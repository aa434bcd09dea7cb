"""What methods of local first-order steps have in common: their fields, and the steps themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from thinwire.core import Averaged, Client, Server
from thinwire.costs.memory import Memory, Side, averaging, training
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.train.differences import Differences
from thinwire.train.kept import Kept
from thinwire.train.local import Adjust, Local, Moments, Optimiser, Rule, Schedule, scheduled, train_locally
from thinwire.train.protected import protected_at


class FirstOrder(Averaged):
    """Local steps on what the net trains, or on some parameters of a model."""

    keeps: ClassVar[bool] = True

    name: str
    lr: float = Field(2e-5, gt=0, le=100)
    schedule: Schedule = "constant"
    warmup: NonNegativeInt = 0  # first steps of an optimiser, over which the rate rises to what it is
    optimiser: Optimiser = "adamw"
    moments: Moments = "fresh"  # kept: AdamW's stay with the client from visit to visit
    weight_decay: NonNegativeFloat = 0.0
    steps: PositiveInt = 10
    batch_size: PositiveInt = 8
    clip: NonNegativeFloat = 1.0  # of the gradient's norm; 0: none
    proximal: NonNegativeFloat = 0.0  # mu of FedProx (Li et al. 2020): the pull back to where the visit began; 0: none
    recompute: bool = False  # what is within a layer is computed again on the way back: less memory, more time

    def rate(self, server: Server) -> float:
        """The learning rate of the server's round."""
        return scheduled(self.schedule, self.lr, server.round, server.rounds)

    def train(
        self,
        client: Client,
        lr: float,
        model: nn.Module | None = None,
        parameters: Sequence[nn.Parameter] | None = None,
        names: Sequence[str] = (),
        keep: bool = False,
        steps: int | None = None,
        adjust: Adjust | None = None,
        differences: Differences | None = None,
        losses: list[float] | None = None,
    ) -> Local:
        """The local steps on the client's net, or on the `names` of a model's parameters, in place; see train_locally.

        `names` are those that its moments are kept under, one a parameter. Of the net its personal parameters are
        trained with the others; the weights of the result are those of the others. `steps`: where they are not the
        field's; `adjust`: a hand on the gradients, beside FedProx's; `losses` is given each step's before that.
        `differences`: where gradients come from, if so.
        """
        shared = None
        if parameters is None:
            shared = len(client.net.names)
            trained = dict(client.net.trained())
            names, parameters = tuple(trained), list(trained.values())
        hands = [hand for hand in (adjust, proximal(self.proximal) if self.proximal else None) if hand is not None]

        def adjusted(weights: Sequence[Tensor]) -> None:
            for hand in hands:
                hand(weights)

        local = train_locally(
            model if model is not None else client.net.model,
            parameters,
            client.data.batches(client.key.fold("batches"), self.batch_size),
            Rule(self.optimiser, lr, steps or self.steps, self.weight_decay, self.clip, self.warmup),
            adjust=adjusted if hands else None,
            recompute=self.recompute,
            keep=keep,
            kept=Kept(client.memory, names) if self.moments == "kept" else None,
            differences=differences,
            losses=losses,
            protected=protected_at(client, self.batch_size),
        )
        return local._replace(weights=local.weights[:shared])

    def work(self, round: int) -> Work:
        return Work(self.steps, 3 * self.steps * self.batch_size, self.batch_size)

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        if side == "client":
            return training(at, forward, self.optimiser, self.recompute)
        return averaging(at, self.server_step.kind)


def proximal(mu: float) -> Adjust:
    """The gradient of mu / 2 |w - w0|^2 added to each weight's own; w0 is where the first step finds the weights."""
    start: list[Tensor] = []

    @torch.no_grad()
    def adjust(weights: Sequence[Tensor]) -> None:
        if not start:
            start.extend(weight.detach().clone() for weight in weights)
        for weight, before in zip(weights, start, strict=True):
            if weight.grad is not None:
                weight.grad.add_(weight - before, alpha=mu)

    return adjust
