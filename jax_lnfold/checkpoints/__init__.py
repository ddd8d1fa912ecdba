"""Checkpoints on disk: their formats, and a plan followed leaf by leaf."""
