"""What Flower starts at the server and at a site. The run's settings for the sites lie beside it, in site.json."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server = ServerApp()
client = ClientApp()


@server.main()
def run(grid: Grid, context: Context) -> None:
    """The server's loop, in the run's folder."""
    from thinwire.federation.flower import Flower
    from thinwire.federation.server_app import serve

    serve(Flower(grid), Path(str(context.run_config["folder"])))


@client.train()
def visit(message: Message, context: Context) -> Message:
    """A piece of a frame for the site's worker, and what it answers."""
    from thinwire.federation.relay import relay

    return relay(message, context, Path(__file__).with_name("site.json"))
