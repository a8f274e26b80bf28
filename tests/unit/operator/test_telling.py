"""What is told to people: short numbers, the state, Events, and refusals in the server's own words."""

import pytest

from pipelinejob_operator.controller.refusals import classify, refusal
from pipelinejob_operator.controller.status import short_number
from pipelinejob_operator.controller.transitions import notices
from pipelinejob_operator.policy.reasons import Reason
from tests.unit.operator.builders import NOW, decide, ended, gated, job, pod, running_job, seconds, settled


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (14_211, "14.2k"), (3_100_000, "3.1M"), (2 * 10**9, "2.0G")]
)
def test_numbers_are_short(value: int, text: str) -> None:
    assert short_number(value) == text


class TestEvents:
    def test_a_birth_tells_that_the_spec_can_run_and_nothing_of_the_steps_between(self) -> None:
        assert [notice.reason for notice in decide(job()).notices] == ["Valid"]
        created = settled(job(), gated(0), gated(1), gated(2))
        assert decide(created, gated(0), gated(1), gated(2)).notices == ()

    def test_each_transition_is_told_once(self) -> None:
        created = settled(job(), gated(0), gated(1), gated(2))
        made = decide(created, pod(0), pod(1), pod(2))
        assert [(notice.kind, notice.reason) for notice in made.notices] == [
            ("Normal", "AllStagesPlaced"),
            ("Normal", "AllStagesReady"),
        ]
        assert decide(running_job(), pod(0), pod(1), pod(2)).notices == ()

    def test_another_restart_is_another_event_even_with_the_same_words(self) -> None:
        first = running_job()
        once = settled(first, pod(0), ended(1, 1), pod(2))
        again = settled(once, pod(0, 1), ended(1, 1, 1), pod(2, 1))
        occasions = {
            notice.occasion
            for old, new in ((first, once), (once, again))
            for notice in notices(old.status, new.status)
            if notice.reason is Reason.RESTARTING
        }
        assert len(occasions) == 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ('pods "a" is forbidden: exceeded quota: few, requested: pods=1, used: pods=2', Reason.QUOTA_EXCEEDED),
            ('pods "a" is forbidden: failed quota: few: must specify cpu for: worker', Reason.QUOTA_EXCEEDED),
            ('pods "a" is forbidden: violates PodSecurity "restricted:latest": x', Reason.POD_SECURITY_VIOLATION),
            ("pods is forbidden: maximum cpu usage per Container is 1, but limit is 2", Reason.LIMIT_RANGE_EXCEEDED),
            ('Pod "a" is invalid: spec.containers[0].image: Required value', Reason.POD_REFUSED),
        ],
    )
    def test_the_server_that_refused_is_told_by_its_words(self, words: str, reason: Reason) -> None:
        assert classify(words) is reason

    @pytest.mark.parametrize(("tries", "wait"), [(0, 2), (1, 4), (4, 32), (5, 60), (1000, 60)])
    def test_the_wait_doubles_up_to_a_minute(self, tries: int, wait: int) -> None:
        made = refusal(job(), what="pod a", reason=Reason.QUOTA_EXCEEDED, words="no", tries=tries, now=NOW)
        assert made.retry_at == NOW + seconds(wait)
        assert made.message.startswith("pod a was refused, so no stage starts: no; raise the ResourceQuota")
