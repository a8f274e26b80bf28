"""The operator has the rights that it uses and no others; its users get theirs from the cluster's own roles."""

import pytest

from tests.integration.operator.rights import CLUSTER_WIDE, NAMESPACED, POD_GROUPS
from tests.unit.chart.helm import NAMESPACE, ONE_NAMESPACE, RELEASE, Object, of_kind, render

JOB_RIGHTS = {
    "pipelinejobs.pipelinejob.dev": {"get", "list", "watch", "delete"},
    "pipelinejobs/status.pipelinejob.dev": {"patch"},
    "pipelinejobs/finalizers.pipelinejob.dev": {"update"},
    "pods": {"get", "list", "watch", "create", "patch", "delete"},
    "services": {"get", "create", "patch"},
    "configmaps": {"get", "create", "patch"},
    "deployments.apps": {"get", "create", "patch"},
    "poddisruptionbudgets.policy": {"get", "create", "patch"},
    "networkpolicies.networking.k8s.io": {"get", "create", "patch"},
    "persistentvolumeclaims": {"get"},
    "events": {"create"},
}
"""What the operator needs where it runs jobs."""

PLANNING_RIGHTS = {
    "nodes": {"get", "list", "watch"},
    "persistentvolumes": {"get"},
    "deviceclasses.resource.k8s.io": {"list"},
}
"""What it needs besides to plan where they run."""

BINDINGS = ("RoleBinding", "ClusterRoleBinding")


def rights(role: Object) -> dict[str, set[str]]:
    """The verbs of a role by resource."""
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault(f"{resource}.{group}".rstrip("."), set()).update(rule["verbs"])
    return found


def bound(objects: list[Object]) -> dict[tuple[str, str], Object]:
    """The roles that are bound, by kind and namespace; a binding must name a role of the release."""
    roles = {
        (item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]): item
        for item in of_kind(objects, "Role", "ClusterRole")
    }
    found = {}
    for binding in of_kind(objects, *BINDINGS):
        kind, namespace = binding["roleRef"]["kind"], binding["metadata"].get("namespace", "")
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": RELEASE, "namespace": NAMESPACE}]
        found[kind, namespace] = roles[kind, namespace, binding["roleRef"]["name"]]
    return found


def test_cluster_wide_it_may_run_jobs_everywhere_and_read_what_plans_are_made_from() -> None:
    roles = bound(render())
    assert set(roles) == {("ClusterRole", ""), ("Role", NAMESPACE)}
    assert rights(roles["ClusterRole", ""]) == JOB_RIGHTS | PLANNING_RIGHTS


def test_for_one_namespace_its_rights_end_there() -> None:
    roles = bound(render(*ONE_NAMESPACE))
    assert set(roles) == {("Role", "team-a"), ("Role", NAMESPACE)}
    assert rights(roles["Role", "team-a"]) == JOB_RIGHTS


@pytest.mark.parametrize(("values", "tested"), [((), CLUSTER_WIDE), (ONE_NAMESPACE, NAMESPACED)])
def test_these_are_the_rights_with_which_the_operator_is_tested(
    values: tuple[str, ...], tested: list[dict[str, list[str]]]
) -> None:
    given = [rule for role in bound(render(*values)).values() for rule in role["rules"]]
    assert rights({"rules": given}) == rights({"rules": tested})


@pytest.mark.parametrize(
    ("scheduler", "group"),
    [
        ("PodGroup", "scheduling.k8s.io"),
        ("Volcano", "scheduling.volcano.sh"),
        ("SchedulerPlugins", "scheduling.x-k8s.io"),
    ],
)
def test_it_may_write_the_pod_groups_of_those_schedulers_that_the_chart_names(scheduler: str, group: str) -> None:
    roles = bound(render(*ONE_NAMESPACE, f"schedulers={{{scheduler}}}"))
    assert rights(roles["Role", "team-a"]) == JOB_RIGHTS | {f"podgroups.{group}": {"get", "create", "patch"}}


def test_these_are_the_rights_with_which_delegation_is_tested() -> None:
    roles = bound(render(*ONE_NAMESPACE, "schedulers={PodGroup,Volcano,SchedulerPlugins}"))
    assert rights(roles["Role", "team-a"]) == JOB_RIGHTS | rights({"rules": POD_GROUPS})


@pytest.mark.parametrize("values", [(), ONE_NAMESPACE])
def test_the_lease_is_its_own_alone(values: tuple[str, ...]) -> None:
    rules = bound(render(*values))["Role", NAMESPACE]["rules"]
    assert {(tuple(rule["verbs"]), tuple(rule.get("resourceNames", ()))) for rule in rules} == {
        (("get", "update"), (RELEASE,)),
        (("create",), ()),
    }
    assert all(rule["resources"] == ["leases"] for rule in rules)


def granted(to: str) -> dict[str, set[str]]:
    """What the chart adds to one of the cluster's own roles."""
    label = f"rbac.authorization.k8s.io/aggregate-to-{to}"
    found: dict[str, set[str]] = {}
    for role in of_kind(render(), "ClusterRole"):
        if role["metadata"]["labels"].get(label) == "true":
            for resource, verbs in rights(role).items():
                found[resource] = found.get(resource, set()) | verbs
    return found


def test_jobs_are_part_of_the_roles_view_and_edit() -> None:
    reads = {"get", "list", "watch"}
    view = {
        "pipelinejobs.pipelinejob.dev": reads,
        "pipelinejobs/status.pipelinejob.dev": {"get"},
        "pipelinejobs/scale.pipelinejob.dev": {"get"},
    }
    edit = view | {
        "pipelinejobs.pipelinejob.dev": reads | {"create", "update", "patch", "delete", "deletecollection"},
        "pipelinejobs/scale.pipelinejob.dev": {"get", "update", "patch"},
    }
    assert granted("view") == view
    assert granted("edit") == edit


def test_the_admin_of_a_namespace_can_install_the_operator_for_it() -> None:
    """Nobody may grant more than they have, so the admin needs all that the operator needs of PipelineJobs."""
    admin = granted("admin")
    for resource, verbs in JOB_RIGHTS.items():
        if "pipelinejobs" in resource:
            assert verbs <= admin[resource]


def test_what_is_the_whole_clusters_can_be_left_to_its_administrator() -> None:
    objects = render(*ONE_NAMESPACE, "crds.enabled=false", "userRoles.enabled=false", "creatorPolicy.enabled=false")
    assert all("namespace" in item["metadata"] for item in objects)
