"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """Bad input. The message names the field or file:line, the value, what is allowed and what to do.

    Recipes print it as one line and exit with status 2; a traceback is left for our own mistakes.
    """
