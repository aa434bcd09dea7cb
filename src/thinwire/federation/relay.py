"""The site's half of Flower's app: a process a task, which holds no model and hands each piece to the site's worker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.federation.channel import Down, ask
from thinwire.federation.envelope import pack, unpack
from thinwire.federation.processes import end_with_parent

if TYPE_CHECKING:
    from flwr.app import Context, Message


def relay(message: Message, context: Context, settings: Path) -> Message:
    """The worker's answer to a message, as a reply; what goes wrong travels as the record's `error`."""
    from flwr.app import Message

    end_with_parent()  # Flower leaves this process behind when its own has died
    transfer = ""
    try:
        piece, about = unpack(message.content)
        transfer = str(about.get("transfer", ""))
        socket = Path(str(context.node_config["socket"]))
        answer, body = ask(socket, {**about, "settings": settings.read_text(encoding="utf-8")}, piece)
    except (Down, ValueError) as error:
        return Message(pack(b"", transfer=transfer, total=0, error=str(error)), reply_to=message)
    return Message(pack(body, **{"transfer": transfer, **answer}), reply_to=message)
