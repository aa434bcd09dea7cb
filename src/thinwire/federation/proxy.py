"""The reverse proxy in front of the hub: sites reach the paths of Flower's fleet, and nothing else of it.

Flower's control paths have no login, and are served on the same port as the fleet's: whoever reaches them can run code
on every node. So the hub listens on loopback alone, and this stands before it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from thinwire.errors import ConfigError
from thinwire.federation.follower import Ended
from thinwire.federation.processes import Children

FORBIDDEN = '"\\${}\n'  # in the programs' files quotes do not cover these
FILES = {"nginx": "nginx.conf", "caddy": "Caddyfile"}
# Sites are registered by the server, and unregistered by nobody but it.
ALLOWED = "^/v1/fleet/(?!register-node$|unregister-node$)[a-z-]+$"

QUICK = 3.0  # seconds within which a proxy that has just been started dies where something is wrong with it

NGINX = """# Written by thinwire server. Sites reach the fleet's paths; all else of the hub stays on its own machine.
daemon off;
worker_processes 1;
pid "{place}/nginx.pid";
error_log "{place}/error.log" warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  server_tokens off;
  client_body_temp_path "{place}/body";
  proxy_temp_path "{place}/proxy";
  fastcgi_temp_path "{place}/fastcgi";
  uwsgi_temp_path "{place}/uwsgi";
  scgi_temp_path "{place}/scgi";
  server {{
    listen {host}:{port} ssl;
    ssl_certificate "{keys}/server.crt";
    ssl_certificate_key "{keys}/server.key";
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size 64m;
    location ~ {allowed} {{
      # $uri is the path as it was matched, with dots and escapes resolved: what is let through is what is passed on
      proxy_pass https://127.0.0.1:{hub}$uri;
      proxy_http_version 1.1;
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate "{keys}/ca.crt";
      proxy_ssl_name localhost;
      proxy_request_buffering off;
      proxy_read_timeout 300s;
      proxy_send_timeout 300s;
    }}
    location / {{ return 403; }}
  }}
}}
"""

CADDY = """# Written by thinwire server. Sites reach the fleet's paths; all else of the hub stays on its own machine.
{{
  admin off
  auto_https off
}}
https://:{port} {{
  bind {host}
  tls "{keys}/server.crt" "{keys}/server.key"
  @barred path /v1/fleet/register-node /v1/fleet/unregister-node
  respond @barred 403
  @fleet path_regexp ^/v1/fleet/[a-z-]+$
  handle @fleet {{
    request_body {{
      max_size 64MB
    }}
    reverse_proxy https://127.0.0.1:{hub} {{
      transport http {{
        tls_trust_pool file "{keys}/ca.crt"
        tls_server_name localhost
      }}
    }}
  }}
  handle {{
    respond 403
  }}
}}
"""


def check(*folders: Path) -> None:
    """ConfigError for a folder that cannot stand in the programs' files."""
    for folder in folders:
        if any(mark in str(folder.resolve()) for mark in FORBIDDEN):
            raise ConfigError(f"{folder}: nginx and caddy take no path with one of {' '.join(FORBIDDEN[:-1])} in it")


def write(place: Path, keys: Path, host: str, port: int, hub: int) -> dict[str, Path]:
    """Write the configurations of nginx and caddy into a folder; returns them by program."""
    check(place, keys)
    place.mkdir(parents=True, exist_ok=True)
    fields = {"place": place.resolve(), "keys": keys.resolve(), "host": host, "port": port, "hub": hub}
    files = {name: place / file for name, file in FILES.items()}
    files["nginx"].write_text(NGINX.format(allowed=f'"{ALLOWED}"', **fields))
    files["caddy"].write_text(CADDY.format(**fields))
    return files


def command(place: Path) -> list[str] | None:
    """How to run the proxy of a folder with what is installed here, nginx before caddy; None with neither."""
    place = place.resolve()
    paths = ("/usr/sbin", "/usr/local/sbin")
    nginx = shutil.which("nginx") or next((f"{p}/nginx" for p in paths if Path(p, "nginx").exists()), None)
    if nginx is not None:
        return [nginx, "-e", str(place / "error.log"), "-p", str(place), "-c", str(place / FILES["nginx"])]
    if (caddy := shutil.which("caddy")) is not None:
        return [caddy, "run", "--config", str(place / FILES["caddy"]), "--adapter", "caddyfile"]
    return None


class Front:
    """The proxy's process, beside a hub's: started again when it dies; Ended where it does not stay up."""

    def __init__(self, children: Children, start: Sequence[str]) -> None:
        self.children, self.command = children, start
        self.quick, self.began = 0, 0.0

    def start(self) -> None:
        """Start it."""
        self.began = time.monotonic()
        self.children.start("proxy", self.command)

    def tick(self) -> str | None:
        """Look after it; a line where it has died and was started again."""
        if self.children.running["proxy"].poll() is None:
            return None
        reason = self.children.why("proxy")
        self.quick = self.quick + 1 if time.monotonic() - self.began < QUICK else 0
        if self.quick == 2:
            raise Ended(f"the proxy does not stay up: {reason}")
        self.start()
        return f"the proxy has ended, and is started again: {reason}"
