"""What a user did wrong, in one line: entry scripts print it and exit with code 2, without a traceback."""


class UserError(ValueError):
    """Says what was wrong, what was expected, and what to do next."""


def would_run_code(error: Exception) -> bool:
    """Did torch refuse a pickle because it holds more than data, and not because it is damaged?"""
    return any(word in str(error) for word in ("GLOBAL", "allowlisted", "Trying to call reduce"))
