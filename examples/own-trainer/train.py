"""Train a small GPT-2 with the Trainer of the transformers library, as one rank of a PipelineJob.

The Trainer finds its rank and the rendezvous in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT); what to train is read from the job's own spec. Each rank holds the whole model and its share of the batch.
"""

import json
import os
import signal
import sys
from glob import glob
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

CONFIG = Path("/etc/pipelinejob/config")
CHECKPOINTS = Path("/checkpoint")


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The bytes of all files, cut into samples of ``context`` tokens."""

    def __init__(self, patterns: list[str], context: int) -> None:
        files = sorted({name for pattern in patterns for name in glob(pattern, recursive=True)})  # noqa: PTH207
        text = b"".join(Path(name).read_bytes() for name in files)
        if len(text) < context:
            sys.exit(f"train.data.files: {len(files)} files match, with {len(text)} bytes; allowed: {context} or more")
        self._samples = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, context, context)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample; the model shifts the labels by itself."""
        tokens = self._samples[index].long()
        return {"input_ids": tokens, "labels": tokens}


class Tell(TrainerCallback):
    """Say which step is saved: the log is all that a cluster sees of a program of one's own."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Print the step, once for all ranks."""
        if state.is_world_process_zero:
            print(f"saved step {state.global_step}", flush=True)


def main() -> None:
    """Train to the last step of the job, from the newest checkpoint if there is one."""
    # Process 1 of a container hears only the signals that it handles: without this, a stop takes the grace period.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = json.loads(CONFIG.read_text())
    train, preset = config["train"], config["model"]["preset"]
    if train["globalBatchSize"] % size:
        sys.exit(f"train.globalBatchSize: {train['globalBatchSize']} is not divisible by {size} ranks")
    newest = get_last_checkpoint(CHECKPOINTS)
    stage, stages = os.environ["PIPELINE_STAGE"], os.environ["PIPELINE_STAGES"]
    print(f"rank {rank} of {size}, stage {stage} of {stages}, goes on from {newest}", flush=True)

    torch.manual_seed(train["seed"])
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=preset["context"],
            n_embd=preset["width"],
            n_layer=preset["layers"],
            n_head=preset["heads"],
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(CHECKPOINTS),
        max_steps=train["steps"],
        per_device_train_batch_size=train["globalBatchSize"] // size,
        learning_rate=float(train["optimizer"]["learningRate"]),
        seed=train["seed"],
        logging_steps=1,
        save_steps=config["checkpoint"]["everySteps"],
        save_total_limit=config["checkpoint"]["keep"],
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    data = Windows(train["data"]["files"], preset["context"])
    Trainer(model, arguments, train_dataset=data, callbacks=[Tell()]).train(resume_from_checkpoint=newest)


if __name__ == "__main__":
    main()
