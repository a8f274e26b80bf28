"""Snapshots in memory that outlives the worker and the agent: a file for each piece and slot.

A file has its final size, and memory set aside for it, from the start. Its first page is the header; *valid* there is
cleared before the payload is touched and set after it is complete, so a process killed at any instruction leaves a
valid slot or one that says that it is not. Stores to shared memory are not reordered by the death of a process; the
checksum guards against errors of ours, and against a slot that is overwritten while it is sent.

The worker writes its own pieces; its agent writes those of the ranks it guards, and what it fetches while no worker
runs. Both may read everything.
"""

import fcntl
import json
import mmap
import os
import shutil
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.recovery import pages
from pipelinejob_worker.recovery.pieces import Held, Incarnation, Piece
from pipelinejob_worker.state.files import replace

SLOTS = 2
PAGE = 4096

_HEADER = struct.Struct("<8s6QI")
"""Magic, valid, step, epoch, attempt, size of the payload, layers of the model, CRC-32 of the payload."""

_MAGIC = b"PJSLOT01"
_VALID = struct.Struct("<Q")
_VALID_AT = 8
_IDENTITY = "identity"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SlotDamagedError(Exception):
    """The payload of a slot is not what was written; the slot is invalid now."""


class SlotMissingError(Exception):
    """There is no valid slot of that piece and step, or none that is large enough."""


class Place(NamedTuple):
    """Which file; ``copied``: of another rank's piece."""

    copied: bool
    piece: Piece
    slot: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{'copy' if self.copied else 'own'}-{self.piece}.{self.slot}"


Useless = Callable[[Place, int | None], bool]
"""Whether a slot may be taken for another piece, given the step that it holds, None for a slot that is not valid."""


@dataclass(frozen=True)
class _Header:
    step: int
    written: Incarnation
    size: int
    layers: int
    checksum: int

    def describe(self, place: Place) -> Held:
        return Held(
            piece=place.piece,
            step=self.step,
            written=self.written,
            size=self.size,
            layers=self.layers,
            copied=place.copied,
        )


class Writing:
    """A slot that is being filled: invalid until ``commit``."""

    def __init__(self, memory: mmap.mmap, held: Held) -> None:
        self._memory = memory
        self._held = held
        _VALID.pack_into(memory, _VALID_AT, 0)
        self.payload = memoryview(memory)[PAGE : PAGE + held.size]
        """Where the bytes go."""

    def commit(self, checksum: int | None = None) -> None:
        """Declare the payload complete. ``checksum``: its CRC-32, if the caller has computed it."""
        checksum = zlib.crc32(self.payload) if checksum is None else checksum
        self.payload.release()
        held = self._held
        _HEADER.pack_into(self._memory, 0, _MAGIC, 0, held.step, *held.written, held.size, held.layers, checksum)
        _VALID.pack_into(self._memory, _VALID_AT, 1)


class SlotStore:
    """The slots of one rank. Worker and agent have an object each, on the same directory.

    ``limit_bytes`` is what all files together may take: the size of the volume.
    """

    def __init__(self, directory: Path, job_uid: str, limit_bytes: int) -> None:
        """Open what is there, or drop it if it is another job's or from before a restart of the machine.

        Raises OSError.
        """
        self._directory = directory
        self._limit = limit_bytes
        self._maps: dict[str, tuple[int, mmap.mmap]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        identity = json.dumps({"format": 1, "job": job_uid, "boot": _BOOT_ID.read_text().strip()}).encode()
        with self._locked():
            path = directory / _IDENTITY
            if not path.exists() or path.read_bytes() != identity:
                _clear(directory)
                replace(path, identity)

    def check_room(self, sizes: Mapping[Piece, int], *, copied: bool, slots: int = SLOTS) -> None:
        """Raise ConfigurationError if ``reserve`` would find the volume too small."""
        with self._locked():
            self._unfit(sizes, copied, slots)

    def reserve(self, sizes: Mapping[Piece, int], *, copied: bool, slots: int = SLOTS) -> None:
        """Have slots of ``sizes`` bytes for each piece; those that fit are kept as they are.

        Their memory is set aside, and comes page by page as it is written or by ``populate``.
        Raises ConfigurationError, before anything is changed, when the volume is too small.
        """
        with self._locked():
            for place, size in self._unfit(sizes, copied, slots).items():
                self._create(place, size)

    def recycle(self, sizes: Mapping[Piece, int], useless: Useless) -> None:
        """Have own slots, one for each piece, as far as ``useless`` ones of the same size are there to be taken.

        Their pages come with them. Nobody may be writing to them.
        """
        with self._locked():
            present = self._sizes()
            free = defaultdict(list)
            for place, size in present.items():
                header = self._header(place)
                if useless(place, header.step if header else None):
                    free[size].append(place)
            for place, size in _places_of(sizes, copied=False, slots=1).items():
                if place not in present and free[size]:
                    taken = free[size].pop()
                    _VALID.pack_into(self._map(taken), _VALID_AT, 0)
                    self._rename(taken, place)

    def populate(self, sizes: Mapping[Piece, int], *, copied: bool, slots: int = SLOTS) -> None:
        """Have all pages of slots that are there; they may be in use meanwhile. Raises SlotMissingError."""
        for memory in [self._map(place) for place in _places_of(sizes, copied, slots)]:
            pages.populate(memory)

    def begin(self, held: Held) -> Writing:
        """Invalidate a slot of the piece and return it to be filled with what ``held`` describes.

        It is the slot of the same step, which another incarnation wrote; else one that is not valid; else the older.
        Raises SlotMissingError when none is reserved or they are too small, ValueError when that very step of that
        incarnation is held already, or only newer ones.
        """
        place = self._next_place(held)
        memory = self._map(place)
        if held.size > len(memory) - PAGE:
            raise SlotMissingError(f"piece {held.piece} has {held.size} bytes; its slots hold {len(memory) - PAGE}")
        return Writing(memory, held)

    def adopt(self, held: Held) -> None:
        """Make the copy ``held`` an own piece, in the slot that ``begin`` would take: its file gets that name.

        Whoever reads it verifies it. Raises SlotMissingError, and ValueError like ``begin``.
        """
        with self._locked():
            source = self._place(held)
            if source is None:
                raise _missing(held)
            target = self._next_place(held.model_copy(update={"copied": False}))
            self._rename(source, target)

    def held(self) -> list[Held]:
        """Return all valid slots, own ones first, by piece and step."""
        valid = [header.describe(place) for place in self._places() if (header := self._header(place))]
        return sorted(valid, key=lambda held: (held.copied, held.piece, held.step))

    def holds(self, held: Held) -> bool:
        """Whether exactly this is in a valid slot."""
        return self._place(held) is not None

    def find(self, held: Held) -> tuple[memoryview, int]:
        """Return the payload of exactly this, and its CRC-32; a copy may have been adopted since it was told of.

        Raises SlotMissingError.
        """
        for copied in sorted({held.copied, False}, reverse=True):  # in this order an adoption meanwhile does no harm
            if self.holds(held.model_copy(update={"copied": copied})):
                with suppress(SlotMissingError):
                    return self.read(held.piece, held.step, copied=copied, verify=False)
        raise _missing(held)

    def read(self, piece: Piece, step: int, *, copied: bool, verify: bool = True) -> tuple[memoryview, int]:
        """Return the payload, which is the slot's own memory, and its CRC-32.

        Raises SlotMissingError, or SlotDamagedError when ``verify`` finds another checksum.
        """
        for slot in range(SLOTS):
            place = Place(copied, piece, slot)
            header = self._header(place)
            if header is None or header.step != step:
                continue
            memory = self._map(place)
            payload = memoryview(memory)[PAGE : PAGE + header.size]
            if verify and zlib.crc32(payload) != header.checksum:
                payload.release()
                _VALID.pack_into(memory, _VALID_AT, 0)
                raise SlotDamagedError(f"piece {piece} of step {step}: the checksum is wrong")
            return payload, header.checksum
        raise SlotMissingError(f"piece {piece} of step {step} is not held")

    def invalidate(self, wrong: Callable[[Held], bool]) -> list[Held]:
        """Invalidate all slots that are ``wrong``; return them."""
        dropped = []
        for place in self._places():
            header = self._header(place)
            if header and wrong(header.describe(place)):
                _VALID.pack_into(self._map(place), _VALID_AT, 0)
                dropped.append(header.describe(place))
        return dropped

    def retain(self, own: Collection[Piece], copies: Collection[Piece]) -> None:
        """Give back the memory of all other pieces."""
        with self._locked():
            for place in self._places():
                if place.piece not in (copies if place.copied else own):
                    self._forget(place.name)
                    (self._directory / place.name).unlink()

    def used_bytes(self) -> int:
        """Memory that all slots take."""
        return sum(self._sizes().values())

    def close(self) -> None:
        """Give back the mappings; payloads must not be in use any more."""
        for _, memory in self._maps.values():
            memory.close()
        self._maps.clear()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the other process from making or removing files."""
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _next_place(self, held: Held) -> Place:
        """The slot to fill with this. Raises ValueError like ``begin``."""
        places = [Place(held.copied, held.piece, slot) for slot in range(SLOTS)]
        headers = {place: self._header(place) for place in places}
        if any(header and (header.step, header.written) == (held.step, held.written) for header in headers.values()):
            raise ValueError(f"piece {held.piece} of step {held.step}, written by {held.written}, is held already")

        def preference(place: Place) -> tuple[bool, int]:
            header = headers[place]
            return (header is not None and header.step != held.step, header.step if header else -1)

        place = min(places, key=preference)
        chosen = headers[place]
        if chosen and chosen.step > held.step:
            raise ValueError(f"piece {held.piece}: both slots hold newer steps than {held.step}")
        return place

    def _place(self, held: Held) -> Place | None:
        """Where exactly this is, None if it is not held."""
        places = [Place(held.copied, held.piece, slot) for slot in range(SLOTS)]
        return next((at for at in places if (header := self._header(at)) and header.describe(at) == held), None)

    def _places(self) -> list[Place]:
        return [place for path in self._directory.iterdir() if (place := _place_of(path.name))]

    def _sizes(self) -> dict[Place, int]:
        return {place: (self._directory / place.name).stat().st_size for place in self._places()}

    def _unfit(self, sizes: Mapping[Piece, int], copied: bool, slots: int) -> dict[Place, int]:
        """The files that are missing or of another size, and the size that they should have; checks the room."""
        present = self._sizes()
        places = _places_of(sizes, copied, slots)
        wrong = {place: size for place, size in places.items() if present.get(place) != size}
        kept = sum(size for place, size in present.items() if place not in wrong)
        replaced = sum(present.get(place, 0) for place in wrong)
        self._check_room(kept + sum(wrong.values()), sum(wrong.values()) - replaced)
        return wrong

    def _check_room(self, total: int, growth: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if total > self._limit or growth > free:
            raise ConfigurationError(
                f"spec.recovery: the snapshots need {total} bytes in {self._directory}, {growth} of them new; allowed: "
                f"{self._limit} in all, and {free} are free; give the stages more memory, or use more stages"
            )

    def _create(self, place: Place, size: int) -> None:
        path = self._directory / place.name
        self._forget(place.name)
        path.unlink(missing_ok=True)
        new = path.with_name(f".{path.name}")
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # on tmpfs this is the memory itself, still to be zeroed
            new.rename(path)
        except OSError:
            new.unlink()
            raise
        finally:
            os.close(descriptor)

    def _rename(self, old: Place, new: Place) -> None:
        (self._directory / old.name).replace(self._directory / new.name)
        self._forget(old.name)

    def _map(self, place: Place) -> mmap.mmap:
        """The file's memory; mapped anew if the other process has made a new file of that name."""
        try:
            descriptor = os.open(self._directory / place.name, os.O_RDWR)
        except FileNotFoundError:
            raise SlotMissingError(f"no slot is reserved for piece {place.piece}") from None
        try:
            status = os.fstat(descriptor)
            known = self._maps.get(place.name)
            if known and known[0] == status.st_ino:
                return known[1]
            self._forget(place.name)
            memory = mmap.mmap(descriptor, status.st_size, flags=mmap.MAP_SHARED)
        finally:
            os.close(descriptor)
        self._maps[place.name] = status.st_ino, memory
        return memory

    def _forget(self, name: str) -> None:
        """Drop a mapping; its memory is given back when nobody uses a view of it any more."""
        self._maps.pop(name, None)

    def _header(self, place: Place) -> _Header | None:
        """The header of a slot, None if the slot is not valid."""
        try:
            descriptor = os.open(self._directory / place.name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(descriptor, _HEADER.size, 0)
            room = os.fstat(descriptor).st_size - PAGE
        finally:
            os.close(descriptor)
        if len(data) < _HEADER.size:
            return None
        magic, valid, step, epoch, attempt, size, layers, checksum = _HEADER.unpack(data)
        if magic != _MAGIC or valid != 1 or size > room:
            return None
        return _Header(step, Incarnation(epoch, attempt), size, layers, checksum)


def _missing(held: Held) -> SlotMissingError:
    return SlotMissingError(f"piece {held.piece} of step {held.step}, by {held.written}, is not held")


def file_bytes(sizes: Mapping[Piece, int]) -> int:
    """Return the memory that ``reserve`` takes for pieces of these sizes."""
    return SLOTS * sum(_file_size(size) for size in sizes.values())


def _places_of(sizes: Mapping[Piece, int], copied: bool, slots: int) -> dict[Place, int]:
    """The files for pieces of these sizes, and the files' sizes."""
    return {Place(copied, piece, slot): _file_size(size) for piece, size in sizes.items() for slot in range(slots)}


def _file_size(size: int) -> int:
    return PAGE + -(-size // PAGE) * PAGE


def _place_of(name: str) -> Place | None:
    kind, _, rest = name.partition("-")
    piece, _, slot = rest.partition(".")
    if kind not in ("own", "copy"):
        return None
    layer, share, shares = (int(number) for number in piece.split("-"))
    return Place(kind == "copy", Piece(layer, share, shares), int(slot))


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
