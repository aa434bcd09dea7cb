"""A chat template at work on messages: the same text on any day and at any site, or an error in one line."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import jinja2
import jinja2.filters

from thinwire.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

CLOCK = datetime(2024, 7, 26)
PATIENCE = 30.0  # seconds that a template may take


def write(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    seen: dict[str, None] | None = None,
    tools: list[Any] | None = None,
    header: bool = False,
) -> str:
    """The rendering; DataError for a template that refuses the messages, or fails on them."""
    try:
        with _still({} if seen is None else seen), _within(PATIENCE):
            text = tokenizer.apply_chat_template(
                list(messages), tools=tools or None, tokenize=False, add_generation_prompt=header
            )
    except jinja2.TemplateError as error:  # raised by templates that want turns to alternate, or no system message
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise row.error(f"the tokenizer's chat template refuses the row ({problem})") from None
    except Exception as error:  # whatever a template does with the row's values
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise row.error(f"the tokenizer's chat template fails on the row ({problem})") from None
    return row.as_text(str(text), "what the chat template makes of the row")


@contextlib.contextmanager
def _still(seen: dict[str, None]) -> Iterator[None]:
    """Inside, the templates' clock shows CLOCK, and what they draw is the first; `seen` gets a line of each asked."""
    from transformers.utils import chat_template_utils as theirs

    class Clock:
        @staticmethod
        def now() -> datetime:
            seen[f"the chat template asks for the date: it is {CLOCK:%d %B %Y} in all prompts, whatever the day"] = None
            return CLOCK

    class Chance:
        @staticmethod
        def choice(values: Sequence[Any]) -> Any:
            seen["the chat template draws at random: it always gets the first"] = None
            return values[0]

    with patch.object(theirs, "datetime", Clock), patch.object(jinja2.filters, "random", Chance):
        yield


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError inside, after so long: in the main thread, where no other alarm is set."""
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not main or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)
