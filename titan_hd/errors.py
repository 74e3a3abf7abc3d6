"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in configuration, data, checkpoint or mesh. The message is one line for each fault, which names the key
    or the file; it is shown without a traceback, and the exit status is 2. Any other exception is a bug of ours."""
