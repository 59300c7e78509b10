"""The one error that a user can cause and mend."""


class UserError(ValueError):
    """A wrong flag, file, key or length: what, got, expected, where; `main()` exits with 2."""
