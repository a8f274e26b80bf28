"""What a worker keeps of one group for the next, and what it gives back."""

import weakref
from pathlib import Path

import torch

from pipelinejob_worker.pipeline.engine import Built
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.schedule import build_schedule
from pipelinejob_worker.protocol import WorkerConfig
from pipelinejob_worker.train.job import Trainer
from pipelinejob_worker.train.loop import StageLoop
from pipelinejob_worker.train.plan import Plan, cut
from tests.unit.worker.jobs import job
from tests.unit.worker.ranks import on_ranks


def test_weights_and_moments_of_a_group_are_gone_before_others_are_built(tmp_path: Path) -> None:
    assert on_ranks(1, gone, job(tmp_path, partition="Even"), False) == [{"weights": True, "moments": True}]


def test_of_weights_that_are_kept_only_the_moments_go(tmp_path: Path) -> None:
    assert on_ranks(1, gone, job(tmp_path, partition="Even"), True) == [{"weights": False, "moments": True}]


def gone(config: WorkerConfig, keep: bool) -> dict[str, bool]:
    """What of a stage that was trained is no more when the next group asks for its layers."""

    class Watched(Trainer):
        def _new(self, group: Group, plan: Plan) -> Built:
            told.update({name: tensor() is None for name, tensor in tensors.items()})
            return super()._new(group, plan)

    told: dict[str, bool] = {}
    trainer, group = Watched(config), Group(0, 1, torch.device("cpu"))
    schedule = build_schedule("1F1B", 1, 1, config.training.microbatches)
    plan = cut(config, trainer._model, schedule, group, None)
    tensors: dict[str, weakref.ref[torch.Tensor]] = {}
    built = trainer._build(group, plan, keep=keep)
    loop = StageLoop(config.training, trainer._model, schedule, plan.chunks, corpus=None, group=group, built=built)
    state = loop.optimizer.layer_state(0)
    tensors["weights"] = weakref.ref(next(loop.layers[0].parameters()))
    tensors["moments"] = weakref.ref(next(tensor for name, tensor in state.items() if name.startswith("exp_avg")))
    del loop, built, state
    trainer._build(group, plan, keep=keep)
    return told or {name: tensor() is None for name, tensor in tensors.items()}
