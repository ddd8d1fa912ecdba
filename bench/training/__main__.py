"""Entry point of ``python -m bench.training``."""

import os
import sys

# One thread: other cores stay free, and a run can be repeated bit by bit.
os.environ.setdefault("NPROC", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

from .cli import main

sys.exit(main())
