"""The version of the library, for package builders, `jax_lnfold.__version__` and ``--version``."""

VERSION = "0.1.0"
