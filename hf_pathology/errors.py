"""The errors that a user can mend: each message names the file and the remedy, and the command line prints it as one line."""


class UserError(ValueError):
    """A mistake in what was asked for (a path, an option, a table); the message says how to mend it."""


def require_at_least(least: float, **options: float | None) -> None:
    """Raises UserError for the first of the named `options` that is less than `least`, or no number; None is passed over."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise UserError(f"{name} is {value}: it must be at least {least}")


class SlideError(UserError):
    """One slide cannot be used; the other slides of the cohort are not concerned."""
