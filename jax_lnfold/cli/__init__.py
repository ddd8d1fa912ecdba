"""The command line: its commands, and the models it is told to look at."""

from .commands import main

__all__ = ["main"]
