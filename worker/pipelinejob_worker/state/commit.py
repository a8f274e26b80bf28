"""How the stages agree on a checkpoint: all wrote it, or it does not count; all can read it, or none does."""

from collections.abc import Callable, Mapping, Sequence

import structlog
import torch

from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.state.checkpoint import CheckpointDamagedError, CheckpointStore, LayerFile

log = structlog.get_logger()

Tensors = Mapping[str, torch.Tensor]

_DIGEST_WORDS = 4  # a SHA-256 as four integers of 64 bits


def save(
    group: Group,
    store: CheckpointStore,
    step: int,
    *,
    names: Sequence[str],
    mine: range,
    state_of: Callable[[int], Tensors],
    keep: int,
) -> bool:
    """Save a checkpoint of ``step``; collective. Return whether it is complete, the same on all stages.

    A failure, on whichever stage, is logged there and leaves the previous checkpoint as it is.
    """
    table = torch.zeros(len(names), 2 + _DIGEST_WORDS, dtype=torch.int64)
    try:
        for index in mine:
            table[index] = _row(store.write_layer(step, names[index], state_of(index)))
    except OSError as error:
        table[mine.start : mine.stop] = 0
        log.warning("checkpoint not written", step=step, error=str(error))
    table = group.sum(table)
    written = bool((table[:, 0] == 1).all())
    published = False
    if written and group.first:
        files = {name: _file(row.tolist()) for name, row in zip(names, table, strict=True)}
        published = _publish(store, step, files, keep)
    return group.gather(int(published))[0] == [1]


def _publish(store: CheckpointStore, step: int, files: Mapping[str, LayerFile], keep: int) -> bool:
    try:
        store.publish(step, files)
    except OSError as error:
        log.warning("checkpoint not published", step=step, error=str(error))
        return False
    try:
        store.retain(keep)
    except OSError as error:
        log.warning("old checkpoints not deleted", step=step, error=str(error))
    return True


def resume(
    group: Group,
    store: CheckpointStore,
    names: Sequence[str],
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> tuple[int, dict[int, dict[str, torch.Tensor]]]:
    """Find the newest checkpoint that every stage can read; return step and this stage's layers; collective.

    ``shapes`` are the tensors that each of this stage's layers must have. When one stage finds damage, with a
    line in its log, all take the checkpoint before. Step 0 without layers: there is none. Raises
    ConfigurationError when a checkpoint is of another model or seed.
    """
    while newest := max(row[0] for row in group.gather(next(iter(store.complete_steps()), 0))):
        layers = _read(store, newest, names, shapes)
        if group.agree(layers is not None) and layers is not None:
            return newest, layers
        store.distrust(newest)
    return 0, {}


def _read(
    store: CheckpointStore,
    step: int,
    names: Sequence[str],
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> dict[int, dict[str, torch.Tensor]] | None:
    try:
        manifest = store.manifest(step)
        return {index: store.read_layer(manifest, names[index], shapes[index]) for index in shapes}
    except CheckpointDamagedError as error:
        log.warning("checkpoint is damaged; the one before is taken", step=step, error=str(error))
        return None


def _row(file: LayerFile) -> torch.Tensor:
    digest = bytes.fromhex(file.sha256)
    words = [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in range(0, len(digest), 8)]
    return torch.tensor([1, file.size, *words], dtype=torch.int64)


def _file(row: Sequence[int]) -> LayerFile:
    digest = b"".join(word.to_bytes(8, "little", signed=True) for word in row[2:])
    return LayerFile(size=row[1], sha256=digest.hex())
