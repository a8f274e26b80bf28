"""Token ids in NumPy's own format: what a header says of the file."""

from collections.abc import Sequence

import numpy as np

from pipelinejob_worker.data.refusal import refusal, unreadable
from pipelinejob_worker.data.tokens import TokenFile

_ALLOWED = "whole .npy files with integers in one dimension"


def array_files(paths: Sequence[str]) -> list[TokenFile]:
    """Return the tokens in ``.npy`` files. Raises ConfigurationError for what is no array of ids; nothing is unpickled.

    Whether the ids are the model's is checked where they are read.
    """
    return [_array_file(path) for path in paths]


def _array_file(path: str) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, EOFError) as error:
        raise refusal("files", f"{path} is no whole .npy file", _ALLOWED, "write it again with numpy.save") from error
    if not isinstance(array, np.memmap):  # an archive of several arrays
        array.close()
        raise refusal("files", f"{path} is a .npz archive", _ALLOWED, "save its arrays one by one with numpy.save")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise refusal(
            "files",
            f"{path} has shape {list(array.shape)} and type {array.dtype}",
            _ALLOWED,
            "save it as array.reshape(-1) of an integer type",
        )
    return TokenFile(path, array.dtype, len(array), array.offset)
