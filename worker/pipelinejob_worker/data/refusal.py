"""How every refusal of the data reads."""

from pipelinejob_worker.errors import ConfigurationError


def refusal(field: str, problem: str, allowed: str, cure: str) -> ConfigurationError:
    """Return the error for ``spec.train.data.<field>``: one line with what is wrong, what is allowed and the cure."""
    return ConfigurationError(" ".join(f"spec.train.data.{field}: {problem}; allowed: {allowed}; {cure}".split()))


def unreadable(path: str, error: OSError) -> ConfigurationError:
    """Return the error for a file that exists but cannot be opened or read."""
    return refusal(
        "files",
        f"{path} cannot be read: {error.strerror or error}",
        "files that the worker's user may read",
        "change their mode or the pod's securityContext",
    )
