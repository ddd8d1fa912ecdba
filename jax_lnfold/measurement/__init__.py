"""What the means of LayerNorms amount to on data: sums per token, of a whole program."""
