"""Flower as the engine, at the server: messages by its Grid. None of its strategies."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thinwire.federation.engine import About, Answer
from thinwire.federation.envelope import pack, unpack

if TYPE_CHECKING:
    from flwr.serverapp import Grid

POLL = 0.25  # seconds between two looks for replies


class Flower:
    """The nodes of a Flower grid."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def nodes(self, names: Sequence[str], keys: Mapping[str, bytes]) -> dict[int, int]:
        """See Engine."""
        return nodes_of(self.grid, tuple(names), keys)

    def push(self, node: int, piece: bytes, about: About, seconds: float, round: int) -> str:
        """See Engine."""
        from flwr.app import Message

        content = pack(piece, **about)
        message = Message(content, dst_node_id=node, message_type="train", ttl=seconds, group_id=str(round))
        (id,) = self.grid.push_messages([message])
        return id

    def pull(self, id: str) -> Answer | None:
        """See Engine."""
        for message in self.grid.pull_messages([id]):
            node = message.metadata.src_node_id
            if message.has_error():
                return Answer(node, error=f"{message.error.reason or 'no reason'} (code {message.error.code})")
            return Answer(node, *unpack(message.content))
        return None

    def pause(self) -> None:
        """See Engine."""
        time.sleep(POLL)


def nodes_of(grid: Any, sites: tuple[str, ...], keys: Mapping[str, bytes]) -> dict[int, int]:
    """Client -> node of the sites that are connected: a site is its key, whatever number the engine gives it."""
    by_key = {bytes(node.public_key): int(node.node_id) for node in grid.get_nodes()}
    found = {client: by_key.get(keys.get(name, b"-")) for client, name in enumerate(sites)}
    return {client: node for client, node in found.items() if node is not None}
