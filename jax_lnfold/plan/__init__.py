"""Plans: the edits of a parameter tree as plain data, their file, and how a leaf is edited."""
