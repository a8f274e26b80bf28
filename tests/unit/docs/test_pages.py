"""The documentation is complete, and says what the code does."""

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from pipelinejob_operator.build import names
from pipelinejob_operator.controller import status
from pipelinejob_operator.policy.reasons import ConditionType, Reason
from pipelinejob_operator.runtime import metrics as operator_metrics
from pipelinejob_worker.agent.status_server import metrics as agent_metrics
from pipelinejob_worker.protocol import (
    CHECKPOINT_DIRECTORY,
    CONFIG_FILE,
    MEMBERSHIP_FILE,
    POD_INFO_DIRECTORY,
    SCRATCH_DIRECTORY,
    AgentStatus,
    Env,
    ExitCode,
    Membership,
    Progress,
    ProtectionStatus,
    RecoveryStatus,
    Serving,
    StageTiming,
)
from tests.unit.docs.pages import DOCS, ROOT, anchors, links, pages, table

CONDITIONS = DOCS / "reference/conditions.md"
METRICS = DOCS / "reference/metrics.md"
ENVIRONMENT = DOCS / "reference/environment.md"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_lists_every_page() -> None:
    listed = {(DOCS / link).resolve() for link in links(DOCS / "README.md")}
    assert listed == set(DOCS.rglob("*.md")) - {DOCS / "README.md"}


def test_every_condition_and_reason_is_explained() -> None:
    assert [tuple(row) for row in table(CONDITIONS, "Conditions")] == [(kind, kind.__doc__) for kind in ConditionType]
    assert [tuple(row[:2]) for row in table(CONDITIONS, "Reasons")] == [(reason, reason.__doc__) for reason in Reason]


def test_every_state_is_explained() -> None:
    words = {word for word, _, _ in status._WORDS} | set(status._NOT_RUNNING.values()) | {"Starting", "Pending"}
    rows = {row[0]: row[1] for row in table(CONDITIONS, "States")}
    assert set(rows) == words
    for reason, word in status._NOT_RUNNING.items():
        assert reason in rows[word]


def test_every_metric_of_the_operator_is_explained() -> None:
    rows = table(METRICS, "Operator")
    written = {name: (kind, labels) for name, kind, labels, _ in rows}
    own = [item for item in vars(operator_metrics).values() if isinstance(item, MetricWrapperBase)]
    expected = {}
    for metric in own:
        (family,) = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        expected[name] = (family.type, ", ".join(metric._labelnames))
    jobs = operator_metrics.JobCollector(lambda: [("default", "tiny", "Running", 1, 30)])
    REGISTRY.unregister(jobs)
    for family in jobs.collect():
        labels = {label for sample in family.samples for label in sample.labels}
        expected[family.name] = (family.type, ", ".join(sorted(labels, reverse=True)))
    assert written == expected


def test_every_metric_of_a_stage_is_explained() -> None:
    shares = {name: 1 for name, field in StageTiming.model_fields.items() if field.annotation == int | None}
    numbers = {name: 1 for name, field in Progress.model_fields.items() if field.annotation == float | None}
    progress = Progress(**numbers, stages=[StageTiming(stage=0, busy_percent=1, **shares)], serving=Serving())
    measured = {"protection": ProtectionStatus(cost_percent=1), "recovery": RecoveryStatus(last_pause_seconds=1)}
    told = agent_metrics(AgentStatus(job_uid="1", stage=0, epoch=1, state="Running", progress=progress, **measured))
    served = re.findall(r"^# TYPE (\w+) (\w+)$", told, re.MULTILINE)
    assert [(name, kind) for name, kind, _, _ in table(METRICS, "Stages")] == served
    assert {labels for _, _, labels, _ in table(METRICS, "Stages")} == {"stage"}


def test_every_variable_of_a_stage_is_explained() -> None:
    listed = [name for row in table(ENVIRONMENT, "Environment") for name in row[0].split(", ")]
    assert sorted(listed) == sorted(Env)


def test_every_directory_and_file_of_a_stage_is_explained() -> None:
    listed = {row[0] for row in table(ENVIRONMENT, "Files and directories")}
    files = {f"{POD_INFO_DIRECTORY}/{name}" for name in (CONFIG_FILE, MEMBERSHIP_FILE)}
    assert files | {CHECKPOINT_DIRECTORY, SCRATCH_DIRECTORY} <= listed


def test_every_member_of_a_membership_is_explained() -> None:
    text = ENVIRONMENT.read_text()
    for field in Membership.model_fields.values():
        assert f"`{field.alias}`" in text


def test_every_exit_code_is_explained() -> None:
    rows = {name: code for code, name, _, _ in table(ENVIRONMENT, "Exit codes of the agent") if name}
    assert rows == {code.name: str(int(code)) for code in ExitCode}


def test_every_label_is_explained() -> None:
    labels = {value for name, value in vars(names).items() if name.endswith("_LABEL")}
    assert {row[0] for row in table(ENVIRONMENT, "Labels of the job's objects")} == labels
