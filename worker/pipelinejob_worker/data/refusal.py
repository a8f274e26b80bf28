"""How every refusal of the data reads."""

from pipelinejob_worker.errors import ConfigurationError


def refusal(field: str, problem: str, allowed: str, cure: str) -> ConfigurationError:
    """Return the error for ``spec.train.data.<field>``: what is wrong, what is allowed and the cure.

    It is one line of valid Unicode, whatever names of files it has.
    """
    message = f"spec.train.data.{field}: {problem}; allowed: {allowed}; {cure}"
    return ConfigurationError(message.replace("\n", " ").encode(errors="backslashreplace").decode())


def unreadable(path: str, error: OSError) -> ConfigurationError:
    """Return the error for a file that exists but cannot be opened."""
    return refusal(
        "files",
        f"{path} cannot be read: {error.strerror or error}",
        "files that the worker's user may read",
        "change their mode or the pod's securityContext",
    )
