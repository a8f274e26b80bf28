"""From a request's body to the choices that are to be generated. Pure but for the seeds of those who give none."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from pipelinejob_worker.front.chat import ChatTemplate
from pipelinejob_worker.front.refusals import invalid, too_long
from pipelinejob_worker.front.schema import ChatRequest, CompletionRequest, Request
from pipelinejob_worker.front.settings import Limits
from pipelinejob_worker.front.tokenizer import Tokenizer
from pipelinejob_worker.serve.wire import Ready, Sampling

_SEEDS = 1 << 63


@dataclass(frozen=True)
class Choice:
    """One answer to generate; none where ``max_tokens`` is 0. ``echo``: text that clients get before it."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop: list[str]
    stop_token_ids: list[int]
    echo: str = ""


class Planner:
    """Plans requests for one model; ``template`` is None where it has none."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._limits = limits

    def completion(self, body: CompletionRequest, bounds: Ready) -> list[Choice]:
        """Return the choices of all prompts: ``n`` for each, in order. Raises ApiError."""
        self._check_choices(len(body.prompts), body.n)
        found = []
        for prompt in body.prompts:
            ids = self._tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else prompt
            allowed = self._room("prompt", ids, body.max_tokens, "max_tokens", bounds)
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
            found += self._choices(body, ids, allowed, body.logprobs, text if body.echo else "")
        return self._bounded(found)

    def chat(self, body: ChatRequest, bounds: Ready) -> list[Choice]:
        """Return the choices of a chat. Raises ApiError."""
        if self._template is None:
            raise invalid("messages", "This model has no chat template; use /v1/completions.", "no_chat_template")
        self._check_choices(1, body.n)
        messages = [message.for_template() for message in body.messages]
        ids = self._tokenizer.encode(self._template.render(messages, body.chat_template_kwargs), special=False)
        if not ids:
            raise invalid("messages", "The model's chat template makes an empty prompt of the messages.")
        wanted = body.max_completion_tokens or body.max_tokens
        name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        allowed = self._room("messages", ids, wanted, name, bounds)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._bounded(self._choices(body, ids, allowed, logprobs, ""))

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts * n > self._limits.choices:
            raise invalid("n", f"{prompts} prompts times n = {n} are more than {self._limits.choices} choices.")

    def _bounded(self, choices: list[Choice]) -> list[Choice]:
        """Refuse what is small to ask and large to hold, as every choice has its prompt."""
        tokens = sum(len(choice.prompt) for choice in choices)
        if tokens > self._limits.held_tokens:
            raise too_long(
                "n",
                f"All choices together have {tokens} prompt tokens; at most {self._limits.held_tokens} are allowed.",
            )
        echoed = sum(len(choice.echo) for choice in choices)
        if echoed > self._limits.body_bytes:
            raise invalid(
                "echo", f"All echoes have {echoed} characters; at most {self._limits.body_bytes} are allowed."
            )
        return choices

    def _room(self, param: str, ids: Sequence[int], wanted: int | None, name: str, bounds: Ready) -> int:
        """Return how many tokens may follow the prompt: as many as asked for, else as fit."""
        if not ids:
            raise invalid(param, "The prompt is empty; send at least one token.")
        if max(ids) >= bounds.vocabulary:
            raise invalid(param, f"Token {max(ids)} is unknown: the model's ids are below {bounds.vocabulary}.")
        most = min(self._limits.prompt_tokens, bounds.context - 1)
        if len(ids) > most:
            raise too_long(param, f"The prompt has {len(ids)} tokens; this model takes at most {most}.")
        left = min(self._limits.output_tokens, bounds.context - len(ids))
        if wanted is not None and wanted > left:
            raise too_long(
                name,
                f"{name} is {wanted}, but at most {left} tokens can follow a prompt of {len(ids)} tokens "
                f"(context {bounds.context}, output limit {self._limits.output_tokens}).",
            )
        return left if wanted is None else wanted

    def _choices(
        self, body: Request, prompt: list[int], max_tokens: int, logprobs: int | None, echo: str
    ) -> list[Choice]:
        """Return ``n`` choices, each with a seed of its own, as equal seeds would give equal answers."""
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return [
            Choice(
                prompt=prompt,
                max_tokens=max_tokens,
                sampling=_sampling(body, logprobs, (seed + index + _SEEDS) % (2 * _SEEDS) - _SEEDS),
                stop=body.stops,
                stop_token_ids=[] if body.ignore_eos else self._tokenizer.end_token_ids,
                echo=echo,
            )
            for index in range(body.n)
        ]


def _sampling(body: Request, logprobs: int | None, seed: int) -> Sampling:
    """Translate to the engine's terms; a ``top_p`` of 0 keeps the likeliest token alone, and so does ``top_k`` 1."""
    greedy = body.top_p == 0
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=1 if greedy else max(body.top_k, 0),
        top_p=1.0 if greedy or body.top_p is None else body.top_p,
        seed=seed,
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
    )
