"""The real API server takes what the chart installs, and the chart's policy guards who may write jobs."""

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.integration.api.jobs import GOOD, job
from tests.integration.api.kubectl import Kubectl
from tests.unit.chart.helm import (
    CHART,
    EVERYTHING,
    NAMESPACE,
    ONE_NAMESPACE,
    RELEASE,
    Object,
    deployment,
    render,
    settings,
)

JOBS = "pipelinejobs.pipelinejob.dev"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
POLICY_SECONDS = 30


class Helm:
    """helm against one API server."""

    def __init__(self, plane: ControlPlane) -> None:
        self.command = [str(plane.binaries / "helm"), "--kubeconfig", str(plane.kubeconfig)]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as made:
        yield made


@pytest.fixture(scope="module")
def kubectl(plane: ControlPlane) -> Kubectl:
    return Kubectl(plane)


@pytest.fixture(scope="module", autouse=True)
def release(plane: ControlPlane, kubectl: Kubectl) -> Helm:
    """The chart, installed cluster-wide with all that it has."""
    helm = Helm(plane)
    place = ("--namespace", NAMESPACE, "--create-namespace")
    helm("install", RELEASE, str(CHART), *place, *settings(EVERYTHING))
    kubectl.said("wait", "--for=condition=Established", f"crd/{JOBS}", "--timeout=30s")
    kubectl.said("create", "namespace", "team-a")
    return helm


def grant(kubectl: Kubectl, user: str, *rules: str) -> Kubectl:
    """Give a user rights in namespace default, each written as verbs/resources; return kubectl as that user."""
    for number, rule in enumerate(rules):
        verbs, _, resources = rule.partition("/")
        role = f"{user}-{number}"
        kubectl.said("create", "role", role, "-n", "default", f"--verb={verbs}", f"--resource={resources}")
        kubectl.said("create", "rolebinding", role, "-n", "default", f"--role={role}", f"--user={user}")
    return Kubectl(kubectl.plane, user)


class TestInstallation:
    """What helm sends is what the API server wants."""

    def test_every_object_is_there(self, kubectl: Kubectl) -> None:
        for item in render(*EVERYTHING):
            meta = item["metadata"]
            where = ("-n", meta["namespace"]) if "namespace" in meta else ()
            kubectl.said("get", item["kind"], meta["name"], *where)

    def test_one_namespace_is_taken_with_strict_validation(self, kubectl: Kubectl) -> None:
        manifests = {"apiVersion": "v1", "kind": "List", "items": render(*ONE_NAMESPACE, "crds.enabled=false")}
        flags = ("--dry-run=server", "--validate=strict", "--server-side", "--force-conflicts")
        kubectl.said("apply", *flags, "-f", "-", stdin=manifests)

    def test_the_operators_pod_passes_restricted_pod_security(self, kubectl: Kubectl) -> None:
        kubectl.said("create", "namespace", "strict")
        kubectl.said("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
        template = deployment()["spec"]["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "operator", "namespace": "strict"}}
        kubectl.said("create", "--dry-run=server", "-f", "-", stdin=pod)
        root = {"securityContext": {"runAsUser": 0}}
        rooted = pod | {"spec": pod["spec"] | {"containers": [pod["spec"]["containers"][0] | root]}}
        assert "violates PodSecurity" in kubectl.refusal("create", "--dry-run=server", "-f", "-", stdin=rooted)

    @pytest.mark.parametrize(
        ("wish", "answer"),
        [
            (f"list {JOBS}", "yes"),
            (f"patch {JOBS} --subresource=status", "yes"),
            ("create pods", "yes"),
            ("get nodes", "yes"),
            (f"update leases.coordination.k8s.io/{RELEASE} -n {NAMESPACE}", "yes"),
            (f"create {JOBS}", "no"),
            (f"patch {JOBS}", "no"),
            ("get secrets", "no"),
            ("create pods --subresource=exec", "no"),
            ("create serviceaccounts --subresource=token", "no"),
            ("update nodes", "no"),
            (f"get leases.coordination.k8s.io/other -n {NAMESPACE}", "no"),
            (f"update leases.coordination.k8s.io/{RELEASE}", "no"),
        ],
    )
    def test_the_operator_may_do_its_work_and_no_more(self, kubectl: Kubectl, wish: str, answer: str) -> None:
        done = Kubectl(kubectl.plane, OPERATOR)("auth", "can-i", *wish.split())
        assert done.stdout.strip() == answer, done.stderr


@pytest.fixture(scope="module")
def author(kubectl: Kubectl) -> Kubectl:
    """Somebody who may write jobs and create pods."""
    return grant(kubectl, "alice", "create,get,update,patch,delete/pipelinejobs", "create/pods")


@pytest.fixture(scope="module")
def stranger(kubectl: Kubectl) -> Kubectl:
    """Somebody who may write jobs and create no pods; made when the API server has begun to enforce the policy."""
    made = grant(kubectl, "mallory", "create,get,update,patch/pipelinejobs", "get,update,patch/pipelinejobs/scale")
    deadline = time.monotonic() + POLICY_SECONDS
    while made("create", "--dry-run=server", "-f", "-", stdin=GOOD).returncode == 0:
        assert time.monotonic() < deadline, f"the policy is not enforced after {POLICY_SECONDS} s"
    return made


@pytest.fixture
def made(author: Kubectl) -> Iterator[None]:
    """A job of the author's."""
    author.said("create", "-f", "-", stdin=GOOD)
    yield
    author.said("delete", "pj", "tiny")


class TestCreatorPolicy:
    """The operator makes pods for a job, so whoever writes a job must be allowed to make pods."""

    def test_who_may_create_pods_may_create_jobs(self, author: Kubectl) -> None:
        assert "created" in author.said("create", "--dry-run=server", "-f", "-", stdin=GOOD)

    def test_who_may_not_is_refused_in_one_line(self, stranger: Kubectl) -> None:
        line = stranger.refusal("create", "-f", "-", stdin=job())
        assert line.endswith(
            "denied request: metadata.namespace: mallory may not create pods in namespace default, which a PipelineJob "
            "does; allowed: users with the right to create pods there"
        )

    @pytest.mark.usefixtures("made")
    def test_a_change_of_the_spec_counts_too(self, author: Kubectl, stranger: Kubectl) -> None:
        patch = ("patch", "pj", "tiny", "--type=merge", "-p", json.dumps({"spec": {"suspend": True}}))
        assert "mallory may not create pods" in stranger.refusal(*patch)
        assert "patched" in author.said(*patch)

    @pytest.mark.usefixtures("made")
    def test_what_is_not_the_spec_may_be_changed(self, stranger: Kubectl) -> None:
        label = {"metadata": {"labels": {"seen": "yes"}}}
        assert "patched" in stranger.said("patch", "pj", "tiny", "--type=merge", "-p", json.dumps(label))

    @pytest.mark.usefixtures("made")
    def test_an_autoscaler_may_scale(self, stranger: Kubectl) -> None:
        assert "scaled" in stranger.said("scale", "pj/tiny", "--replicas=2")


def cluster_role(kubectl: Kubectl, *names: str) -> Object:
    """The rules that the cluster's own roles gather, as one role: the controller that does it does not run here."""
    rules: list[Object] = []
    for name in names:
        label = f"rbac.authorization.k8s.io/aggregate-to-{name}=true"
        for role in json.loads(kubectl.said("get", "clusterroles", "-l", label, "-o", "json"))["items"]:
            rules += role["rules"] or []
    meta = {"name": f"gathered-{names[-1]}"}
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": meta, "rules": rules}


def test_the_admin_of_a_namespace_can_install_the_operator_for_it(kubectl: Kubectl, release: Helm) -> None:
    kubectl.said("create", "-f", "-", stdin=cluster_role(kubectl, "view", "edit", "admin"))
    kubectl.said("create", "rolebinding", "carol", "-n", "team-a", "--clusterrole=gathered-admin", "--user=carol")
    of_the_cluster = ("crds.enabled=false", "userRoles.enabled=false", "creatorPolicy.enabled=false")
    values = settings((*ONE_NAMESPACE, *of_the_cluster))
    release("install", "own", str(CHART), "--namespace", "team-a", "--kube-as-user", "carol", *values)
    assert kubectl.said("get", "deployments", "-n", "team-a", "-o", "name") == "deployment.apps/own-pipelinejob\n"


def test_a_removed_release_leaves_the_crd_and_the_jobs(kubectl: Kubectl, release: Helm) -> None:
    kubectl.said("create", "-f", "-", stdin=job(metadata__name="left"))
    release("upgrade", RELEASE, str(CHART), "--namespace", NAMESPACE)
    release("uninstall", RELEASE, "--namespace", NAMESPACE)
    assert kubectl.said("get", "deployments", "-n", NAMESPACE, "-o", "name") == ""
    assert kubectl.said("get", "pj", "-o", "name") == "pipelinejob.pipelinejob.dev/left\n"
    release("install", RELEASE, str(CHART), "--namespace", NAMESPACE)
