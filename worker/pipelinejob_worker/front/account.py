"""What is remembered of a request for its line in the log."""

from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class Account:
    """``request_id``: the client's, or one made here. ``outcome``: code of the error that the client got, if any."""

    request_id: str
    answer: str = ""
    """Beginning of the ids by which engines know its choices."""
    outcome: str = ""
    usage: dict[str, int] = field(default_factory=dict)


ACCOUNT = web.RequestKey("account", Account)
