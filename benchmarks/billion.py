"""A Llama of 1.1e9 random bfloat16 parameters under FedKSeed: seconds and peak memory of each part.

    python benchmarks/billion.py [--law gaussian|sign|lowrank] [--json FILE]

One round of two clients, three steps each on 2 rows of 32 tokens, then the rebuild of the global model, then the second
round's first client, who begins with a rebuild of its own. Each part runs in a process of its own, which loads the
model, resets the peak, and does only that part's work: memory is its peak resident less what is resident after the
imports.
The reference is plain inference on the same rows (as many forward passes as a visit has), in a process of its own too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from time import perf_counter

from rows import Row, finish

STEPS, ROWS, LENGTH, POOL = 3, 2, 32, 1024
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 23}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}
PARTS = ("inference", "client", "rebuild", "second round")


def make(folder: Path) -> None:
    """The model's folder: 2.2 GB of random weights, tensor by tensor, and SmolLM2's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from thinwire.model.resolve import resolve

    source = resolve("smollm2-135m-instruct")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    vocabulary = AutoConfig.from_pretrained(source).vocab_size
    config = LlamaConfig(**SHAPE, **HEADS, vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        normal = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        weights[name] = normal if parameter.dim() > 1 else torch.ones_like(normal)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def measure(part: str, folder: Path, law: str) -> dict[str, float]:
    """One part, in this process: seconds, bytes at the peak, parameters."""
    import torch

    from thinwire import memory, wire
    from thinwire.core import Client, Server
    from thinwire.data.batch import Dataset, Example
    from thinwire.keys import Key
    from thinwire.methods.fedkseed import FedKSeed
    from thinwire.model.net import Net
    from thinwire.runtime.store import ClientMemory, VersionStore
    from thinwire.train.objective import loss

    method = FedKSeed(seeds=POOL, steps=STEPS, batch_size=ROWS, lr=1e-5, eps=1e-3, law=law)  # type: ignore[arg-type]
    before = memory.resident()
    net = Net.open(str(folder), "bfloat16")
    tokens = Key.root(0).integers(40_000, 2 * ROWS * LENGTH).reshape(-1, LENGTH).tolist()
    data = Dataset([Example(tuple(row[:-8]), tuple(row[-8:])) for row in tokens], 0)
    versions, found = VersionStore(folder / "versions"), folder / "replies"
    server = Server(net, Key.root(0), 1, 2, (0, 1), versions)

    def visit(client: int) -> Client:
        return Client(client, net, data, Key.root(client), ClientMemory(folder / "memory", client), versions)

    begun = method.init(server)
    memory.reset()
    begin = perf_counter()
    if part == "inference":
        with torch.inference_mode():
            for batch in islice(data.batches(Key.root(0), ROWS), STEPS):
                loss(net.model, batch)
                loss(net.model, batch)
    elif part == "client":
        up = method.client_update(method.broadcast(begun, server, 0, None), visit(0))
        found.write_bytes(bytes(wire.encode(up)))
    else:
        up = wire.decode(method.Up, found.read_bytes())
        state, _ = method.aggregate(begun, server, [(0, up), (1, up)])
        if part == "rebuild":
            method.materialise(state, net)
        else:
            method.client_update(method.broadcast(state, server, 0, None), visit(0))
    seconds = perf_counter() - begin
    return {"seconds": seconds, "bytes": memory.peak() - before, "parameters": net.size}


def main() -> None:
    """Make the model, and run all parts."""
    law = sys.argv[sys.argv.index("--law") + 1] if "--law" in sys.argv else "lowrank"
    if "--part" in sys.argv:
        at = sys.argv.index("--part")
        print(json.dumps(measure(sys.argv[at + 1], Path(sys.argv[at + 2]), law)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "llama"
        make(folder)
        found = {}
        for part in PARTS:
            command = [sys.executable, __file__, "--law", law, "--part", part, str(folder)]
            found[part] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    plain, rows = found.pop("inference"), []
    name = f"{law} law, {plain['parameters'] / 1e9:.2f}e9 parameters in bfloat16"
    for part, cost in found.items():
        rows.append(Row(f"{name}, {part}: peak memory over inference", cost["bytes"] / 1e9, plain["bytes"] / 1e9, "GB"))
        rows.append(Row(f"{name}, {part}: time over inference", cost["seconds"], plain["seconds"], "s"))
    finish(rows)


if __name__ == "__main__":
    main()
