"""Local steps on the factors of a LoRA view, on a share of the client's rows: what both stages of CG-FedLLM do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.compress.learned.lora_image import Image
from thinwire.core import Client
from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.train.objective import loss as batch_loss
from thinwire.train.weights import fill_checked
from thinwire.wire import Illegal
from thinwire.wire.legal import check_rate

Tensors = Mapping[str, Tensor]


class OnFactors(FirstOrder):
    """What both stages have in common: local steps on a share of the client's rows, and what is found of them."""

    encode: Literal["increment", "state", "gradient"] = "increment"
    layout: Literal["packed", "paper"] = "packed"
    spared: float = Field(0.0, ge=0, lt=1)  # share of each client's rows that is for fit-codec, and not trained on here

    def image(self, net: Net, side: int = 1) -> Image:
        """The layout of the net's factors; ModelError where there is no such layout of them."""
        shapes = {name: tuple(p.shape) for name, p in net.parameters()}
        try:
            return Image.paper(shapes, side) if self.layout == "paper" else Image.packed(shapes, side)
        except ValueError as error:
            raise ModelError(f"method.layout: {error}") from None

    def learn(self, weights: Tensors, client: Client, lr: float, first: bool) -> tuple[dict[str, Tensor], float, int]:
        """What the client has to send after its steps on the first or the other part of its rows; loss, steps skipped.

        The increment or the state after local steps; or -lr times the mean gradient of as many batches, no step taken.
        """
        check_rate(lr)
        fill_checked(client.net, weights)
        count = math.floor(self.spared * len(client.data) + 0.5)
        order = Key.root(0).fold("spared", client.id).permutation(len(client.data))
        kept = order[:count] if first else order[count:]
        if not len(kept):
            raise Illegal(f"{len(client.data)} examples leave none to train on")
        part = replace(client.data, examples=tuple(client.data.examples[i] for i in sorted(kept.tolist())))
        client = replace(client, data=part)
        if self.encode == "gradient":
            return self._gradient(client, lr)
        loss, skipped, _ = self.train(client, lr)
        found = {name: p.detach().float() for name, p in client.net.parameters()}
        if self.encode == "increment":
            found = {name: tensor - weights[name].to(tensor) for name, tensor in found.items()}
        return {name: tensor.cpu() for name, tensor in found.items()}, loss, skipped

    def moved(
        self, weights: Tensors, mean: Tensors, memory: Tensors | None
    ) -> tuple[dict[str, Tensor], Tensors | None]:
        """The weights under the server's step along the mean of what was sent, and the memory of it."""
        if self.server_step.plain:
            return moved(weights, mean, self.encode), memory
        moves, kept = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in weights.items():
            delta = mean[name] - tensor.float() if self.encode == "state" else mean[name]
            moves[name], entries = self.server_step(memory or {}, name, delta)
            kept |= entries
        return moved(weights, moves, "increment"), kept or None

    def _gradient(self, client: Client, lr: float) -> tuple[dict[str, Tensor], float, int]:
        total, taken = 0.0, 0
        mean = {name: torch.zeros(p.shape) for name, p in client.net.parameters()}
        for batch in islice(client.data.batches(client.key.fold("batches"), self.batch_size), self.steps):
            loss = batch_loss(client.net.model, batch)
            loss.backward()
            grads = {n: p.grad.float().cpu() for n, p in client.net.parameters() if p.grad is not None}
            for _, parameter in client.net.parameters():
                parameter.grad = None
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
            if not math.isfinite(loss.item()) or not math.isfinite(norm):
                continue
            shrink = min(1.0, self.clip / norm) if self.clip and norm else 1.0
            for name, grad in grads.items():
                mean[name] -= lr * shrink * grad
            total, taken = total + loss.item(), taken + 1
        found = {name: tensor / max(taken, 1) for name, tensor in mean.items()}
        return found, total / taken if taken else math.nan, self.steps - taken

    @property
    def additive(self) -> bool:
        return self.encode != "state"

    def fits(self, net: Net) -> None:
        if net.personal and self.encode == "gradient":
            raise ModelError("model.view.keep: goes with increments or states; no step is taken to a gradient")
        others = [name for name in net.names if ".lora_" not in name]
        if len(others) == len(net.names):
            raise ModelError(f"model.lora: missing; {self.name} codes the factors of a LoRA view")
        if others:
            raise ModelError(
                f"model.lora: {self.name} codes factors alone, and a classifier's view trains its head too: {others[0]}"
            )


def moved(weights: Tensors, found: Tensors, encode: str) -> dict[str, Tensor]:
    """The weights under what was found of them, each in its own dtype: moved by it, or replaced where it is states."""
    if encode == "state":
        return {name: found[name].to(tensor.dtype) for name, tensor in weights.items()}
    return {name: (tensor.float() + found[name].to(tensor.device)).to(tensor.dtype) for name, tensor in weights.items()}
