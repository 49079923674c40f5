"""Small helpers for text."""

import io
import re
import sys

DEPTH = 8  # lists and dictionaries in each other, in what a cell displays
COLORS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # ANSI codes, which a traceback and a terminal have


def strip_colors(text: str) -> str:
    """The text without a terminal's color codes."""
    return COLORS.sub("", text)


def make_printable(value, depth: int = DEPTH):
    """The same value, its strings fit for UTF-8: lone surrogates become question marks. What lies deeper is None."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict | list) and not depth:
        return None
    if isinstance(value, dict):
        return {make_printable(key): make_printable(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [make_printable(item, depth - 1) for item in value]
    return value


def print_anything() -> None:
    """Lets this process print what its terminal cannot show: names are in every language, terminals are not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
