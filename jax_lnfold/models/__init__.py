"""Models as objects (Flax NNX, Equinox, Flax linen): taken apart, folded, put together again."""
