"""Hours in minutes: ``make soak MINUTES=10``. Clients of all sorts come and go, and no process of the service grows.

Most are answered; others hang up, never read, send what is no JSON, ask for too much or for another model, or come in
crowds that are too large. What counts is the last third of the time beside the second one: in the first one the
allocators fill.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import cgroups, faults
from tests.e2e import kit
from tests.e2e.conftest import install_anew
from tests.e2e.serving import FRONT, Clients, make_model, secured, stages, two_stages

LENGTHS, OUTPUT = [3, 17, 40, 64, 90, 121, 5, 33], 64
LOOK_SECONDS = 2.0

GROWTH, GROWTH_MEBIBYTES, GROWTH_HANDLES = 0.05, 8.0, 8
"""What the last third may have more than the second: a share of the memory, or so much; open files and threads."""

CLIENTS = """
import asyncio, collections, json, random, sys, time
from openai import AsyncOpenAI, BadRequestError, NotFoundError, RateLimitError
job = json.load(sys.stdin)
answers, output, end = job["answers"], job["output"], time.monotonic() + job["seconds"]
drawn, told = random.Random(job["seed"]), collections.Counter()
client = AsyncOpenAI(base_url=f"http://{job['host']}:8000/v1", api_key=job["key"], max_retries=0, timeout=120)

def request(prompt, **others):
    return {"model": "served", "prompt": prompt, "max_tokens": output, "temperature": 0, **others}

async def read():
    prompt, text = drawn.choice(list(answers)), ""
    async for chunk in await client.completions.create(**request(prompt, stream=True)):
        text += chunk.choices[0].text
    told["answered" if text == answers[prompt] else "WRONG answer"] += 1

async def hang_up():
    stream = await client.completions.create(**request(drawn.choice(list(answers)), stream=True))
    await anext(stream.__aiter__())
    await stream.close()
    told["hung up"] += 1

async def send(body, seconds):
    reader, writer = await asyncio.open_connection(job["host"], 8000)
    head = f"POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nAuthorization: Bearer {job['key']}\\r\\n"
    head += f"Content-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(seconds)
    status = (await reader.readline()).split()[1] if not seconds else b""
    writer.close()
    return status

async def never_read():
    await send(json.dumps(request(drawn.choice(list(answers)), stream=True)).encode(), 3)
    told["never read"] += 1

async def no_json():
    status = await send(b'{"model": "served", "prompt', 0)
    refused = {b"400": "refused as no JSON", b"429": "refused as overload"}  # in a crowd nothing is read
    told[refused.get(status, f"WRONG status {status} to no JSON")] += 1

async def too_much():
    try:
        await client.completions.create(**request("x" * 5000))
        told["WRONG answer to too much"] += 1
    except BadRequestError:
        told["refused as too much"] += 1

async def another_model():
    try:
        await client.completions.create(**{**request("x"), "model": "another"})
        told["WRONG answer for another model"] += 1
    except NotFoundError:
        told["refused as unknown model"] += 1

SORTS = {read: 80, hang_up: 8, never_read: 3, no_json: 3, too_much: 3, another_model: 3}

async def one(sort):
    try:
        await sort()
    except RateLimitError:
        told["refused as overload"] += 1
        await asyncio.sleep(0.2)

async def come_and_go():
    while time.monotonic() < end:
        (sort,) = drawn.choices(list(SORTS), SORTS.values())
        await one(sort)

async def crowd():
    while time.monotonic() < end:
        await asyncio.gather(*(one(read) for _ in range(200)))
        await asyncio.sleep(20)

async def main():
    await asyncio.gather(crowd(), *(come_and_go() for _ in range(24)))
    print(json.dumps(told))

asyncio.run(main())
"""


@dataclass(frozen=True)
class Look:
    """What a process holds at a moment."""

    mebibytes: float
    files: int
    threads: int

    @classmethod
    def at(cls, pid: int) -> "Look":
        """Look at a process. Raises FileNotFoundError when it has ended."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"]))

    @classmethod
    def median(cls, looks: "list[Look]") -> "Look":
        """Of each, the median."""
        columns = zip(*((look.mebibytes, look.files, look.threads) for look in looks), strict=True)
        mebibytes, files, threads = map(statistics.median, columns)
        return cls(mebibytes, round(files), round(threads))

    def grown_from(self, before: "Look") -> bool:
        """Whether it holds more than noise explains."""
        handles = max(self.files - before.files, self.threads - before.threads)
        most = before.mebibytes + max(GROWTH_MEBIBYTES, GROWTH * before.mebibytes)
        return self.mebibytes > most or handles > GROWTH_HANDLES


def processes(run: kit.Job) -> Iterator[tuple[str, int]]:
    """Yield each process of the service, and its name."""
    for pod in stages(run):
        found = faults.stage_processes(pod["metadata"]["uid"])
        for name, process in (("agent", found.agent), ("worker", found.worker)):
            assert process, f"{pod['metadata']['name']} has no {name}"
            yield f"stage {pod['metadata']['labels']['pipelinejob.dev/stage']}, {name}", process.pid
    for number, pod in enumerate(run.namespace.list("pods", FRONT)):
        for group in cgroups.of_pod(pod["metadata"]["uid"]):
            for pid in cgroups.listed(group):
                if b"pipelinejob_worker.front" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield f"front {number}", pid


def soak(minutes: float, seed: int) -> bool:
    """Serve for so long; return whether all answers were right, and no process has grown."""
    with secured("soak") as namespace:
        answers = make_model(namespace, "models", LENGTHS, OUTPUT)
        run = kit.Job(namespace, "served", two_stages(requests=48)).create()
        run.wait("Available")
        clients = Clients.start(namespace)
        job = {"answers": answers, "output": OUTPUT, "seconds": 60 * minutes, "seed": seed, "host": "served-front"}
        begun = clients.run(CLIENTS, job)
        watched = dict(processes(run))
        looks: dict[str, list[Look]] = {name: [] for name in watched}
        while not begun.done():
            for name, pid in watched.items():
                looks[name].append(Look.at(pid))
            wait([begun], LOOK_SECONDS)
        told: Mapping[str, int] = json.loads(begun.result())
        assert dict(processes(run)) == watched, "a process has ended"
        run.delete()
    print(", ".join(f"{count} {what}" for what, count in sorted(told.items())))
    wrong = any(what.startswith("WRONG") for what in told)
    return _report(looks) and not wrong and "answered" in told and "refused as overload" in told


def _report(looks: Mapping[str, list[Look]]) -> bool:
    """Print what each process held; return whether none has grown."""
    flat = True
    print(f"{'':<18}{'memory':>9}{'later':>9} MiB{'files':>7}{'later':>7}{'threads':>9}{'later':>7}")
    for name, seen in looks.items():
        third = len(seen) // 3
        before, after = Look.median(seen[third : 2 * third]), Look.median(seen[2 * third :])
        grown = after.grown_from(before)
        flat = flat and not grown
        print(
            f"{name:<18}{before.mebibytes:>9.1f}{after.mebibytes:>9.1f}    {before.files:>7}{after.files:>7}"
            f"{before.threads:>9}{after.threads:>7}{'  HAS GROWN' if grown else ''}"
        )
    return flat


def main() -> int:
    """Run, and say how it went."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    install_anew()
    return 0 if soak(chosen.minutes, chosen.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
