"""Our engine with 1, 2 and 4 stages beside transformers: ``make bench-serve``.

Beside its continuous batching in one process, with requests of mixed lengths; and beside its own pipeline, which is
right for equal lengths only. The systems take turns, so that whatever else changes on the machine changes for all; the
median of the rounds counts. Equal are the weights, the requests and the threads in all; only 4 stages have more.

``python -m tools.bench.serve [rounds [requests]]``
"""

import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from pipelinejob_worker.link import Event, Joined
from pipelinejob_worker.protocol import ENGINE_PORT, RING_PORT, WorkerConfig
from pipelinejob_worker.serve.job import ServeJob
from pipelinejob_worker.serve.ring import Departure, Member
from pipelinejob_worker.serve.wire import TO_FRONT, Finished, Ready, Sampling, Stats, Submit, Token, to_line

ROUNDS, REQUESTS = 5, 32
THREADS = 2
HIDDEN, LAYERS, HEADS, GROUPS, VOCABULARY, CONTEXT = 512, 8, 8, 4, 2000, 256
BLOCK_TOKENS, BLOCKS = 16, 400
CACHE_MEBIBYTES = 2 * LAYERS * BLOCKS * BLOCK_TOKENS * GROUPS * (HIDDEN // HEADS) * 4 >> 20
"""Of one stage with all layers: as much as the blocks of the other take."""

PATIENCE_SECONDS = 600.0

Result = TypeVar("Result")

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "pipelinejob_worker.serve.job"])


@dataclass
class Request:
    """A prompt, and how many tokens follow it."""

    prompt: list[int]
    new_tokens: int


@dataclass
class Run:
    """What one system did with the requests. Times in seconds since they were handed over, all at once."""

    seconds: float
    first_token_seconds: list[float]
    tokens: list[list[int]]
    idle: list[float] = field(default_factory=list)
    """Share of each stage."""

    @property
    def tokens_per_second(self) -> float:
        """Rate of new tokens."""
        return sum(map(len, self.tokens)) / self.seconds

    def percentile(self, percent: int) -> float:
        """Milliseconds to the first token."""
        ordered = sorted(self.first_token_seconds)
        return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def requests_of(count: int, *, equal: bool) -> list[Request]:
    """Return the same requests each time: of mixed lengths, or all alike."""
    drawn = random.Random(7)  # noqa: S311 - the same each time
    return [
        Request(
            drawn.choices(range(VOCABULARY), k=60 if equal else drawn.randint(4, 115)),
            40 if equal else drawn.randint(16, 64),
        )
        for _ in range(count)
    ]


def write_model(directory: str) -> None:
    """Save a Llama with random weights, whose likeliest tokens are far enough apart."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - imports for seconds

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def ours(directory: str, requests: list[Request], stages: int) -> Run:
    """Serve with our engine, each stage a process."""
    processes, pipes = [], []
    try:
        for stage in range(stages):
            mine, theirs = _CONTEXT.Pipe()
            processes.append(_CONTEXT.Process(target=_stage, args=(theirs, directory, stage, stages), daemon=True))
            processes[-1].start()
            pipes.append(mine)
        for pipe in pipes:
            assert pipe.poll(PATIENCE_SECONDS), "a stage has not joined"
            assert pipe.recv() == "joined"
        return _ask(requests)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _stage(pipe: Connection, directory: str, stage: int, stages: int) -> None:
    torch.set_num_threads(max(1, THREADS // stages))
    config = WorkerConfig.model_validate(
        {
            "job": "bench",
            "jobUid": "bench",
            "mode": "Serve",
            "model": {"huggingFace": {"path": directory, "context": CONTEXT}},
            "serve": {"keyValueCacheMiB": CACHE_MEBIBYTES, "batchTokens": 512, "maxTokensInFlight": 1 << 20},
        }
    )
    job = ServeJob(config, torch.device("cpu"), Path(directory), host=_host(stage))
    following = (_host((stage + 1) % stages), RING_PORT) if stages > 1 else None

    def tell(event: Event) -> None:
        if isinstance(event, Joined):
            pipe.send("joined")

    job.take_part(Member(1, stage, stages, following), Departure(), tell)


def _host(stage: int) -> str:
    """An address of the loopback interface for each stage, as each pod has its own."""
    return f"127.99.0.{stage + 1}"


def _ask(requests: list[Request]) -> Run:
    """Hand all over as a front does, and note when their tokens come."""
    with socket.create_connection((_host(0), ENGINE_PORT), PATIENCE_SECONDS) as connection:
        lines = connection.makefile("rb")
        assert isinstance(TO_FRONT.validate_json(lines.readline()), Ready)
        began = time.perf_counter()
        connection.sendall(b"".join(to_line(_submit(number, each)) for number, each in enumerate(requests)))
        run = Run(0.0, [0.0] * len(requests), [[] for _ in requests])
        busy: list[list[float]] = []
        unfinished = len(requests)
        while unfinished:
            message = TO_FRONT.validate_json(lines.readline())
            if isinstance(message, Token):
                number = int(message.request_id)
                if not run.tokens[number]:
                    run.first_token_seconds[number] = time.perf_counter() - began
                run.tokens[number].append(message.token_id)
            elif isinstance(message, Finished):
                unfinished -= 1
            elif isinstance(message, Stats) and message.stage_busy_percent:
                busy.append(message.stage_busy_percent)
        run.seconds = time.perf_counter() - began
    # The first and the last second are not full.
    run.idle = [1 - statistics.fmean(stage) / 100 for stage in zip(*(busy[1:-1] or busy), strict=True)]
    return run


def _submit(number: int, request: Request) -> Submit:
    return Submit(
        request_id=f"{number}",
        prompt_token_ids=request.prompt,
        max_tokens=request.new_tokens,
        sampling=Sampling(temperature=0),
    )


def continuous_batching(directory: str, requests: list[Request]) -> Run:
    """Serve with the continuous batching of transformers, in one process with all threads."""
    return _in_process(_continuous_batching, directory, requests)


def _continuous_batching(directory: str, requests: list[Request]) -> Run:
    from transformers import ContinuousBatchingConfig, GenerationConfig  # noqa: PLC0415 - imports for seconds

    torch.set_num_threads(THREADS)
    model = _load(directory)
    make: Any = GenerationConfig
    generation = make(do_sample=False, eos_token_id=-1, max_new_tokens=CONTEXT)
    settings = ContinuousBatchingConfig(num_blocks=BLOCKS, page_size=BLOCK_TOKENS, max_batch_tokens=512)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings
    ) as manager:
        began = time.perf_counter()
        for number, request in enumerate(requests):
            manager.add_request(
                request.prompt, f"{number}", max_new_tokens=request.new_tokens, record_timestamps=True, eos_token_id=-1
            )
        run = Run(0.0, [0.0] * len(requests), [[] for _ in requests])
        unfinished = len(requests)
        while unfinished:
            result = manager.get_result(timeout=PATIENCE_SECONDS)
            assert result is not None, "continuous batching has ended"
            if result.is_finished():
                assert not result.error, result.error
                number = int(result.request_id)
                run.tokens[number] = list(result.generated_tokens)
                run.first_token_seconds[number] = result.timestamps[0] - began
                unfinished -= 1
        run.seconds = time.perf_counter() - began
    return run


def own_pipeline(directory: str, requests: list[Request]) -> Run:
    """Serve one static batch with the pipeline of transformers, two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda rank: _in_process(_own_pipeline, directory, requests, rank, port), range(2)))
    return runs[0]


def _own_pipeline(directory: str, requests: list[Request], rank: int, port: int) -> Run:
    from transformers import StoppingCriteriaList  # noqa: PLC0415 - imports for seconds

    torch.set_num_threads(THREADS // 2)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=f"{port}", GLOO_SOCKET_IFNAME="lo")
    distributed.init_process_group("gloo")
    try:
        model = _load(directory, distributed_config={"pp_size": 2})
        prompts = torch.tensor([request.prompt for request in requests])
        first: list[float] = []

        def note(ids: torch.Tensor, _scores: Any, **_others: Any) -> torch.Tensor:
            first.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        distributed.barrier()
        began = time.perf_counter()
        with torch.no_grad():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=requests[0].new_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([note]),
            )
        seconds = time.perf_counter() - began
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    return Run(seconds, [first[0] - began] * len(requests), output[:, prompts.shape[1] :].tolist())


def generated(directory: str, requests: list[Request]) -> list[list[int]]:
    """What ``generate`` makes of each request alone: the tokens that are right."""
    return _in_process(_generated, directory, requests)


def _generated(directory: str, requests: list[Request]) -> list[list[int]]:
    torch.set_num_threads(THREADS)
    model = _load(directory)
    found = []
    for request in requests:
        prompt = torch.tensor([request.prompt])
        with torch.no_grad():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        found.append(output[0, len(request.prompt) :].tolist())
    return found


def _in_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call in a fresh process that has imported the libraries."""
    with ProcessPoolExecutor(1, _CONTEXT) as pool:
        return pool.submit(function, *arguments).result(PATIENCE_SECONDS)


def _load(directory: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - imports for seconds

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


@dataclass(frozen=True)
class System:
    """One of those that are compared; ``equal``: with requests of equal lengths, where its own beside it is it."""

    name: str
    serve: Callable[[str, list[Request]], Run]
    equal: bool = False


_OWN_PIPELINE_NEEDS = "accelerate"
"""The pipeline of transformers imports it; of ours only the development dependencies have it."""

SYSTEMS = [
    System("ours, 1 stage", lambda directory, requests: ours(directory, requests, 1)),
    System("ours, 2 stages", lambda directory, requests: ours(directory, requests, 2)),
    System("ours, 4 stages", lambda directory, requests: ours(directory, requests, 4)),
    System("transformers, continuous batching", continuous_batching),
    System("ours, 2 stages, equal lengths", lambda directory, requests: ours(directory, requests, 2), equal=True),
]
if find_spec(_OWN_PIPELINE_NEEDS):
    SYSTEMS.append(System("transformers, 2 stages, equal lengths", own_pipeline, equal=True))


def main() -> None:
    """Print the table and the JSON line."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    count = int(sys.argv[2]) if len(sys.argv) > 2 else REQUESTS
    with tempfile.TemporaryDirectory() as directory:
        _in_process(write_model, directory)
        given = {equal: requests_of(count, equal=equal) for equal in (False, True)}
        right = {equal: generated(directory, requests) for equal, requests in given.items()}
        runs: dict[str, list[Run]] = {system.name: [] for system in SYSTEMS}
        for _ in range(rounds):
            for system in SYSTEMS:
                runs[system.name].append(system.serve(directory, given[system.equal]))
    if not find_spec(_OWN_PIPELINE_NEEDS):
        print(f"not measured: the pipeline of transformers, which needs the package {_OWN_PIPELINE_NEEDS}")
    print(f"{count} requests at once, {THREADS} threads in all, hidden size {HIDDEN}, median of {rounds} runs\n")
    print(f"{'system':<40}{'tokens/s':>10}{'first p50 ms':>14}{'p99 ms':>9}{'other tokens':>14}  idle of each stage")
    rows = []
    for system in SYSTEMS:
        row = _row(system, runs[system.name], right[system.equal])
        idle = " ".join(f"{share:.0%}" for share in row["idle"])
        print(
            f"{system.name:<40}{row['tokens_per_second']:>10.0f}{row['ttft_p50_ms']:>14.0f}{row['ttft_p99_ms']:>9.0f}"
            f"{row['wrong_requests']:>14}  {idle}"
        )
        rows.append(row)
    print(json.dumps({"systems": rows}))


def _row(system: System, runs: list[Run], right: list[list[int]]) -> dict[str, Any]:
    wrong = max(sum(one != other for one, other in zip(run.tokens, right, strict=True)) for run in runs)
    return {
        "name": system.name,
        "tokens_per_second": round(statistics.median(run.tokens_per_second for run in runs), 1),
        "ttft_p50_ms": round(statistics.median(run.percentile(50) for run in runs), 1),
        "ttft_p99_ms": round(statistics.median(run.percentile(99) for run in runs), 1),
        "wrong_requests": wrong,
        "idle": [round(statistics.median(each), 3) for each in zip(*(run.idle for run in runs), strict=True)],
    }


if __name__ == "__main__":
    main()
