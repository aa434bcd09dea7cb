"""A client of several processes: each computes its part of a step, and all end the step with the same weights.

All processes of a launch (`accelerate launch` or `torchrun`, WORLD_SIZE in the environment) run the same program on the
same run file. What is drawn comes from keys, so they agree on everything but the work within a step, of which each does
a share: of a first-order step the examples of the batch, of a zeroth-order step the directions that it asks about.

A site of a federation starts its other processes itself (federation.ranks): they have its rows, follow it into the
visits that it begins, and answer nobody.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.data.batch import IGNORE, Batch

ATTRIBUTE = "thinwire_shards"  # of a model that is to be trained in shards
INTERFACE = {"linux": "lo", "darwin": "lo0"}  # what processes of one machine reach each other by


def join() -> int:
    """Join the processes of this launch, if there are any; this one's rank, 0 where it is alone or the first.

    gloo between CPUs, NCCL between GPUs. Processes beyond the first print nothing on the standard output.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    wait()  # what the first one still writes of a run before this one, another must not read
    rank, _ = ranks()
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    return rank


def meet(place: Path, rank: int, size: int) -> None:
    """Join the processes of a site, which meet at a file: no port is opened but on loopback, between them alone.

    NCCL between GPUs where each process has one, else gloo.
    """
    if (loopback := INTERFACE.get(sys.platform)) is not None:
        os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    os.environ["LOCAL_RANK"] = str(rank)
    if graphics := torch.cuda.device_count() >= size:
        torch.cuda.set_device(rank)
    backend = "nccl" if graphics else "gloo"
    dist.init_process_group(backend, init_method=f"file://{place}", rank=rank, world_size=size)


def ranks() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shadow(folder: Path) -> Path:
    """A folder that another process than the first writes to: what the run has left so far, gone with the process."""
    place = Path(tempfile.mkdtemp(prefix="thinwire-rank-"))
    if (folder / "state").is_dir():
        shutil.copytree(folder, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model", "spool"))
    weakref.finalize(ranks, shutil.rmtree, place, ignore_errors=True)
    return place


def wait() -> None:
    """Wait for the other processes."""
    if ranks()[1] > 1:
        dist.barrier()


def device_of(device: str) -> str:
    """The device of this process: of several on a machine with GPUs, each has its own."""
    if ranks()[1] > 1 and device == "cuda":
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    return device


def is_sharded(model: nn.Module) -> bool:
    """Whether it is the sharded twin of a model: see train.shards."""
    return hasattr(model, "unshard")


def whole(tensor: Tensor) -> Tensor:
    """A tensor from the shards of all processes; one that has none as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ask_shards(model: nn.Module, asked: bool) -> None:
    """Have a model trained in shards where there are several processes (train.shards), or no longer."""
    setattr(model, ATTRIBUTE, asked)


def wants_shards(model: nn.Module) -> bool:
    """Whether they were asked for, and there are several processes."""
    return ranks()[1] > 1 and cast("bool", getattr(model, ATTRIBUTE, False))


def part(batch: Batch, always: bool = False) -> tuple[Batch | None, float]:
    """This process's examples of a batch, None without any, and the share that their loss has in the batch's.

    `always`: without any it has the first one, as no share: what all processes compute together lacks nobody.
    """
    rank, size = ranks()
    if size == 1:
        return batch, 1.0
    packed = batch.kind == "packed"  # examples of a row stay together
    count = len(batch.input_ids) if packed else batch.examples
    low, high = (count * r // size for r in (rank, rank + 1))
    if low == high and not always:
        return None, 0.0
    some, high = low < high, max(high, low + 1)
    each = len(batch.input_ids) // count
    rows = slice(low * each, high * each)
    begins = (batch.position_ids[rows] == 0) & batch.attention_mask[rows].bool()
    mine = replace(
        batch,
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        position_ids=batch.position_ids[rows],
        labels=batch.labels[rows],
        examples=int(begins.sum()) if packed else high - low,
        choice=None if batch.choice is None else batch.choice[low:high],
        reference=None if batch.reference is None else batch.reference[low:high],
    )
    if batch.kind not in ("open", "packed"):
        return mine, some * (high - low) / batch.examples
    counted = _counted(batch)
    return mine, some * float(counted[rows].sum() / counted.sum().clamp(min=1))


def summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place where the backend can."""
    if ranks()[1] == 1:
        return tensor
    if dist.get_backend() == "nccl" and not tensor.is_cuda:
        there = tensor.to(device_of("cuda"))
        dist.all_reduce(there)
        return tensor.copy_(there)
    dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: list[Tensor]) -> None:
    """Each gradient := its sum over the processes; None where none of them has one."""
    if ranks()[1] == 1:
        return
    held = summed(torch.tensor([float(p.grad is not None) for p in parameters]))
    for parameter, count in zip(parameters, held.tolist(), strict=True):
        if count:
            parameter.grad = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def _counted(batch: Batch) -> Tensor:
    """How many tokens of each row count in the loss, as train.objective has it: float64 [rows]."""
    length = batch.input_ids.shape[1]
    width = min(batch.labels.shape[1], length - 1)
    labels = batch.labels[:, batch.labels.shape[1] - width :]
    preceded = batch.attention_mask[:, length - 1 - width : length - 1].bool()
    return ((labels != IGNORE) & preceded).sum(1).double()
