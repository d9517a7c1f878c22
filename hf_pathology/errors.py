"""The errors that a user can mend: each message names the file and the remedy, and the command line prints it as one line."""


class UserError(ValueError):
    """A mistake in what was asked for (a path, an option, a table); the message says how to mend it."""


class SlideError(UserError):
    """One slide cannot be used; the other slides of the cohort are not concerned."""
