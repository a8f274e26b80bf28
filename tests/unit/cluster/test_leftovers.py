"""The comparison of the machine before and after."""

from tests.cluster import leftovers


def test_what_came_and_what_went_is_named() -> None:
    before = {"mount": ["/", "/proc"], "link": ["lo"]}
    after = {"mount": ["/"], "link": ["lo", "pipelinejob0"]}
    assert leftovers.differences(before, after) == [
        "taken away: mount /proc",
        "left behind: link pipelinejob0",
    ]
    assert leftovers.differences(before, before) == []
