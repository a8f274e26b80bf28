"""What the training engine can do, as users ask for it: schedules, copies, models, and faults that end in words."""

from typing import Any

import pytest

from tests.cluster import faults
from tests.e2e import kit
from tests.e2e.losses import of_one_process

CHECKPOINT = {"volumeClaimName": "state", "everySteps": 10, "keep": 2}


def spec_of(schedule: str, chunks: int, **members: Any) -> kit.Object:
    spec = kit.spec(2, 20, checkpoint=CHECKPOINT, **members)
    spec["model"]["preset"] |= {"layers": 4, "tieEmbeddings": True}
    spec["train"]["schedule"] = {"name": schedule, "chunksPerStage": chunks}
    return spec


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("LoopedBFS", 3)],
)
def test_a_schedule_with_several_chunks(namespace: kit.Namespace, schedule: str, chunks: int) -> None:
    namespace.claim("state")
    spec = spec_of(schedule, chunks)
    run = kit.Job(namespace, "chunks", spec).create()
    run.wait_succeeded()
    assert tuple(run.losses("state")) == of_one_process(spec)
    assert all(stage["layers"].count(",") == chunks - 1 for stage in run.status["stages"])


def test_two_pipelines_train_one_model(namespace: kit.Namespace) -> None:
    namespace.claim("state")
    spec = spec_of("DualPipeV", 2, pipelines=2)
    spec["train"] |= {"steps": 60, "microbatches": 8, "validateEverySteps": 20}
    spec["train"]["data"] |= {"validationPercent": 5}
    spec["train"]["optimizer"] |= {"warmupSteps": 5, "decay": "Linear"}
    run = kit.Job(namespace, "copies", spec).create()
    run.wait("Checkpointed", "True", "Saved")
    run.wait_succeeded()

    assert tuple(run.losses("state")) == of_one_process(spec)
    status = run.status
    assert {pod["metadata"]["name"] for pod in run.pods()} == {f"copies-p{p}-s{s}-a0" for p in (0, 1) for s in (0, 1)}
    assert [(stage["pipeline"], stage["index"]) for stage in status["stages"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    progress = status["progress"]
    assert progress["validationStep"] == 60
    assert 0 < float(progress["validationLoss"]) < 5
    assert progress["bubbleLimitPercent"] == 4  # (p-1) / (6m+p-1) with p = 2 and m = 4 a pipeline
    assert progress["stepMilliseconds"] > 0
    assert progress["stepPredictedMilliseconds"] > 0
    assert status["summary"]["stages"] == "4/4"


def test_a_damaged_checkpoint_is_passed_over_and_the_status_says_so(namespace: kit.Namespace) -> None:
    namespace.claim("state")
    spec = kit.spec(2, 400, checkpoint=CHECKPOINT)
    run = kit.Job(namespace, "damaged", spec).create()
    run.wait_step(25)
    run.patch(suspend=True)
    run.wait("Suspended")
    newest = run.status["progress"]["lastCheckpointStep"]
    flip = (
        f"path = '/volume/step-{newest:09d}/blocks.1.safetensors'; data = bytearray(open(path, 'rb').read()); "
        "data[-7] ^= 1; open(path, 'wb').write(data)"
    )
    namespace.run("state", "python3", "-c", flip)
    run.patch(suspend=False)
    told = run.wait("Checkpointed", "False", "CheckpointDamaged")
    assert f"the checkpoint of step {newest} was not used" in told["message"]
    assert "blocks.1.safetensors: the SHA-256 is not that of the manifest" in told["message"]
    run.wait_succeeded()
    run.wait_events("CheckpointDamaged")
    assert tuple(run.losses("state")) == of_one_process(spec)


def test_training_goes_on_while_the_volume_is_full_or_forbids_writing(namespace: kit.Namespace) -> None:
    namespace.claim("state", "ReadWriteOnce")  # so that both stages are on one node
    claim = kit.wait_for("the claim is bound", lambda: bound(namespace, "state"))
    spec = kit.spec(2, 1500, checkpoint=CHECKPOINT)
    run = kit.Job(namespace, "full", spec)
    with faults.small_volume(claim, "2m") as volume:  # holds two checkpoints, and not a third
        run.create()
        full = run.wait("Checkpointed", "False", "CheckpointFailed")
        assert "No space left on device" in full["message"]
        assert "the newest is of step 20" in full["message"]
        volume.resize("64m")
        run.wait("Checkpointed", "True", "Saved")
        volume.allow_writing(False)
        forbidden = run.wait("Checkpointed", "False", "CheckpointFailed")
        assert "Permission denied" in forbidden["message"]
        volume.allow_writing(True)
        run.wait_succeeded()
    assert run.status["restarts"] == 0
    assert run.status["progress"]["lastCheckpointStep"] == 1500


def bound(namespace: kit.Namespace, claim: str) -> str:
    """Name of a claim's volume, empty before it has one."""
    return str(kit.get("pvc", claim, "-n", namespace.name)["spec"].get("volumeName", ""))


MAKE_LLAMA = """
import json, sys, torch
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

directory, vocabulary = Path("/volume/llama"), 300
torch.manual_seed(0)
config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="40KB")
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
sentences = [f"{n} and {n + 1} are {2 * n + 1}." for n in range(2000)]
tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet))
tokenizer.save(str(directory / "tokenizer.json"))
Path("/volume/lines.jsonl").write_text("".join(json.dumps({"text": line * 8}) + "\\n" for line in sentences))
"""

RELOAD = """
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file

model = AutoModelForCausalLM.from_pretrained("/volume/exported").eval()
block = load_file("/checkpoint/step-000000060/layers.1.safetensors")
own = model.model.layers[1].state_dict()
prefix = "layers.1.weight."
saved = {name.removeprefix(prefix): tensor for name, tensor in block.items() if name.startswith(prefix)}
assert len(own) == len(saved) and all(torch.equal(own[name], saved[name]) for name in own), sorted(saved)
print("reloaded", sum(parameter.numel() for parameter in model.parameters()))
"""


def llama(namespace: kit.Namespace, **members: Any) -> kit.Object:
    """A job that continues a small Llama with its own tokenizer; both are made on a volume first."""
    namespace.claim("models")
    namespace.run("models", "python3", "-c", MAKE_LLAMA)
    spec = kit.spec(3, 60, **members)
    spec["model"] = {"huggingFace": {"path": "/models/llama", "context": 32}}
    data = {"files": ["/models/*.jsonl"], "format": "JsonLines", "tokenizer": "HuggingFace", "packing": "Documents"}
    spec["train"] |= {"data": data}
    mount = {"name": "models", "mountPath": "/models"}
    spec["template"]["spec"]["containers"][0]["volumeMounts"].append(mount)
    spec["template"]["spec"]["volumes"].append({"name": "models", "persistentVolumeClaim": {"claimName": "models"}})
    return spec


def test_a_decoder_of_transformers_trains_and_is_exported(namespace: kit.Namespace) -> None:
    namespace.claim("state")
    run = kit.Job(namespace, "llama", llama(namespace, checkpoint=CHECKPOINT)).create()
    run.wait_succeeded()
    losses = run.losses("state")
    assert losses[-1] < 0.8 * losses[0]

    both = {"/checkpoint": {"persistentVolumeClaim": {"claimName": "state"}}}
    files = ("--checkpoint", "/checkpoint/step-000000060", "--model", "/volume/llama", "--output", "/volume/exported")
    export = ("python3", "-m", "pipelinejob_worker.models.hugging_face.export", *files)
    namespace.run("models", *export, mounts=both)
    assert "reloaded" in namespace.run("models", "python3", "-c", RELOAD, mounts=both)


FAULTS = {
    "truncated": (
        "import glob, os; path = sorted(glob.glob('/volume/llama/*.safetensors'))[0]; "
        "os.truncate(path, os.path.getsize(path) // 2)",
        ("spec.model.huggingFace.path", ".safetensors"),
    ),
    "missing": (
        "import glob; from safetensors.torch import load_file, save_file\n"
        "for path in glob.glob('/volume/llama/*.safetensors'):\n"
        "    tensors = load_file(path); tensors.pop('model.layers.2.mlp.up_proj.weight', None)\n"
        "    save_file(tensors, path, {'format': 'pt'})",
        ("spec.model.huggingFace.path", "layers.2.mlp.up_proj.weight"),
    ),
    "tokenizer": (
        "import json, pathlib; path = pathlib.Path('/volume/llama/tokenizer.json'); t = json.loads(path.read_text()); "
        "t['model']['vocab'] |= {f'added{n}': 300 + n for n in range(9)}; path.write_text(json.dumps(t))",
        ("spec.train.data.tokenizer", "ids up to 308; allowed: ids up to 299"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_used_ends_the_job_with_its_name(namespace: kit.Namespace, fault: str) -> None:
    damage, parts = FAULTS[fault]
    spec = llama(namespace)
    namespace.run("models", "python3", "-c", damage)
    run = kit.Job(namespace, "unfit", spec).create()
    failed = run.wait("Succeeded", "False", "InvalidConfiguration")
    for part in parts:
        assert part in failed["message"], failed["message"]
    assert run.status["restarts"] == 0


def test_gradients_that_are_not_numbers_end_the_job(namespace: kit.Namespace) -> None:
    spec = kit.spec(2, 20)
    spec["train"]["optimizer"] = {"learningRate": "1e30", "clipNorm": "0"}
    run = kit.Job(namespace, "nan", spec).create()
    failed = run.wait("Succeeded", "False", "InvalidConfiguration")
    assert "spec.train.optimizer.learningRate: with 1e30 the loss is" in failed["message"]
