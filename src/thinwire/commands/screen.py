"""The console that all commands print to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from thinwire.data.shown import printable


class Screen(Console):
    """A console that escapes control characters in all that is printed, and takes no brackets or colons for markup.

    What is printed holds rows, names of clients, answers of models and paths. It overrides the two methods through
    which all text passes: before it is measured, so that tables stay straight, and, for the library's own, after.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """See Console."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See Console."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)
