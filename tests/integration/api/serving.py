"""Jobs that serve: what the API server refuses, with the one line that it says, and what it takes."""

from typing import Any

TRAIN = {"data": {"files": ["/data/*.txt"]}, "steps": 200, "globalBatchSize": 32, "microbatches": 8}
PRESET = {"preset": {"name": "gpt", "layers": 8, "width": 256, "heads": 8, "context": 256}}
LLAMA = {"huggingFace": {"path": "/models/llama", "context": 2048}}
TRAINED = {"fromJob": {"name": "tiny"}}
BATCH = {"input": "/data/in.jsonl", "output": "/data/out.jsonl"}


def served(**spec: Any) -> dict[str, Any]:
    """A job that serves, with members of the spec replaced; those that are None are left out."""
    wanted = {"mode": "Serve", "stages": 2, "model": LLAMA, "serve": {}, **spec}
    return {
        "apiVersion": "pipelinejob.dev/v1alpha1",
        "kind": "PipelineJob",
        "metadata": {"name": "served", "namespace": "default"},
        "spec": {name: value for name, value in wanted.items() if value is not None},
    }


REFUSED_TO_SERVE: dict[str, tuple[dict[str, Any], str]] = {
    "a mode that is none": (
        {"mode": "Dream"},
        'spec.mode: Unsupported value: "Dream": supported values: "Train", "Serve", "Batch"',
    ),
    "Train without its section": (
        {"mode": None, "serve": None},
        "spec.train: Required value: mode Train needs this section",
    ),
    "Serve without its section": ({"serve": None}, "spec.serve: Required value: mode Serve needs this section"),
    "Batch without its section": (
        {"mode": "Batch", "serve": None},
        "spec.batch: Required value: mode Batch needs this section",
    ),
    "how to train, with Serve": (
        {"train": TRAIN},
        "spec.train: Forbidden: belongs to mode Train, and mode is Serve; remove one of them",
    ),
    "how to serve, with Train": (
        {"mode": "Train", "train": TRAIN},
        "spec.serve: Forbidden: belongs to mode Serve, and mode is Train; remove one of them",
    ),
    "a batch, with Serve": (
        {"batch": BATCH},
        "spec.batch: Forbidden: belongs to mode Batch, and mode is Serve; remove one of them",
    ),
    "a preset": (
        {"model": PRESET},
        "spec.model.preset: Forbidden: mode Serve needs trained weights, and a preset has none; allowed: huggingFace "
        "or fromJob",
    ),
    "a model from a function": (
        {"model": {"module": {"function": "mine:build"}}},
        "spec.model.module: Forbidden: mode Serve cannot give such a model a key-value cache; allowed: huggingFace or "
        "fromJob",
    ),
    "training on another job's checkpoint": (
        {"mode": "Train", "serve": None, "train": TRAIN, "model": TRAINED},
        "spec.model.fromJob: Forbidden: mode Train does not start from another job; allowed: preset, huggingFace or "
        "module",
    ),
    "a checkpoint of its own": (
        {"checkpoint": {"volumeClaimName": "state"}},
        "spec.checkpoint.volumeClaimName: Forbidden: mode Serve saves nothing; allowed: none; a checkpoint to serve is "
        "named by model.fromJob",
    ),
    "two sources": (
        {"model": LLAMA | TRAINED},
        "spec.model.preset: Forbidden: several sources of the model are set; allowed: one of preset, huggingFace, "
        "module, fromJob",
    ),
    "a job without a name": (
        {"model": {"fromJob": {}}},
        "spec.model.fromJob.name: Required value",
    ),
    "no fronts": (
        {"serve": {"fronts": 0}},
        "spec.serve.fronts: Invalid value: 0: spec.serve.fronts in body should be greater than or equal to 1",
    ),
    "a port that is none": (
        {"serve": {"port": 65536}},
        "spec.serve.port: Invalid value: 65536: spec.serve.port in body should be less than or equal to 65535",
    ),
    "a negative limit": (
        {"serve": {"limits": {"requestSeconds": -1}}},
        "spec.serve.limits.requestSeconds: Invalid value: -1: spec.serve.limits.requestSeconds in body should be "
        "greater than or equal to 1",
    ),
    "no cache": (
        {"serve": {"keyValueCacheMiB": 0}},
        "spec.serve.keyValueCacheMiB: Invalid value: 0: spec.serve.keyValueCacheMiB in body should be greater than or "
        "equal to 1",
    ),
    "a tokenizer beside the container": (
        {"serve": {"tokenizerPath": "tokenizer"}},
        'spec.serve.tokenizerPath: Invalid value: "tokenizer": spec.serve.tokenizerPath in body should match '
        "'^(/.*)?$'",
    ),
    "too few boundaries": (
        {"partition": {"strategy": "Manual", "boundaries": [2, 4]}},
        "spec.partition.boundaries: Invalid value: 2 boundaries do not cut the model into 2 stages of 1 chunks; "
        "allowed: 1",
    ),
    "answers over their requests": (
        {"mode": "Batch", "serve": None, "batch": BATCH | {"output": BATCH["input"]}},
        "spec.batch.output: Invalid value: /data/in.jsonl is also the input; allowed: another file",
    ),
    "requests without a file": (
        {"mode": "Batch", "serve": None, "batch": {"output": "/out"}},
        "spec.batch.input: Required value",
    ),
    "one file for several pipelines": (
        {"mode": "Batch", "serve": None, "batch": BATCH, "pipelines": 2},
        "spec.pipelines: Invalid value: 2 pipelines cannot share one file of requests; allowed: 1",
    ),
}

SERVED: dict[str, dict[str, Any]] = {
    "a directory": {},
    "a model from the hub": {"model": {"huggingFace": {"path": "Qwen/Qwen3-0.6B", "context": 2048}}},
    "another job's checkpoint": {"model": TRAINED},
    "a certain step of it": {"model": {"fromJob": {"name": "tiny", "step": 100}}},
    "more pipelines than a step could share": {"pipelines": 3, "stages": 7},
    "everything that can be set": {
        "serve": {
            "maxTokensInFlight": 4096,
            "keyValueCacheMiB": 64,
            "batchTokens": 64,
            "deterministic": True,
            "fronts": 3,
            "port": 80,
            "bearerTokenSecretName": "token",
            "tokenizerPath": "/models/tokenizer",
            "limits": {
                "bodyBytes": 65536,
                "promptTokens": 512,
                "outputTokens": 64,
                "requests": 32,
                "requestSeconds": 60,
                "recoverySeconds": 30,
            },
        }
    },
    "a file of requests": {"mode": "Batch", "serve": None, "batch": BATCH},
    "boundaries": {"partition": {"strategy": "Manual", "boundaries": [4]}},
}
