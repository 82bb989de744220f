"""What is written to the terminal, and colours where it takes them."""

import logging
import os
import re
import sys
from functools import partial
from typing import TextIO

RED, GREEN, YELLOW, BOLD = "31", "32", "33", "1"


def takes_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal with colours. NO_COLOR=1 turns them off."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def painted(text: str, colour: str, stream: TextIO) -> str:
    """A text in a colour, if the stream takes colours."""
    return f"\x1b[{colour}m{text}\x1b[0m" if text and takes_colours(stream) else text


_PATTERNS = (
    (re.compile(r"\d+\.\d\d %(?= test accuracy)"), GREEN),
    (re.compile(r"^  (LAYER COLLAPSE|NO SIGNAL|NOT TRAINED)(?=:)", re.M), YELLOW),
    (re.compile(r"^run +\d+(?= of \d+  )"), BOLD),
)


class Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stdout is at the time. Notebooks replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message."""
        self.stream = sys.stdout
        super().emit(record)


class Formatter(logging.Formatter):
    """Warnings in yellow, accuracies in green. For one stream, because a file gets no colours."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            return painted(text, YELLOW, self.stream)
        for pattern, colour in _PATTERNS:
            text = pattern.sub(partial(self._painted, colour), text)
        return text

    def _painted(self, colour: str, found: re.Match[str]) -> str:
        return painted(found[0], colour, self.stream)
