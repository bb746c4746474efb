"""The one exception that means: the user's input is at fault, not the program."""


class InputError(ValueError):
    """Bad data, weights or arguments; the message is one line that says what to do.

    Scripts turn it into "error: <message>" on stderr and exit code 2.
    """
