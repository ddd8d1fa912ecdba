"""The folded program: means that vanish are removed, scales are deferred."""
