"""The one exception that means: the user can mend this.

The command line prints its message alone, without a traceback, and exits with its code.
"""


class UserError(Exception):
    """Bad input. The message names the field, file or flag, its value, and what would be right.

    `code` is the exit code: 2, but where the same command may do later.
    """

    def __init__(self, message: str = "", code: int = 2):
        super().__init__(message)
        self.code = code
