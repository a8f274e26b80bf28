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
    published = False
    if group.first:
        if bool((table[:, 0] == 1).all()):
            files = {name: _file(row.tolist()) for name, row in zip(names, table, strict=True)}
            published = _done("checkpoint not published", store.publish, step, files)
        if published:
            _done("old checkpoints not deleted", store.retain, keep)
        else:  # a full volume must not be kept full by what does not count
            _done("partial checkpoint not deleted", store.discard_partial)
    return group.gather(int(published))[0] == [1]


def _done(failure: str, action: Callable[..., None], *arguments: object) -> bool:
    """Whether the action went well; if not, log the failure."""
    try:
        action(*arguments)
    except OSError as error:
        log.warning(failure, error=str(error))
        return False
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
    step, layers = 0, dict[int, dict[str, torch.Tensor]]()
    while newest := max(row[0] for row in group.gather(next(iter(store.complete_steps()), 0))):
        read = _read(store, newest, names, shapes)
        if group.agree(read is not None) and read is not None:
            step, layers = newest, read
            break
        store.distrust(newest)
    if group.first:  # no stage writes before all, this one too, have made a step
        _done("partial checkpoints not deleted", store.discard_partial)
    return step, layers


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
