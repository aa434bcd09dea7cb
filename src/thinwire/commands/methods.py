"""thinwire methods: what methods there are."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from thinwire.commands.terminal import echo_json, one_line


def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods, their papers, their fields and defaults."""
    with one_line():
        from thinwire.methods.catalogue import catalogue

        table = catalogue()
        for method in table.values():
            del method["schema"]
        if as_json:
            echo_json(table)
        else:
            show(table)


def show(table: dict[str, Any]) -> None:
    """The methods with their papers and fields."""
    from thinwire.commands.screen import Screen

    console = Screen()
    for name, method in table.items():
        console.print(f"{name}: {method['about']}", style="bold", soft_wrap=True)
        console.print(f"  {method['paper']}", soft_wrap=True)
        for field, info in method["fields"].items():
            console.print(f"  {field} = {json.dumps(info['default'])}  ({info['type']})", soft_wrap=True)
