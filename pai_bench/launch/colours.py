"""What is written to the terminal: lines as long as it is wide, and colours where it takes them."""

import logging
import os
import re
import shutil
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


def wrapped(text: str, stream: TextIO) -> str:
    """A text whose lines fit into a terminal. Files and pipes get it as it is.

    A line that is too long goes on in the next one, indented. It is cut between columns if possible, otherwise between
    words. A longer word stays whole, so that a path can be copied.
    """
    width = shutil.get_terminal_size((0, 0)).columns if stream.isatty() else 0
    return "\n".join(_cut(line, width) if width and len(line) > width else line for line in text.split("\n"))


def _cut(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    lines = [""]
    for column in re.findall(r" *\S+(?: \S+)*", line):  # columns have two spaces or more between them
        whole = len(indent) + len(column.strip()) <= width
        for piece in [column] if whole else re.findall(r" *\S+", column):
            if lines[-1].strip() and len(lines[-1]) + len(piece) > width:
                lines.append(indent + piece.strip())
            else:
                lines[-1] += piece
    return "\n".join(lines)


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
    """Warnings in yellow, accuracies in green. For one stream, because a file gets no colours and no breaks."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        text = super().format(record)
        if not record.exc_info:
            text = wrapped(text, self.stream)
        if record.levelno >= logging.WARNING:
            return painted(text, YELLOW, self.stream)
        for pattern, colour in _PATTERNS:
            text = pattern.sub(partial(self._painted, colour), text)
        return text

    def _painted(self, colour: str, found: re.Match[str]) -> str:
        return painted(found[0], colour, self.stream)
