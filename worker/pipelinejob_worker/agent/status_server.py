"""What an agent serves: ``/status``, ``/metrics``, ``/healthz`` and ``/readyz``; read only."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from pipelinejob_worker.protocol import AgentStatus

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@asynccontextmanager
async def serve(port: int, status: Callable[[], AgentStatus]) -> AsyncIterator[int]:
    """Serve on all interfaces until the end of the block; yield the port. Raises OSError when it is taken."""

    async def answer_status(_: web.Request) -> web.Response:
        return web.Response(text=status().to_json(), content_type="application/json")

    async def answer_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics(status()).encode(), headers={"Content-Type": _METRICS_TYPE})

    async def answer_health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def answer_readiness(_: web.Request) -> web.Response:
        state = status().state
        return web.Response(text=f"{state}\n", status=200 if state == "Running" else 503)

    application = web.Application()
    application.add_routes(
        [
            web.get("/status", answer_status),
            web.get("/metrics", answer_metrics),
            web.get("/healthz", answer_health),
            web.get("/readyz", answer_readiness),
        ]
    )
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def metrics(status: AgentStatus) -> str:
    """Render a status in the text format of Prometheus; what is not known yet is left out."""
    progress = status.progress
    busy = [timing.busy_percent for timing in progress.stages if timing.stage == status.stage]
    gauges: list[tuple[str, str, float | None]] = [
        ("pipelinejob_stage_running", "Whether the stage trains in its group.", float(status.state == "Running")),
        ("pipelinejob_stage_epoch", "Epoch of the membership that the stage obeys.", status.epoch),
        ("pipelinejob_stage_step", "Finished optimizer steps.", progress.step),
        ("pipelinejob_stage_total_steps", "Optimizer steps of the whole job.", progress.total_steps),
        ("pipelinejob_stage_last_checkpoint_step", "Step of the newest checkpoint.", progress.last_checkpoint_step),
        ("pipelinejob_stage_loss", "Loss of the last finished step.", progress.loss),
        ("pipelinejob_stage_tokens_per_second", "Tokens trained in a second.", progress.tokens_per_second),
        ("pipelinejob_stage_bubble_ratio", "Idle share of all stages.", _ratio(progress.bubble_percent)),
        (
            "pipelinejob_stage_bubble_limit_ratio",
            "Idle share that the schedule allows at best.",
            _ratio(progress.bubble_limit_percent),
        ),
        ("pipelinejob_stage_busy_ratio", "Share of a step in which the stage computes.", _ratio(*busy[:1])),
    ]
    lines = []
    for name, explanation, value in gauges:
        if value is not None:
            lines += [
                f"# HELP {name} {explanation}",
                f"# TYPE {name} gauge",
                f'{name}{{stage="{status.stage}"}} {value}',
            ]
    return "\n".join(lines) + "\n"


def _ratio(percent: float | None = None) -> float | None:
    return None if percent is None else percent / 100
