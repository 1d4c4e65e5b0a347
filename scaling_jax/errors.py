"""The one exception that means: the user can mend this.

The command line prints its message alone, without a traceback, and exits with code 2.
"""


class UserError(Exception):
    """Bad input. The message names the field, file or flag, its value, and what would be right."""
