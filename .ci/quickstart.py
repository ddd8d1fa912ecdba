"""Runs the first Python block of README.md and compares what it prints with the text block below.

So that the quickstart cannot go stale. What XLA says the programs cost differs between versions.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.DOTALL | re.MULTILINE)


def main() -> None:
    """Executes the block as a script of its own."""
    text = README.read_text(encoding="utf-8")
    blocks = BLOCKS.search(text)
    if blocks is None:
        sys.exit("README.md: found no ```python block with a ```text block below")
    # Leading blank lines make tracebacks name the lines of README.md.
    source = "\n" * text.count("\n", 0, blocks.start(1)) + blocks[1]
    os.environ["COLUMNS"] = "110"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(README), "exec"), {"__name__": "__main__"})
    *wanted, _ = blocks[2].splitlines()
    *found, cost = printed.getvalue().splitlines()
    print(*found, cost, sep="\n")
    if found != wanted or "XLA's cost analysis" not in cost:
        sys.exit("README.md: the ```python block prints something else than the ```text block")


if __name__ == "__main__":
    main()
