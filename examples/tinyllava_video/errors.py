"""The one error of this example."""


class InputError(ValueError):
    """Something given cannot be used; the message names it and says what to do."""
