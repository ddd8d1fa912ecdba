"""Text as it can be shown to people, also from names that anybody may have chosen."""

from __future__ import annotations

from os import PathLike
from pathlib import Path


def printable(text: str) -> str:
    r"""The text with what terminals and XML would take for something else escaped: ``\x1b``.

    Those are control characters, line ends among them, halves of surrogate pairs and the like.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(n: int, noun: str, plural: str = "") -> str:
    """``1 leaf``, ``2 leaves``; the plural is that with an s unless given."""
    return f"{n} {noun}" if n == 1 else f"{n} {plural or noun + 's'}"


def written(text: str, file: str | PathLike[str] | None) -> str:
    """The text, which is also written to the file if there is one."""
    if file is not None:
        Path(file).write_text(text, "utf-8")
    return text
