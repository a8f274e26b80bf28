"""Structured logs: one JSON object a line on standard output."""

import structlog


def configure(**context: object) -> None:
    """Set up structlog for this process; ``context`` (job, stage, epoch, ...) goes into every line."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        cache_logger_on_first_use=False,
    )
