"""What the end-to-end tests of serving need: a model with known answers, and clients inside the cluster."""

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from tests.e2e import kit

Result = TypeVar("Result")

TOKEN = "let-me-in"
FRONT = "pipelinejob.dev/front"
"""Label of the fronts' pods."""

MODEL = "model"

LIBRARIES = ("openai", "jiter", "sniffio", "distro", "tqdm")
"""The official client, and what it needs beside what the worker image has."""

MAKE_MODEL = """
import json, sys, tokenizers, torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
lengths, output, seed, directory = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(seed)
alphabet = ["\\u0120", *map(chr, range(33, 127))]
tokenizer = tokenizers.Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(alphabet), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
)).eval()
model.save_pretrained(f"/volume/{directory}")
tokenizer.save(f"/volume/{directory}/tokenizer.json")
answers = {}
for number, length in enumerate(lengths):
    ids = [(7 * number + 3 * place + place * place) % len(alphabet) for place in range(length)]
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)  # else it takes the token of number pad_token_id for padding
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=output, do_sample=False, pad_token_id=0)
    answers[tokenizer.decode(ids)] = tokenizer.decode(made[0, length:].tolist())
print("ANSWERS" + json.dumps(answers))
"""

CONTINUE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from pipelinejob_worker.models import model_of
from pipelinejob_worker.protocol import Model
torch.set_num_threads(1)
model = model_of(Model.model_validate_json(sys.argv[1]))
chunk = model.build(range(len(model.names)), seed=0).eval()
directory = Path("/volume") / Path("/volume/latest").read_text().strip()
for index, layer in chunk.layers.items():
    name = model.names[index]
    state = {key.removeprefix(f"{name}."): value for key, value in load_file(directory / f"{name}.safetensors").items()}
    weights = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    layer.load_state_dict(weights)
prompts, output = json.loads(sys.argv[2])
answers = {}
for prompt in prompts:
    ids = list(prompt.encode())
    with torch.inference_mode():
        for _ in range(output):
            logits = chunk(torch.tensor([ids]), torch.arange(len(ids))[None])
            ids.append(int(logits[0, -1].argmax()))
    answers[prompt] = bytes(ids[-output:]).decode(errors="replace")
print("ANSWERS" + json.dumps(answers))
"""

ASK = """
import asyncio, json, os, sys
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI
job = json.load(sys.stdin)

async def answer(client, request, tries):
    for attempt in range(tries):
        text, finished = "", False
        try:
            if not request.get("stream"):
                return {"text": (await client.completions.create(**request)).choices[0].text, "lost": attempt}
            async for chunk in await client.completions.create(**request):
                text += chunk.choices[0].text
                finished = finished or chunk.choices[0].finish_reason is not None
            if finished:
                return {"text": text, "lost": attempt}
        except APIStatusError as error:
            after = error.response.headers.get("retry-after")
            return {"status": error.status_code, "code": error.code, "retryAfter": after}
        except (APIConnectionError, APIError):
            continue
    return {"lost": tries}

async def main():
    client = AsyncOpenAI(base_url=job["url"], api_key=job["key"], max_retries=job["retries"], timeout=300)
    answers = [answer(client, request, job["tries"]) for request in job["requests"]]
    print(json.dumps(await asyncio.gather(*answers)))

asyncio.run(main())
"""


@contextmanager
def secured(name: str) -> Iterator[kit.Namespace]:
    """A namespace of the restricted standard during the block, with the claim ``models`` and the clients' token."""
    with kit.namespace(name, {"pod-security.kubernetes.io/enforce": "restricted"}) as made:
        made.claim("models")
        made.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}, "stringData": {"token": TOKEN}}
        )
        yield made


def two_stages(directory: str = MODEL, **limits: int) -> kit.Object:
    """A job of two stages behind two fronts that serves ``make_model``'s, with a token, in deterministic arithmetic."""
    mount = {"name": "models", "mountPath": "/models", "readOnly": True}
    return {
        "mode": "Serve",
        "stages": 2,
        "model": {"huggingFace": {"path": f"/models/{directory}", "context": 512}},
        "serve": {
            "deterministic": True,
            "keyValueCacheMiB": 16,
            "bearerTokenSecretName": "token",
            "limits": limits,
        },
        "template": {
            "spec": {
                "containers": [{"name": "worker", "volumeMounts": [mount]}],
                "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
            }
        },
    }


def stages(run: kit.Job) -> list[kit.Object]:
    """The pods of a job's stages."""
    return run.namespace.list("pods", f"pipelinejob.dev/job={run.name},!{FRONT}")


def wait_until_busy(run: kit.Job) -> None:
    """Wait until requests are being answered, as the status says."""
    kit.wait_for(
        "requests are being answered",
        lambda: run.status.get("progress", {}).get("running", 0) > 0,
        60,
        run.describe,
    )


@dataclass(frozen=True)
class Clients:
    """The official client in a pod of the namespace: what it asks goes through the Service and the NetworkPolicy."""

    namespace: kit.Namespace
    pod: str = "clients"

    @classmethod
    def start(cls, namespace: kit.Namespace, node: str = "") -> "Clients":
        """Start the pod, on this node if one is given, and copy the client into it."""
        made = cls(namespace)
        namespace.apply(_pod(made.pod, node))
        kit.kubectl("wait", "--for=condition=Ready", f"pod/{made.pod}", "-n", namespace.name, "--timeout=90s")
        directories = [directory for name in LIBRARIES if (directory := _directory(name))]
        places = [argument for path in directories for argument in ("-C", str(path.parent), path.name)]
        archive = subprocess.run(
            ["tar", "--create", "--exclude=__pycache__", *places], capture_output=True, check=True
        ).stdout
        where = ("exec", "-i", "-n", namespace.name, made.pod, "--", "tar", "--extract", "-C", "/tmp")
        subprocess.run(["kubectl", *where], input=archive, check=True)
        return made

    def ask(
        self, service: str, requests: Sequence[dict[str, Any]], *, key: str = TOKEN, retries: int = 20, tries: int = 1
    ) -> list[dict[str, Any]]:
        """Ask all at once; ``retries`` are the official client's, ``tries`` those of streams that broke."""
        job = {"url": f"http://{service}:8000/v1", "key": key, "retries": retries, "tries": tries}
        job["requests"] = [{"model": "served", **request} for request in requests]  # type: ignore[assignment]
        answers: list[dict[str, Any]] = json.loads(self._run(ASK, job))
        return answers

    def begin(self, service: str, requests: Sequence[dict[str, Any]], **how: Any) -> Future[list[dict[str, Any]]]:
        """Ask in another thread, while the test does something."""
        return _in_thread(lambda: self.ask(service, requests, **how))

    def run(self, program: str, job: dict[str, Any]) -> Future[str]:
        """Run a program of one's own with the client's library in another thread; what it prints is the result.

        It reads ``job`` and the token, as ``key``, from its standard input as JSON.
        """
        return _in_thread(lambda: self._run(program, {**job, "key": TOKEN}))

    def _run(self, program: str, job: dict[str, Any]) -> str:
        return kit.kubectl(
            *("exec", "-i", "-n", self.namespace.name, self.pod, "--", "env", "PYTHONPATH=/tmp"),
            *("python3", "-c", program),
            stdin=json.dumps(job),
        )


def _in_thread(work: Callable[[], Result]) -> Future[Result]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def make_model(
    namespace: kit.Namespace, claim: str, lengths: Sequence[int], output: int, *, seed: int = 1, directory: str = MODEL
) -> dict[str, str]:
    """Write a small Llama with random weights into a directory of a claim; return prompts and ``generate``'s answers.

    ``lengths``: tokens of the prompts. ``output``: tokens of an answer. Each character is a token.
    """
    said = namespace.run(claim, "python3", "-c", MAKE_MODEL, json.dumps([list(lengths), output, seed, directory]))
    answers: dict[str, str] = json.loads(said.partition("ANSWERS")[2])
    assert all(len(text) == output for text in answers.values())
    return answers


def continued(
    namespace: kit.Namespace, claim: str, model: kit.Object, prompts: Sequence[str], output: int
) -> dict[str, str]:
    """What a preset with the weights of a claim's newest checkpoint says after prompts, in one process, no cache."""
    arguments = (json.dumps(model), json.dumps([list(prompts), output]))
    answers: dict[str, str] = json.loads(
        namespace.run(claim, "python3", "-c", CONTINUE, *arguments).partition("ANSWERS")[2]
    )
    return answers


def _directory(name: str) -> Path | None:
    found = find_spec(name)
    return Path(found.origin).parent if found and found.origin else None


def _pod(name: str, node: str) -> kit.Object:
    container = {
        "name": "python",
        "image": kit.WORKER_IMAGE,
        "command": ["python3", "-c", "import time; time.sleep(1e6)"],
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        **({"nodeName": node} if node else {}),
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
