"""Where to center: the cheapest cut, its proof and its reasons, and the scales to merge."""
