"""The kinds of edits that a plan is made of: one module says all that there is to say of a kind."""
