"""What an agent serves: ``/status``, ``/metrics``, ``/trace``, ``/healthz`` and ``/readyz``; read only."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from pipelinejob_worker.protocol import AgentStatus, Serving, StageTiming

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Gauge = tuple[str, str, float | None]
"""Name after ``pipelinejob_stage_``, explanation, value."""


@asynccontextmanager
async def serve(port: int, status: Callable[[], AgentStatus], trace: Path) -> AsyncIterator[int]:
    """Serve on all interfaces until the end of the block; yield the port. Raises OSError when it is taken.

    ``trace``: file that the worker of rank 0 writes now and then.
    """

    async def answer_status(_: web.Request) -> web.Response:
        return web.Response(text=status().to_json(), content_type="application/json")

    async def answer_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics(status()).encode(), headers={"Content-Type": _METRICS_TYPE})

    async def answer_trace(_: web.Request) -> web.StreamResponse:
        try:
            content = await asyncio.to_thread(trace.read_bytes)
        except FileNotFoundError:
            return web.Response(text="no step is traced here: ask rank 0, some steps after its start\n", status=404)
        return web.Response(body=content, content_type="application/json")

    async def answer_health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def answer_readiness(_: web.Request) -> web.Response:
        state = status().state
        return web.Response(text=f"{state}\n", status=200 if state in ("Running", "Standby") else 503)

    application = web.Application()
    application.add_routes(
        [
            web.get("/status", answer_status),
            web.get("/metrics", answer_metrics),
            web.get("/trace", answer_trace),
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
    own = next((timing for timing in status.progress.stages if timing.stage == status.stage), None)
    lines = []
    serving = status.progress.serving
    for name, explanation, value in [
        *_gauges(status),
        *(_times(own) if own else ()),
        *(_requests(serving) if serving else ()),
    ]:
        if value is not None:
            lines += [
                f"# HELP pipelinejob_stage_{name} {explanation}",
                f"# TYPE pipelinejob_stage_{name} gauge",
                f'pipelinejob_stage_{name}{{stage="{status.stage}"}} {value}',
            ]
    return "\n".join(lines) + "\n"


def _gauges(status: AgentStatus) -> list[_Gauge]:
    """What every stage knows of the whole job, and of itself."""
    progress = status.progress
    return [
        ("running", "Whether the stage trains in its group.", float(status.state == "Running")),
        ("epoch", "Epoch of the membership that the stage obeys.", status.epoch),
        ("step", "Finished optimizer steps.", progress.step),
        ("total_steps", "Optimizer steps of the whole job.", progress.total_steps),
        ("skipped_steps", "Steps without update, as float16 overflowed.", progress.skipped_steps),
        ("step_seconds", "Measured time of a step.", progress.step_seconds),
        ("step_predicted_seconds", "Time of a step that the partition promised.", progress.step_predicted_seconds),
        ("last_checkpoint_step", "Step of the newest checkpoint.", progress.last_checkpoint_step),
        ("checkpoint_problem", "Whether the newest checkpoint failed.", float(bool(progress.checkpoint_problem))),
        ("loss", "Loss of the last finished step.", progress.loss),
        ("validation_loss", "Newest loss of the validation split.", progress.validation_loss),
        ("tokens_per_second", "Tokens trained in a second.", progress.tokens_per_second),
        ("model_flops_per_second", "Model FLOPs a second, all stages.", _times_1e12(progress.model_tera_flops)),
        ("model_flops_ratio", "Model FLOPs utilization (MFU).", _ratio(progress.model_flops_percent)),
        ("bubble_ratio", "Idle share of all stages.", _ratio(progress.bubble_percent)),
        ("bubble_limit_ratio", "Idle share that the schedule allows.", _ratio(progress.bubble_limit_percent)),
        ("bubble_predicted_ratio", "Idle share that was promised.", _ratio(progress.bubble_predicted_percent)),
        *_recovery(status),
    ]


def _recovery(status: AgentStatus) -> list[_Gauge]:
    """What a failure would cost, and what the last one did."""
    protection, recovery, traffic = status.protection, status.recovery, status.traffic
    return [
        ("recovering", "Whether the stage waits for its group to form anew.", float(status.state == "Recovering")),
        ("incarnation_attempt", "Lives of the group within the epoch.", status.incarnation_attempt),
        ("worker_restarts", "Workers that were started anew in this pod.", status.worker_restarts),
        ("snapshot_step", "Step of the newest snapshot in this pod's memory.", protection.step),
        ("guarded_step", "Newest step of which the snapshot is in another pod, too.", protection.guarded_step),
        ("snapshot_interval_steps", "Steps between two snapshots.", protection.interval_steps),
        ("at_risk_steps", "Steps that the loss of a node would cost.", protection.at_risk_steps),
        ("unprotected", "Whether something keeps steps from being protected.", float(bool(protection.problem))),
        ("snapshot_cost_ratio", "Share of the time that snapshots take.", _ratio(protection.cost_percent)),
        ("pieces_sent_bytes", "Snapshot payload sent to other pods.", traffic.pieces_sent_bytes),
        ("pieces_received_bytes", "Snapshot payload received.", traffic.pieces_received_bytes),
        ("recovery_pause_seconds", "How long the last recovery or rescale took.", recovery.last_pause_seconds),
        ("recovery_repeated_steps", "Steps that it computed again.", recovery.steps_repeated),
    ]


def _requests(serving: Serving) -> list[_Gauge]:
    """What stage 0 of a pipeline that serves knows of its requests."""
    return [
        ("requests_per_second", "Requests that got all their tokens in a second.", serving.requests_per_second),
        ("requests_running", "Requests with cache.", serving.running),
        ("requests_waiting", "Accepted requests without cache.", serving.queued),
        ("kv_cache_usage_ratio", "Used share of the key-value cache.", _ratio(serving.cache_percent)),
        ("prompt_tokens_per_second", "Tokens of prompts in a second.", serving.prompt_tokens_per_second),
        ("preemptions", "Requests that lost their cache to others.", serving.preemptions),
    ]


def _times(own: StageTiming) -> list[_Gauge]:
    """Where the time of this stage goes, in shares of a step."""
    return [
        ("busy_ratio", "Share of a step in which the stage computes.", _ratio(own.busy_percent)),
        ("forward_ratio", "Share of a step in forward passes.", _ratio(own.forward_percent)),
        ("backward_ratio", "Share of a step in backward passes.", _ratio(own.backward_percent)),
        ("weight_ratio", "Share of a step in the weights' part of split backwards.", _ratio(own.weight_percent)),
        ("update_ratio", "Share of a step in agreeing on it and updating weights.", _ratio(own.update_percent)),
        ("waiting_ratio", "Share of a step in waiting for other stages.", _ratio(own.waiting_percent)),
        ("sending_ratio", "Share of a step in sending to other stages.", _ratio(own.sending_percent)),
    ]


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _times_1e12(tera: float | None) -> float | None:
    return None if tera is None else tera * 1e12
