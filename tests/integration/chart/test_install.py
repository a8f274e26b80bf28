"""A real API server takes what the chart installs, and keeps the promises of its policy, its roles and its CRD."""

import copy
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.control_plane import ControlPlane
from tests.unit.chart.helm import (
    CHART,
    EVERYTHING,
    NAMESPACE,
    ONE_NAMESPACE,
    RELEASE,
    ROOT,
    deployment,
    helm,
    render,
    settings,
)

TEAM = "team-a"
CRD = "pipelinejobs.pipelinejob.dev"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
GARBAGE_COLLECTOR = "system:serviceaccount:kube-system:generic-garbage-collector"
CLUSTER_SCOPED = ("crds", "userRoles", "creatorPolicy")
PATIENCE_SECONDS = 30.0
POLL_SECONDS = 0.1

JOB = yaml.safe_load((ROOT / "examples" / "tiny-gpt.yaml").read_text())

Done = subprocess.CompletedProcess[str]


class Cluster:
    """kubectl and helm against one API server."""

    def __init__(self, plane: ControlPlane) -> None:
        self._kubeconfig = str(plane.kubeconfig)
        self._kubectl = str(plane.binaries / "kubectl")

    def kubectl(self, *arguments: str, stdin: Any = None, user: str = "") -> Done:
        command = [self._kubectl, "--kubeconfig", self._kubeconfig, *([f"--as={user}"] if user else []), *arguments]
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def helm(self, *arguments: str, user: str = "") -> Done:
        return helm(*arguments, "--kubeconfig", self._kubeconfig, *([f"--kube-as-user={user}"] if user else []))

    def install(self, release: str, namespace: str, *values: str, user: str = "") -> Done:
        command = ("upgrade", "--install", release, str(CHART), "--namespace", namespace)
        create = () if user else ("--create-namespace",)
        return self.helm(*command, *create, *settings(values), user=user)

    def create(self, user: str, name: str = "probe", *arguments: str) -> Done:
        job = copy.deepcopy(JOB)
        job["metadata"]["name"] = name
        return self.kubectl("create", "-n", TEAM, "-f", "-", *arguments, stdin=job, user=user)

    def bind(self, user: str, *roles: str) -> None:
        """Give a user ClusterRoles in the team's namespace."""
        for role in roles:
            name = f"{user}-{role.replace(':', '-')}"
            said(self.kubectl("create", "rolebinding", name, "-n", TEAM, f"--clusterrole={role}", f"--user={user}"))

    def can(self, user: str, verb: str, resource: str, *where: str) -> bool:
        return self.kubectl("auth", "can-i", verb, resource, *where, user=user).returncode == 0


def said(done: Done) -> str:
    """Return what a command that must succeed prints."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(done: Done) -> str:
    """Return why a command that must fail was refused."""
    assert done.returncode != 0, done.stdout
    return done.stderr


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait until the API server's caches have caught up with a role or a policy."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s: {what}"
        time.sleep(POLL_SECONDS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The chart as a cluster's administrator installs it, and the namespace of a team.

    Nobody aggregates roles here, so users are bound to the parts of view, edit and admin. The user writer may
    write PipelineJobs but not pods; author may both.
    """
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        cluster = Cluster(plane)
        said(cluster.install(RELEASE, NAMESPACE))
        said(cluster.kubectl("wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=30s"))
        said(cluster.kubectl("create", "namespace", TEAM))
        for user, roles in (("writer", ()), ("author", ("system:aggregate-to-edit",))):
            cluster.bind(user, f"{RELEASE}-view", f"{RELEASE}-edit", *roles)
        eventually(lambda: cluster.can("author", "create", "pods", "-n", TEAM), "author may create pods")
        eventually(
            lambda: "may not create pods" in cluster.create("writer", "probe", "--dry-run=server").stderr,
            "the policy refuses the writer",
        )
        yield cluster


@pytest.mark.parametrize("values", [EVERYTHING, (*EVERYTHING, *ONE_NAMESPACE)], ids=["cluster-wide", "one-namespace"])
def test_every_object_is_known_to_its_last_field(cluster: Cluster, values: tuple[str, ...]) -> None:
    objects = {"apiVersion": "v1", "kind": "List", "items": render(*values)}
    flags = ("--dry-run=server", "--validate=strict", "--server-side", "--force-conflicts")
    said(cluster.kubectl("apply", *flags, "-f", "-", stdin=objects))


class TestCreatorPolicy:
    """Nobody runs pods by way of the operator who could not run them without."""

    @pytest.fixture
    def job(self, cluster: Cluster) -> Iterator[str]:
        said(cluster.create("author", "theirs"))
        yield "pj/theirs"
        said(cluster.kubectl("delete", "pj", "theirs", "-n", TEAM, "--ignore-not-found"))

    def patch(self, cluster: Cluster, user: str, job: str, patch: Any) -> Done:
        return cluster.kubectl("patch", job, "-n", TEAM, "--type=merge", "-p", json.dumps(patch), user=user)

    def test_who_may_create_pods_may_create_jobs(self, cluster: Cluster) -> None:
        assert "created" in said(cluster.create("author", "probe", "--dry-run=server"))

    def test_who_may_not_create_pods_may_not_create_jobs(self, cluster: Cluster) -> None:
        assert cluster.can("writer", "create", CRD, "-n", TEAM), "it is the policy that refuses, not a missing role"
        assert (
            f"metadata.namespace: writer may not create pods in namespace {TEAM}, which a PipelineJob does; "
            "allowed: users with the right to create pods there"
        ) in refusal(cluster.create("writer"))

    def test_the_right_must_be_one_in_the_jobs_own_namespace(self, cluster: Cluster) -> None:
        elsewhere = ("--clusterrole=system:aggregate-to-edit", "--user=writer", "-n", "default")
        said(cluster.kubectl("create", "rolebinding", "elsewhere", *elsewhere))
        eventually(lambda: cluster.can("writer", "create", "pods", "-n", "default"), "writer may create pods elsewhere")
        assert "writer may not create pods" in refusal(cluster.create("writer"))

    def test_nor_change_what_a_job_mounts(self, cluster: Cluster, job: str) -> None:
        claim = {"spec": {"checkpoint": {"volumeClaimName": "secret-models", "everySteps": 5}}}
        assert "writer may not create pods" in refusal(self.patch(cluster, "writer", job, claim))
        assert "patched" in said(self.patch(cluster, "author", job, claim))

    def test_but_label_a_job(self, cluster: Cluster, job: str) -> None:
        assert "patched" in said(self.patch(cluster, "writer", job, {"metadata": {"labels": {"team": "a"}}}))

    def test_and_scale_it_like_an_autoscaler(self, cluster: Cluster, job: str) -> None:
        assert "scaled" in said(cluster.kubectl("scale", job, "-n", TEAM, "--replicas=2", user="writer"))

    def test_the_garbage_collector_finishes_a_foreground_deletion(self, cluster: Cluster, job: str) -> None:
        deletion = ("delete", job, "-n", TEAM, "--cascade=foreground", "--wait=false")
        said(cluster.kubectl(*deletion, user="author"))
        assert not cluster.can(GARBAGE_COLLECTOR, "create", "pods", "-n", TEAM)
        said(self.patch(cluster, GARBAGE_COLLECTOR, job, {"metadata": {"finalizers": None}}))
        assert "NotFound" in refusal(cluster.kubectl("get", job, "-n", TEAM))


class TestRights:
    """RBAC as the API server evaluates it."""

    @pytest.mark.parametrize(
        ("verb", "resource", "where"),
        [
            ("watch", CRD, ("-A",)),
            ("patch", CRD, ("-A", "--subresource=status")),
            ("create", "pods", ("-A",)),
            ("patch", "networkpolicies.networking.k8s.io", ("-A",)),
            ("watch", "nodes", ()),
            ("list", "deviceclasses.resource.k8s.io", ()),
            ("create", "leases.coordination.k8s.io", ("-n", NAMESPACE)),
            ("update", f"leases.coordination.k8s.io/{RELEASE}", ("-n", NAMESPACE)),
        ],
    )
    def test_the_operator_may(self, cluster: Cluster, verb: str, resource: str, where: tuple[str, ...]) -> None:
        assert cluster.can(ACCOUNT, verb, resource, *where)

    @pytest.mark.parametrize(
        ("verb", "resource", "where"),
        [
            ("get", "secrets", ("-n", NAMESPACE)),
            ("create", "pods", ("-n", TEAM, "--subresource=exec")),
            ("update", CRD, ("-n", TEAM)),
            ("patch", "nodes", ()),
            ("update", "leases.coordination.k8s.io/another", ("-n", NAMESPACE)),
            ("get", f"leases.coordination.k8s.io/{RELEASE}", ("-n", TEAM)),
            ("escalate", "clusterroles.rbac.authorization.k8s.io", ()),
        ],
    )
    def test_the_operator_may_not(self, cluster: Cluster, verb: str, resource: str, where: tuple[str, ...]) -> None:
        assert not cluster.can(ACCOUNT, verb, resource, *where)

    def test_the_admin_of_a_namespace_installs_the_operator_for_it(self, cluster: Cluster) -> None:
        values = (f"watchNamespace={TEAM}", *(f"{name}.enabled=false" for name in CLUSTER_SCOPED))
        parts = ("view", "edit", "admin")
        cluster.bind("lena", *(f"system:aggregate-to-{part}" for part in parts))
        eventually(lambda: cluster.can("lena", "create", "rolebindings", "-n", TEAM), "lena is the admin")
        without = refusal(cluster.install("own", TEAM, *values, user="lena"))
        assert "is attempting to grant RBAC permissions not currently held" in without
        cluster.bind("lena", *(f"{RELEASE}-{part}" for part in parts))
        eventually(lambda: cluster.can("lena", "patch", CRD, "--subresource=status", "-n", TEAM), "lena has all parts")
        said(cluster.install("own", TEAM, *values, user="lena"))
        account = f"system:serviceaccount:{TEAM}:own-pipelinejob"
        eventually(lambda: cluster.can(account, "create", "pods", "-n", TEAM), "the operator may create pods")
        assert not cluster.can(account, "create", "pods", "-n", "default")
        assert not cluster.can(account, "get", "nodes")


@pytest.fixture(scope="module")
def strict(cluster: Cluster) -> str:
    """A namespace that enforces the restricted pod security standard."""
    said(cluster.kubectl("create", "namespace", "strict"))
    said(cluster.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted"))
    return "strict"


class TestRestricted:
    """The namespaces of strict administrators admit the operator."""

    def pod(self) -> dict[str, Any]:
        template = deployment()["spec"]["template"]
        metadata = template["metadata"] | {"name": "operator"}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

    def create(self, cluster: Cluster, namespace: str, pod: dict[str, Any]) -> Done:
        return cluster.kubectl("create", "--dry-run=server", "-n", namespace, "-f", "-", stdin=pod)

    def test_the_operators_pod_is_admitted(self, cluster: Cluster, strict: str) -> None:
        assert "created" in said(self.create(cluster, strict, self.pod()))

    def test_a_pod_without_its_security_context_is_not(self, cluster: Cluster, strict: str) -> None:
        loose = self.pod()
        del loose["spec"]["securityContext"]
        assert 'violates PodSecurity "restricted' in refusal(self.create(cluster, strict, loose))


def test_jobs_outlive_upgrade_and_removal(tmp_path: Path) -> None:
    with ControlPlane(tmp_path) as plane:
        cluster = Cluster(plane)
        said(cluster.install(RELEASE, NAMESPACE))
        said(cluster.kubectl("wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=30s"))
        said(cluster.kubectl("create", "namespace", TEAM))
        said(cluster.create("", "kept"))
        uid = ("get", "pj/kept", "-n", TEAM, "-o", "jsonpath={.metadata.uid}")
        before = said(cluster.kubectl(*uid))
        said(cluster.install(RELEASE, NAMESPACE, "operator.replicas=3"))
        replicas = ("get", f"deployment/{RELEASE}", "-n", NAMESPACE, "-o", "jsonpath={.spec.replicas}")
        assert said(cluster.kubectl(*replicas)) == "3"
        said(cluster.helm("uninstall", RELEASE, "--namespace", NAMESPACE))
        assert "NotFound" in refusal(cluster.kubectl("get", f"deployment/{RELEASE}", "-n", NAMESPACE))
        assert said(cluster.kubectl(*uid)) == before
        said(cluster.install(RELEASE, NAMESPACE))
        assert said(cluster.kubectl(*uid)) == before
