"""The one exception the programs show as a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user passed or a file they named is wrong. The message is one sentence that says what and
    what to do.
    """
