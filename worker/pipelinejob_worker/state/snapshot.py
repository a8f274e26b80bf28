"""Copies of a stage's layers at one step, made so fast that training can go on."""

from collections.abc import Iterator, Mapping

import torch

from pipelinejob_worker.state.layout import Layout, Tensors


class FileImage:
    """The bytes of a safetensors file in one buffer, and its tensors as views into it.

    So a copy into the tensors is all that it takes to make the file's content: the thread that writes it has nothing to
    convert, which would keep Python's interpreter lock from the thread that trains.
    """

    def __init__(self, tensors: Tensors, *, pinned: bool) -> None:
        """Lay out a file for tensors like ``tensors``; ``pinned`` lets a CUDA device copy on its own."""
        self._layout = Layout(tensors)
        prefix = self._layout.prefix
        self._buffer = torch.empty(self._layout.size, dtype=torch.uint8, pin_memory=pinned)
        self._buffer[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
        self._views = {
            key: self._buffer[place.start : place.end].view(place.dtype).view(place.shape)
            for key, place in self._layout.places.items()
        }

    def fits(self, tensors: Tensors) -> bool:
        """Whether ``tensors`` have the names, shapes and types that the file was laid out for."""
        return self._layout.fits(tensors)

    def copy(self, tensors: Tensors) -> None:
        """Copy ``tensors`` into the file; from a CUDA device the copy is queued on its current stream."""
        with torch.no_grad():
            for key, view in self._views.items():
                view.copy_(tensors[key], non_blocking=True)

    @property
    def content(self) -> memoryview:
        """The bytes of the file."""
        return self._buffer.numpy().data


class Snapshot:
    """A stage's layers as files in memory, in buffers that each snapshot uses again."""

    def __init__(self) -> None:
        self._images = dict[str, FileImage]()
        self._copied: torch.cuda.Event | None = None

    def take(self, layers: Mapping[str, Tensors]) -> None:
        """Copy the tensors of each layer, which may change as soon as this returns.

        On CUDA they may be changed by work on the current stream only: the copy is queued there and is done when
        ``wait`` returns.
        """
        cuda = any(tensor.is_cuda for tensors in layers.values() for tensor in tensors.values())
        images, self._images = self._images, {}
        for name, tensors in layers.items():
            image = images.pop(name, None)
            if image is None or not image.fits(tensors):
                image = FileImage(tensors, pinned=cuda)
            image.copy(tensors)
            self._images[name] = image
        if cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> None:
        """Wait until the copy is done; any thread may call this."""
        if self._copied:
            self._copied.synchronize()

    def files(self) -> Iterator[tuple[str, memoryview]]:
        """Each layer's name and the bytes of its file."""
        return ((name, image.content) for name, image in self._images.items())
