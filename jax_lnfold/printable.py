"""Text from names that anybody may have chosen, as it can be shown to people."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with what terminals and XML would take for something else escaped: ``\x1b``.

    Those are control characters, line ends among them, halves of surrogate pairs and the like.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
