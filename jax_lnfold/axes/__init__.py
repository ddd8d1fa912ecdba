"""Axis sets: which positions of a value a mean is taken over, and where they are after a move."""
