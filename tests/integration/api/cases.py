"""What the API server refuses, with the one line that it says, and what it takes. Each case names what it changes."""

from typing import Any

from pipelinejob_worker.protocol import Env
from tests.integration.api.jobs import hugging_face, manual, schedule, steps, worker

NUMBER = r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no stages": (
        {"spec__stages": 0},
        "spec.stages: Invalid value: 0: spec.stages in body should be greater than or equal to 1",
    ),
    "too many stages": (
        {"spec__stages": 10_000},
        "spec.stages: Invalid value: 10000: spec.stages in body should be less than or equal to 512",
    ),
    "fewer microbatches than 1F1B needs": (
        {"spec__train__microbatches": 2},
        "spec.train.microbatches: Invalid value: 2 is too few for schedule 1F1B on 4 stages; allowed: 4 or more, or "
        "schedule GPipe",
    ),
    "a batch that does not divide": (
        {"spec__train__globalBatchSize": 30},
        "spec.train.globalBatchSize: Invalid value: 30 is not divisible by microbatches 8; allowed: a multiple of it",
    ),
    "heads that do not divide the width": (
        {"spec__model__preset__heads": 7},
        "spec.model.preset.heads: Invalid value: 7 does not divide width 256; allowed: a divisor of the width",
    ),
    "a dropout that drops all": (
        {"spec__model__preset__dropout": "1"},
        "spec.model.preset.dropout: Invalid value: 1 is not a probability to drop; allowed: 0 or more and less than 1",
    ),
    "a dropout that is no number": (
        {"spec__model__preset__dropout": "some"},
        'spec.model.preset.dropout: Invalid value: "some": spec.model.preset.dropout in body should match '
        f"'{NUMBER}'",
    ),
    "more spares than a strategy can use": (
        {"spec__recovery": {"strategy": "RecreateAll", "spares": 2}},
        "spec.recovery.spares: Invalid value: 2 spares take over single stages, which strategy RecreateAll never "
        "replaces; allowed: 0, or strategy Ladder",
    ),
    "a rule that matches nothing": (
        {"spec__recovery": {"rules": [{"name": "empty", "action": "Ignore"}]}},
        "spec.recovery.rules[0].onExitCodes: Required value: rule empty matches nothing; allowed: at least one of "
        "onExitCodes, onSignals, onReasons, onNodeConditions",
    ),
    "an action that answers no node condition": (
        {"spec__recovery": {"rules": [{"name": "sick", "action": "Ignore", "onNodeConditions": ["GpuUnhealthy"]}]}},
        "spec.recovery.rules[0].action: Invalid value: Ignore does not answer a node condition, as nothing has failed "
        "yet; allowed: ReplacePod, FailJob",
    ),
    "a rule about two kinds of failure": (
        {
            "spec__recovery": {
                "rules": [
                    {"name": "both", "action": "FailJob", "onNodeConditions": ["GpuUnhealthy"], "onExitCodes": [1]}
                ]
            }
        },
        "spec.recovery.rules[0].onNodeConditions: Forbidden: node conditions and ends of a stage are different "
        "failures; allowed: a rule for each",
    ),
    "fewer stages than elasticity allows": (
        {"spec__elasticity": {"minStages": 5}},
        "spec.stages: Invalid value: 4 is less than elasticity.minStages 5; allowed: at least that",
    ),
    "more stages than elasticity allows": (
        {"spec__elasticity": {"maxStages": 3}},
        "spec.stages: Invalid value: 4 is more than elasticity.maxStages 3; allowed: at most that",
    ),
    "snapshot memory that is no quantity": (
        {"spec__recovery": {"memory": "lots"}},
        'spec.recovery.memory: Invalid value: "lots": spec.recovery.memory in body should match '
        "'^([1-9][0-9]{0,15}(k|M|G|T|Ki|Mi|Gi|Ti)?)?$'",
    ),
    "an unknown schedule": (
        {"spec__train__schedule": {"name": "Zigzag"}},
        'spec.train.schedule.name: Unsupported value: "Zigzag": supported values: "GPipe", "1F1B", "LoopedBFS", '
        '"Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"',
    ),
    "an unknown field": (
        {"spec__stagse": 4},
        'Error from server (BadRequest): error when creating "STDIN": PipelineJob in version "v1alpha1" cannot be '
        'handled as a PipelineJob: strict decoding error: unknown field "spec.stagse"',
    ),
    "a reserved environment name": (
        {"spec__template": worker(env=[{"name": "FINE", "value": "1"}, {"name": "MASTER_ADDR", "value": "x"}])},
        "spec.template.spec.containers: Invalid value: environment name MASTER_ADDR is set by the operator; allowed: "
        f"any name but {', '.join(sorted(Env))}",
    ),
    "a model from nowhere": (
        {"spec__model": {}},
        "spec.model.preset: Required value: no source of the model is set; allowed: one of preset, huggingFace, "
        "module, fromJob",
    ),
    "a learning rate that is no number": (
        {"spec__train__optimizer": {"learningRate": "fast"}},
        'spec.train.optimizer.learningRate: Invalid value: "fast": spec.train.optimizer.learningRate in body should '
        f"match '{NUMBER}'",
    ),
    "a name too long for pods": (
        {"metadata__name": "a" * 41},
        f"metadata.name: Invalid value: {'a' * 41} cannot name the pods; allowed: at most 40 characters of a-z, 0-9 "
        "and -, a letter first",
    ),
    "a name that pods cannot have": (
        {"metadata__name": "a.b"},
        "metadata.name: Invalid value: a.b cannot name the pods; allowed: at most 40 characters of a-z, 0-9 and -, a "
        "letter first",
    ),
}


PIPELINES = {
    "no pipelines": (
        {"spec__pipelines": 0},
        "spec.pipelines: Invalid value: 0: spec.pipelines in body should be greater than or equal to 1",
    ),
    "too many pipelines": (
        {"spec__pipelines": 65},
        "spec.pipelines: Invalid value: 65: spec.pipelines in body should be less than or equal to 64",
    ),
    "too many pods": (
        {"spec__stages": 16, "spec__pipelines": 64, **steps(1024)},
        "spec.pipelines: Invalid value: 64 pipelines of 16 stages are 1024 pods; allowed: at most 512",
    ),
    "microbatches that the pipelines cannot share": (
        {"spec__pipelines": 3},
        "spec.train.microbatches: Invalid value: 8 cannot be shared equally by 3 pipelines; allowed: a multiple of it",
    ),
    "a share of microbatches that is too small": (
        {"spec__pipelines": 4},
        "spec.train.microbatches: Invalid value: 2 a pipeline is too few for schedule 1F1B on 4 stages; allowed: 4 or "
        "more, or schedule GPipe",
    ),
}

SCHEDULES = {
    "no microbatches": (
        {"spec__train__microbatches": 0},
        "spec.train.microbatches: Invalid value: 0: spec.train.microbatches in body should be greater than or equal to "
        "1",
    ),
    "chunks for GPipe": (
        schedule("GPipe", 2),
        "spec.train.schedule.chunksPerStage: Invalid value: 2 chunks do not fit schedule GPipe; allowed: 1, or "
        "schedule LoopedBFS, Interleaved1F1B or InterleavedZeroBubble",
    ),
    "chunks for 1F1B": (
        schedule("1F1B", 2),
        "spec.train.schedule.chunksPerStage: Invalid value: 2 chunks do not fit schedule 1F1B; allowed: 1, or schedule "
        "LoopedBFS, Interleaved1F1B or InterleavedZeroBubble",
    ),
    "one chunk for ZBVZeroBubble": (
        schedule("ZBVZeroBubble", 1),
        "spec.train.schedule.chunksPerStage: Invalid value: 1 chunks do not fit schedule ZBVZeroBubble, whose chunks "
        "run down the stages and back up; allowed: 2",
    ),
    "three chunks for DualPipeV": (
        schedule("DualPipeV", 3),
        "spec.train.schedule.chunksPerStage: Invalid value: 3 chunks do not fit schedule DualPipeV, whose chunks run "
        "down the stages and back up; allowed: 2",
    ),
    "too many chunks": (
        schedule("LoopedBFS", 17),
        "spec.train.schedule.chunksPerStage: Invalid value: 17: spec.train.schedule.chunksPerStage in body should be "
        "less than or equal to 16",
    ),
    "fewer microbatches than DualPipeV needs": (
        {"spec__stages": 5, **schedule("DualPipeV", 2)},
        "spec.train.microbatches: Invalid value: 8 is too few for schedule DualPipeV on 5 stages; allowed: 10 or more, "
        "twice the stages, or schedule ZBVZeroBubble",
    ),
    "rounds of Interleaved1F1B that are not full": (
        {"spec__stages": 3, **schedule("Interleaved1F1B", 2)},
        "spec.train.microbatches: Invalid value: 8 is not a multiple of the 3 stages, which schedule Interleaved1F1B "
        "visits in rounds; allowed: a multiple, or schedule LoopedBFS",
    ),
    "rounds of a pipeline's share that are not full": (
        {"spec__stages": 3, "spec__pipelines": 2, **schedule("InterleavedZeroBubble", 2)},
        "spec.train.microbatches: Invalid value: 4 a pipeline is not a multiple of the 3 stages, which schedule "
        "InterleavedZeroBubble visits in rounds; allowed: a multiple, or schedule LoopedBFS",
    ),
    **{
        f"compiled layers with {name}": (
            {"spec__train__compile": True, **schedule(name, 2)},
            f"spec.train.compile: Invalid value: compiled layers cannot split their backward as schedule {name} needs; "
            "allowed: false, or schedule GPipe, 1F1B, LoopedBFS or Interleaved1F1B",
        )
        for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    },
}

PARTITION = {
    "an unknown strategy": (
        {"spec__partition": {"strategy": "Random"}},
        'spec.partition.strategy: Unsupported value: "Random": supported values: "Balanced", "Even", "Manual"',
    ),
    "Manual without boundaries": (
        {"spec__partition": {"strategy": "Manual"}},
        "spec.partition.boundaries: Invalid value: boundaries and strategy Manual do not fit; allowed: boundaries with "
        "strategy Manual, and only with it",
    ),
    "boundaries for Even": (
        {"spec__partition": {"strategy": "Even", "boundaries": [1, 2, 3]}},
        "spec.partition.boundaries: Invalid value: boundaries and strategy Even do not fit; allowed: boundaries with "
        "strategy Manual, and only with it",
    ),
    "too few boundaries": (
        manual(2, 4),
        "spec.partition.boundaries: Invalid value: 2 boundaries do not cut the model into 4 stages of 1 chunks; "
        "allowed: 3",
    ),
    "a boundary for each stage but not for each chunk": (
        {**manual(2, 4, 6), **schedule("LoopedBFS", 2)},
        "spec.partition.boundaries: Invalid value: 3 boundaries do not cut the model into 4 stages of 2 chunks; "
        "allowed: 7",
    ),
    "boundaries that go back": (
        manual(4, 2, 6),
        "spec.partition.boundaries: Invalid value: boundaries are not in order; allowed: ascending, each the first "
        "layer of the next chunk",
    ),
    "a chunk without layers": (
        manual(2, 4, 4),
        "spec.partition.boundaries[2]: Duplicate value: 4",
    ),
    "a boundary before the first layer": (
        manual(0, 2, 4),
        "spec.partition.boundaries[0]: Invalid value: 0: spec.partition.boundaries[0] in body should be greater than "
        "or equal to 1",
    ),
    "a negative memory limit": (
        {"spec__partition": {"memoryLimitMiB": -1}},
        "spec.partition.memoryLimitMiB: Invalid value: -1: spec.partition.memoryLimitMiB in body should be greater "
        "than or equal to 0",
    ),
}

MODELS = {
    "two sources": (
        {"spec__model__module": {"function": "mine:build"}},
        "spec.model.preset: Forbidden: several sources of the model are set; allowed: one of preset, huggingFace, "
        "module, fromJob",
    ),
    "no heads": (
        {"spec__model__preset__heads": 0},
        "spec.model.preset.heads: Invalid value: 0: spec.model.preset.heads in body should be greater than or equal to "
        "1",
    ),
    "a path that is no directory and no id": (
        hugging_face("./llama"),
        "spec.model.huggingFace.path: Invalid value: ./llama is neither a directory nor the id of a model; allowed: a "
        "path with a leading /, or an id such as Qwen/Qwen3-0.6B",
    ),
    "an address instead of an id": (
        hugging_face("https://example.com/llama"),
        "spec.model.huggingFace.path: Invalid value: https://example.com/llama is neither a directory nor the id of a "
        "model; allowed: a path with a leading /, or an id such as Qwen/Qwen3-0.6B",
    ),
    "a model without context": (
        {"spec__model": {"huggingFace": {"path": "/models/llama"}}},
        "spec.model.huggingFace.context: Required value",
    ),
    "a function without module": (
        {"spec__model": {"module": {"function": "build"}}},
        'spec.model.module.function: Invalid value: "build": spec.model.module.function in body should match '
        "'^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$'",
    ),
    "an argument given twice": (
        {"spec__model": {"module": {"function": "m:f", "arguments": [{"name": "a", "value": "1"}] * 2}}},
        'spec.model.module.arguments[1]: Duplicate value: {"name":"a"}',
    ),
    "a tokenizer from nowhere": (
        {"spec__train__data__tokenizer": "HuggingFace"},
        "spec.train.data.tokenizerPath: Required value: tokenizer HuggingFace needs a directory with tokenizer.json; "
        "allowed: its path, or none with model.huggingFace, which has one, or tokenizer Bytes",
    ),
}

OPTIMIZER = {
    "an unknown optimizer": (
        {"spec__train__optimizer": {"name": "Lion"}},
        'spec.train.optimizer.name: Unsupported value: "Lion": supported values: "AdamW", "SGD"',
    ),
    **{
        f"{field} that never forgets": (
            {"spec__train__optimizer": {field: "1"}},
            f"spec.train.optimizer.{field}: Invalid value: 1 is too large; allowed: 0 or more and less than 1",
        )
        for field in ("momentum", "beta1", "beta2")
    },
    "a negative learning rate": (
        {"spec__train__optimizer": {"learningRate": "-1"}},
        'spec.train.optimizer.learningRate: Invalid value: "-1": spec.train.optimizer.learningRate in body should '
        f"match '{NUMBER}'",
    ),
    "a momentum past all floats": (
        {"spec__train__optimizer": {"momentum": "1e999"}},
        'spec.train.optimizer.momentum: Invalid value: "1e999": spec.train.optimizer.momentum in body should match '
        f"'{NUMBER}'",
    ),
    "an unknown decay": (
        {"spec__train__optimizer": {"decay": "Sudden"}},
        'spec.train.optimizer.decay: Unsupported value: "Sudden": supported values: "Constant", "Cosine", "Linear"',
    ),
    "a precision that is none": (
        {"spec__train__precision": "Float8"},
        'spec.train.precision: Unsupported value: "Float8": supported values: "Float32", "BFloat16", "Float16"',
    ),
    "a validation split of all": (
        {"spec__train__data__validationPercent": 51},
        "spec.train.data.validationPercent: Invalid value: 51: spec.train.data.validationPercent in body should be "
        "less than or equal to 50",
    ),
    "an unknown packing": (
        {"spec__train__data__packing": "Tight"},
        'spec.train.data.packing: Unsupported value: "Tight": supported values: "Stream", "Documents"',
    ),
}

REFUSED |= PIPELINES | SCHEDULES | PARTITION | MODELS | OPTIMIZER

TAKEN: dict[str, dict[str, Any]] = {
    "GPipe with fewer microbatches than stages": {**schedule("GPipe"), **steps(2)},
    "1F1B with as many": {**schedule("1F1B"), **steps(4)},
    "LoopedBFS with rounds that are not full": {**schedule("LoopedBFS", 2), **steps(5)},
    "Interleaved1F1B": schedule("Interleaved1F1B", 2),
    "InterleavedZeroBubble with one chunk": schedule("InterleavedZeroBubble"),
    "ZBVZeroBubble": schedule("ZBVZeroBubble", 2),
    "DualPipeV": schedule("DualPipeV", 2),
    "compiled layers": {"spec__train__compile": True},
    "as many pods as are allowed": {"spec__stages": 8, "spec__pipelines": 64, **steps(1024)},
    "a boundary before every chunk but the first": {**manual(1, 2, 3, 4, 5, 6, 7), **schedule("ZBVZeroBubble", 2)},
    "as many boundaries as there can be": {"spec__stages": 512, **manual(*range(1, 512)), **schedule("GPipe")},
    "a model from a directory": hugging_face("/models/llama"),
    "a model from the hub with its tokenizer": {
        **hugging_face("Qwen/Qwen3-0.6B"),
        "spec__train__data__tokenizer": "HuggingFace",
    },
    "an old model from the hub": hugging_face("gpt2"),
    "a model from a function": {"spec__model": {"module": {"function": "my_package.model:build"}}},
    "a tokenizer from a directory": {
        "spec__train__data__tokenizer": "HuggingFace",
        "spec__train__data__tokenizerPath": "/models/tokenizer",
    },
}
