"""Functions that are declared to be LayerNorms, and the tests of such declarations."""
