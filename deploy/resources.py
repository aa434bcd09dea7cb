"""Resources for the chart, from what `thinwire estimate FILE.toml --json` has found: resources.py ESTIMATE.json

Prints values for `helm --values`. A request is the estimated peak, and what Flower's processes take beside it; the
limit is half as much again, since the estimate is off by 15 % at worst, and loading a model takes more for a moment.
"""

import json
import sys
from pathlib import Path

MIB = 1 << 20
PROCESS = 130 * MIB  # one of Flower's, without frames
# docs/federation.md has what was measured: frames that Flower's processes hold at their peaks
PARTS = {"hub": ("server", 2, 2.2), "site": ("client", 3, 2.1)}


def main(path: Path) -> str:
    """The values as YAML."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        frame = max(one["most"] for one in found["traffic"]["newcomer"] + found["traffic"]["returning"])
        peaks = {name: found[half]["total"] for name, (half, _, _) in PARTS.items()}
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"{path}: not what `thinwire estimate FILE.toml --json` prints of a method whose memory is known")
    lines = [f"# {found['method']} on {found['model']}, by `thinwire estimate`"]
    for name, (_, processes, frames) in PARTS.items():
        asked = round((peaks[name] + processes * PROCESS + frames * frame) / MIB)
        lines += [
            f"{name}:",
            "  resources:",
            f'    requests: {{ cpu: "1", memory: {asked}Mi }}',
            f"    limits: {{ memory: {asked * 3 // 2}Mi }}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    print(main(Path(sys.argv[1])))
