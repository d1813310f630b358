"""What a user did wrong, in one line: entry scripts print it and exit with code 2, without a traceback."""


class UserError(ValueError):
    """Says what was wrong, what was expected, and what to do next."""
