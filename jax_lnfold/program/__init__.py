"""The program that is analysed: its trace, the flat graph of values, what primitives are."""
