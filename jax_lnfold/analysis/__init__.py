"""What is known of a program: zero means, tolerated shifts, and its LayerNorms."""
