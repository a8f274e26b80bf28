"""Which window of the text is which sample: pure functions of the seed, so that there is no position to restore."""

from pipelinejob_worker.models.randomness import mix

_ROUNDS = 4
_SPLIT = 1
"""Tells the seed of the split from those of the epochs' orders."""


def permuted(position: int, size: int, seed: int, epoch: int) -> int:
    """Return where ``position`` of ``[0, size)`` goes in the epoch's order: a bijection that needs no memory.

    A Feistel network (Luby and Rackoff 1988) over the next power of four, walked until it lands inside (Black
    and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Unlike a library's shuffle it cannot change
    with a version.
    """
    half = (max(size - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(seed, epoch, number, right) & mask)
        position = left << half | right
        if position < size:
            return position


class Order:
    """The windows ``[0, windows)`` as samples for training, in another order each epoch, and for validation.

    One permutation of all windows, fixed by the seed, puts the validation windows last: they are the same for the
    whole job, and training never sees them. Without validation the windows are not permuted by it at all.
    """

    def __init__(self, windows: int, validation_percent: int, seed: int) -> None:
        self.validation = max(1, windows * validation_percent // 100) if validation_percent and windows else 0
        """Number of windows for validation, rounded down, but at least one if there is a percentage."""
        self.training = windows - self.validation
        """Number of windows for training: the samples of an epoch."""
        self._windows = windows
        self._seed = seed

    def training_window(self, position: int) -> int:
        """Return the window of sample ``position``, counted from the beginning of training over all epochs."""
        epoch, offset = divmod(position, self.training)
        return self._split(permuted(offset, self.training, self._seed, epoch))

    def validation_window(self, index: int) -> int:
        """Return the window of validation sample ``index``."""
        return self._split(self.training + index)

    def _split(self, place: int) -> int:
        return permuted(place, self._windows, mix(self._seed, _SPLIT), 0) if self.validation else place
