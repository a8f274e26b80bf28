"""What the test bed raises when it cannot go on."""


class ClusterError(Exception):
    """One line for the reader: what cannot be done, and the cure. The command line prints it and exits 1."""
