"""Runs the first Python block of README.md, so that the quickstart cannot go stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def main() -> None:
    """Executes the block as a script of its own."""
    text = README.read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    if block is None:
        sys.exit("README.md: found no ```python block")
    # Leading blank lines make tracebacks name the lines of README.md.
    source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
    exec(compile(source, str(README), "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
