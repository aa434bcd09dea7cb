"""A hub and sites in network namespaces, between which packets are late, lost, or do not pass at all; needs root."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HUB = "10.77.0.1"
DELAY, JITTER = 0.06, 0.02  # seconds, each way
LOSS = 0.01  # of packets, each way
PORT = 8443  # of the relay that is late where the kernel cannot be


def lacking() -> str | None:
    """Why there can be no such network here."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if missing := [name for name in ("ip", "iptables") if shutil.which(name) is None]:
        return f"{missing[0]} is not installed"
    made = subprocess.run(["ip", "netns", "add", "tw-try"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "tw-try"], capture_output=True, check=False)
    return "this kernel makes no network namespaces" if made.returncode else None


def ip(*words: str) -> None:
    """A command of ip, which ends well."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """A namespace for the hub, with a bridge, and one for each site, with a link to it."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.mark = f"tw{os.getpid() % 10000}"
        self.sites = tuple(sites)
        self.netem = False
        self.relays: list[subprocess.Popen[bytes]] = []

    def space(self, name: str) -> str:
        """A site's namespace, or the hub's."""
        return f"{self.mark}-{name}"

    def within(self, name: str, command: Sequence[str]) -> list[str]:
        """A command in a namespace; the process is that of the command itself."""
        return ["ip", "netns", "exec", self.space(name), *command]

    def server(self) -> str:
        """Where a site reaches the hub."""
        return f"{HUB}:{PORT}" if self.netem else f"127.0.0.1:{PORT}"

    def cut(self, site: str, whole: bool) -> None:
        """Let nothing pass between a site and the hub, or all again."""
        ip("-n", self.space("hub"), "link", "set", f"to-{site}"[:15], "down" if whole else "up")

    def _make(self) -> None:
        hub = self.space("hub")
        ip("netns", "add", hub)
        ip("-n", hub, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "addr", "add", f"{HUB}/24", "dev", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for number, site in enumerate(self.sites, 2):
            space, link = self.space(site), f"to-{site}"[:15]
            ip("netns", "add", space)
            ip("-n", hub, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", hub, "link", "set", link, "master", "bridge", "up")
            for words in (("link", "set", "lo", "up"), ("link", "set", "eth0", "up")):
                ip("-n", space, *words)
            ip("-n", space, "addr", "add", f"{HUB.rpartition('.')[0]}.{number}/24", "dev", "eth0")
            self._trouble(site)

    def _trouble(self, site: str) -> None:
        """Delay and loss, by the kernel's own means where it has them, else by a relay and the firewall."""
        netem = ["netem", "delay", f"{DELAY}s", f"{JITTER}s", "loss", f"{LOSS:%}"]
        words = self.within(site, ["tc", "qdisc", "add", "dev", "eth0", "root", *netem])
        other = ["tc", "qdisc", "add", "dev", f"to-{site}"[:15], "root", *netem]
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            subprocess.run(self.within("hub", other), check=True, capture_output=True)
            self.netem = True
            return
        lose = ["-i", "eth0", "-m", "statistic", "--mode", "random", "--probability", f"{LOSS}", "-j", "DROP"]
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            rule = ["iptables", "-A", chain, way, *lose[1:]]
            subprocess.run(self.within(site, rule), check=True, capture_output=True)
        relay = [sys.executable, str(Path(__file__)), str(PORT), HUB, str(PORT)]
        self.relays.append(subprocess.Popen(self.within(site, relay)))

    def _drop(self) -> None:
        for relay in self.relays:
            relay.kill()
            relay.wait()
        for name in ("hub", *self.sites):
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True, check=False)


@contextmanager
def network(sites: Sequence[str]) -> Iterator[Network]:
    """The namespaces, gone at the end."""
    made = Network(sites)
    try:
        made._make()
        yield made
    finally:
        made._drop()


async def relay(port: int, host: str, to: int) -> None:
    """Pass on what comes, late, in the order that it came."""

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

        async def write() -> None:
            while True:
                when, piece = await queue.get()
                await asyncio.sleep(max(0.0, when - loop.time()))
                if not piece:
                    writer.close()
                    return
                writer.write(piece)
                await writer.drain()

        task = asyncio.create_task(write())
        while True:
            try:
                piece = await reader.read(1 << 16)
            except OSError:
                piece = b""
            queue.put_nowait((loop.time() + random.uniform(DELAY - JITTER, DELAY + JITTER), piece))
            if not piece:
                break
        await task

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, here = await asyncio.open_connection(host, to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(passed(reader, here), passed(there, writer), return_exceptions=True)

    server = await asyncio.start_server(met, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(relay(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
