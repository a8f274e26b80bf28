"""Failures that a restart cannot cure."""


class ConfigurationError(Exception):
    """The model, the data or the volume does not fit the job; the message is one line that names the cure.

    A worker that ends with it exits with ``ExitCode.CONFIGURATION``.
    """
