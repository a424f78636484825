"""The exceptions that users are meant to see."""


class UserError(Exception):
    """Something the user gave can't be used; the message is one line that names it and the next step.

    The command line prints the message and exits with code 2. Library callers can catch it like a `ValueError`.
    """


class ExportError(RuntimeError):
    """The network has no ONNX form that computes the same; nothing was written."""
