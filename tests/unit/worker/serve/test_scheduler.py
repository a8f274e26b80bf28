"""The scheduler keeps its promises on random work, beside a model that remembers what lies in every slot."""

import random
from collections import deque
from collections.abc import Sequence

import pytest

from pipelinejob_worker.serve.batch import BLOCK, Batch, Drawn, blocks_for
from pipelinejob_worker.serve.scheduler import CALL_TOKENS, Emitted, Ended, Event, Limits, Refusal, Request, Scheduler
from pipelinejob_worker.serve.wire import Sampling

GREEDY = Sampling(temperature=0)


def following(tokens: Sequence[int]) -> int:
    """A model: the next token is a function of all before it."""
    return hash(tuple(tokens)) % 1000


def output_of(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class Cache:
    """Slots that hold the token last written; what a piece reads must be what it is a continuation of."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def run(self, batch: Batch) -> list[Drawn]:
        drawn, tokens = [], iter(batch.tokens)
        for piece in batch.pieces:
            places = [
                piece.blocks[place // BLOCK] * BLOCK + place % BLOCK for place in range(piece.start + piece.count)
            ]
            assert min(piece.blocks) > 0
            for place in places[piece.start :]:
                self.slots[place] = next(tokens)
            if piece.sampling:
                drawn.append(Drawn(following([self.slots[place] for place in places])))
        assert next(tokens, None) is None
        return drawn


class Engine:
    """A scheduler with stages that take batches in order and give them back in order."""

    def __init__(self, limits: Limits) -> None:
        self.scheduler = Scheduler(limits)
        self.limits = limits
        self.cache = Cache()
        self.flying: deque[tuple[Batch, list[Drawn]]] = deque()
        self.sizes: list[int] = []
        self.outputs: dict[object, list[int]] = {}
        self.ended: dict[object, Ended] = {}
        self.waits: dict[object, int] = {}

    def submit(self, request: Request) -> Refusal | None:
        answer = self.scheduler.submit(request)
        if isinstance(answer, Refusal):
            return answer
        self.outputs[request.key] = list(request.emitted)
        self.take(answer)
        return None

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            assert event.key not in self.ended
            if isinstance(event, Ended):
                self.ended[event.key] = event
            else:
                assert isinstance(event, Emitted)
                self.outputs[event.key].append(event.drawn.token or 0)

    def send(self) -> bool:
        batch = self.scheduler.next_batch()
        if batch is None:
            return False
        assert 0 < batch.size <= self.limits.batch_tokens
        used = [block for piece in batch.pieces for block in piece.blocks]
        assert len(used) == len(set(used)), "two requests of a batch share a block"
        assert max(used) <= self.limits.blocks
        assert self.scheduler.used_blocks <= self.limits.blocks
        self.sizes.append(batch.size)
        self.flying.append((batch, self.cache.run(batch)))
        return True

    def receive(self) -> None:
        batch, drawn = self.flying.popleft()
        self.take(self.scheduler.complete(batch.number, drawn))

    def turn(self) -> None:
        """Send all that can leave, and take one batch back."""
        while self.send():
            pass
        self.receive()

    def finish(self) -> None:
        for _ in range(100_000):
            while self.send():
                pass
            if not self.flying:
                break
            self.receive()
        assert (self.scheduler.running, self.scheduler.queued, self.scheduler.used_blocks) == (0, 0, 0)


def limits(blocks: int = 64, batches: int = 3, batch_tokens: int = 64, accepted: int = 100_000) -> Limits:
    return Limits(blocks, context=512, batches=batches, batch_tokens=batch_tokens, accepted_tokens=accepted)


def request(key: object, prompt: int, output: int, **others: object) -> Request:
    tokens = tuple(random.Random(str(key)).choices(range(1000), k=prompt))
    settings = {"sampling": GREEDY, "deadline": 1e9, **others}
    return Request(key=str(key), prompt=tokens, max_tokens=output, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_every_request_gets_its_own_tokens_whatever_shares_its_batches_and_cache(seed: int) -> None:
    drawn = random.Random(seed)
    batches = drawn.randint(1, 6)
    engine = Engine(limits(drawn.choice([13, 20, 64]), batches, drawn.choice([2, 16, 64])))
    requests = [request(f"{seed}-{key}", drawn.randint(1, 120), drawn.randint(1, 80)) for key in range(30)]
    for each in requests:
        assert engine.submit(each) is None
        for _ in range(drawn.randint(0, 6)):
            if engine.flying and drawn.random() < 0.5:
                engine.receive()
            else:
                engine.send()
    engine.finish()
    for each in requests:
        assert engine.outputs[each.key] == output_of(each.prompt, each.max_tokens)
        assert engine.ended[each.key].reason == "length"


def test_preempted_requests_are_computed_anew_and_the_oldest_never_is() -> None:
    engine = Engine(limits(blocks=12, batches=2))
    requests = [request(key, 20, 100) for key in range(8)]
    order = []
    for each in requests:
        engine.submit(each)
    while len(engine.ended) < len(requests):
        engine.turn()
        order += [key for key in engine.ended if key not in order]
    assert engine.scheduler.preemptions > 3
    assert order == [each.key for each in requests]
    assert all(engine.outputs[each.key] == output_of(each.prompt, 100) for each in requests)


def test_cancelled_and_late_requests_free_their_blocks_also_while_in_flight() -> None:
    engine = Engine(limits())
    for key, deadline in (("late", 5.0), ("cancelled", 1e9), ("queued", 1e9), ("kept", 1e9)):
        engine.submit(request(key, 40, 10, deadline=deadline))
    assert engine.send()
    assert engine.scheduler.next_deadline() == 5.0
    engine.take(engine.scheduler.expire(4.9))
    assert not engine.ended
    engine.take(engine.scheduler.expire(5.0))
    engine.take(engine.scheduler.end("cancelled", "cancelled"))
    assert engine.scheduler.end("cancelled", "cancelled") == []
    engine.take(engine.scheduler.end("queued", "cancelled"))
    assert {key: end.reason for key, end in engine.ended.items()} == {
        "late": "deadline",
        "cancelled": "cancelled",
        "queued": "cancelled",
    }
    engine.finish()
    assert engine.outputs["kept"] == output_of(request("kept", 40, 10).prompt, 10)
    assert engine.outputs["cancelled"] == []


def test_a_request_larger_than_context_cache_or_all_that_is_accepted_is_refused_for_good() -> None:
    scheduler = Scheduler(limits(blocks=10, accepted=200))
    for prompt, output, what in ((500, 13, "context"), (100, 62, "cache"), (1, 200, "accepted")):
        bounds = limits(blocks=10 if what == "cache" else 64, accepted=200 if what == "accepted" else 100_000)
        refusal = Scheduler(bounds).submit(request("large", prompt, output))
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "too_large"
        assert what in refusal.message
    assert scheduler.submit(request("fits", 100, 61)) == []
    engine = Engine(limits(blocks=10))
    engine.submit(request("fits", 100, 61))
    engine.finish()
    assert len(engine.outputs["fits"]) == 61


def test_more_than_is_accepted_at_a_time_is_refused_for_now_but_not_what_was_accepted_before() -> None:
    engine = Engine(limits(accepted=100))
    assert engine.submit(request("first", 40, 20)) is None
    refusal = engine.submit(request("second", 40, 20))
    assert refusal is not None
    assert refusal.reason == "overloaded"
    assert engine.submit(request("resumed", 40, 20, emitted=(7,))) is None
    engine.finish()
    assert engine.submit(request("second", 40, 20)) is None


def test_a_resumed_request_goes_on_behind_its_tokens() -> None:
    whole = request("same", 30, 20)
    expected = output_of(whole.prompt, 20)
    engine = Engine(limits())
    engine.submit(request("same", 30, 20, emitted=tuple(expected[:12])))
    engine.finish()
    assert engine.outputs["same"] == expected


def test_a_resumed_request_that_was_complete_ends_at_once() -> None:
    engine = Engine(limits())
    engine.submit(request("length", 3, 2, emitted=(1, 2)))
    engine.submit(request("stop", 3, 9, emitted=(1, 2), stop_tokens=frozenset({2})))
    assert {key: end.reason for key, end in engine.ended.items()} == {"length": "length", "stop": "stop"}
    assert not engine.send()


def test_a_request_ends_with_a_stop_token_or_when_its_text_does() -> None:
    prompt = request("token", 10, 50).prompt
    expected = output_of(prompt, 50)
    engine = Engine(limits())
    seen: list[int] = []
    engine.submit(request("token", 10, 50, stop_tokens=frozenset({expected[4]})))
    text = request("text", 10, 50, ends=lambda token: seen.append(token) or len(seen) == 7)
    engine.submit(text)
    engine.finish()
    assert engine.outputs["token"] == expected[:5]
    assert engine.outputs["text"] == seen == output_of(text.prompt, 7)
    assert {end.reason for end in engine.ended.values()} == {"stop"}


def test_logits_that_are_not_finite_end_their_request_only() -> None:
    scheduler = Scheduler(limits())
    for key in ("bad", "good"):
        scheduler.submit(request(key, 3, 5))
    batch = scheduler.next_batch()
    assert batch is not None
    events = scheduler.complete(batch.number, [Drawn(None), Drawn(8)])
    assert events == [Ended("bad", "error", "the model's logits are not finite"), Emitted("good", 3, Drawn(8))]


@pytest.mark.parametrize("batches", [1, 2, 4, 5])
def test_generating_requests_are_spread_evenly_over_the_batches_in_flight(batches: int) -> None:
    engine = Engine(limits(batches=batches))
    for key in range(8):
        engine.submit(request(key, 1, 30))
    for _ in range(batches * 3):
        engine.turn()
    assert max(engine.sizes[-batches:]) <= -(-8 // batches)
    assert len(engine.flying) in (batches - 1, batches)


def test_the_chunks_of_one_prompt_fill_all_stages_without_waiting() -> None:
    engine = Engine(limits(batches=4))
    engine.submit(request("long", 200, 1))
    while engine.send():
        pass
    assert engine.sizes == [50, 50, 50, 50]
    assert [bool(batch.draws) for batch, _ in engine.flying] == [False, False, False, True]


def test_a_long_prompt_does_not_stop_those_that_generate() -> None:
    engine = Engine(limits(batches=2, batch_tokens=CALL_TOKENS))
    for key in range(4):
        engine.submit(request(key, 1, 60))
    for _ in range(6):
        engine.turn()
    engine.submit(request("long", 400, 1))
    before = len(engine.outputs["0"])
    while "long" not in engine.ended:
        while engine.send():
            pass
        assert {piece.count for batch, _ in engine.flying for piece in batch.pieces if piece.start == 0} <= {1, 30, 31}
        engine.receive()
    # 400 tokens in chunks of 30 beside two others; each of those is in every second batch.
    assert len(engine.outputs["0"]) - before >= 5
    assert engine.scheduler.preemptions == 0


def test_many_that_generate_do_not_stop_a_prompt() -> None:
    engine = Engine(limits(blocks=1000, batches=2, batch_tokens=512))
    for key in range(400):
        engine.submit(request(key, 1, 60))
    for _ in range(6):
        engine.turn()
    engine.submit(request("prompt", 3 * CALL_TOKENS, 1))
    for _ in range(6):
        engine.turn()
    assert "prompt" in engine.ended


def test_the_larger_priority_is_admitted_first_and_equal_ones_in_their_order() -> None:
    engine = Engine(limits(blocks=blocks_for(100), batches=1))
    for key, priority in (("running", 0), ("a", 0), ("b", 0), ("urgent", 5)):
        engine.submit(request(key, 60, 40, priority=priority))
        if key == "running":
            engine.send()
    engine.finish()
    assert list(engine.ended) == ["running", "urgent", "a", "b"]


def test_requests_that_generate_advance_alike() -> None:
    engine = Engine(limits(batches=2, batch_tokens=4))
    for key in range(7):
        engine.submit(request(key, 1, 100))
    for _ in range(60):
        engine.turn()
    lengths = [len(output) for output in engine.outputs.values()]
    assert min(lengths) >= 60 // 2 - 2
    assert max(lengths) - min(lengths) <= 1
