"""What an installation of the chart consists of."""

import tomllib
from typing import Any

import pytest
import yaml

from pipelinejob_operator.api.chart_values import Values
from pipelinejob_operator.build.installation import OPERATOR_POD_LABELS
from pipelinejob_operator.build.names import MANAGED_BY, MANAGED_BY_LABEL
from pipelinejob_operator.runtime.settings import Settings
from pipelinejob_worker.protocol import STATUS_PORT
from tests.unit.chart.helm import (
    CHART,
    EVERYTHING,
    NAMESPACE,
    ONE_NAMESPACE,
    RELEASE,
    ROOT,
    Object,
    deployment,
    helm,
    of_kind,
    refusal,
    render,
    settings,
)

MODES = [pytest.param((), id="cluster-wide"), pytest.param(ONE_NAMESPACE, id="one-namespace")]


def environment(*values: str) -> dict[str, Any]:
    """The operator's environment; what the kubelet fills in is shown as its field's path."""
    (container,) = deployment(*values)["spec"]["template"]["spec"]["containers"]
    return {
        item["name"]: item.get("value", item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath"))
        for item in container["env"]
    }


@pytest.mark.parametrize("values", [*MODES, pytest.param(EVERYTHING, id="everything")])
def test_helm_finds_no_fault(values: tuple[str, ...]) -> None:
    done = helm("lint", str(CHART), "--strict", *settings(values))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["version"]


def test_the_defaults_are_those_of_the_models() -> None:
    assert yaml.safe_load((CHART / "values.yaml").read_text()) == Values().model_dump(by_alias=True)


class TestValues:
    """A value that is wrong or unknown is refused, and the line names it."""

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("operator.replica=3", "at '/operator': additional properties 'replica' not allowed"),
            ("operator.replicas=0", "at '/operator/replicas': minimum: got 0, want 1"),
            ("operator.logLevel=LOUD", "at '/operator/logLevel': value must be one of 'DEBUG', 'INFO'"),
            ("worker.image.pullPolicy=Sometimes", "at '/worker/image/pullPolicy': value must be one of 'Always'"),
            ("worker.image.repository=", "at '/worker/image/repository': minLength: got 0, want 1"),
            ("watchNamespace=Team_A", "at '/watchNamespace': 'Team_A' does not match pattern"),
            ("topologyLevels=zone", "at '/topologyLevels': got string, want array"),
            ("crds.enabled=perhaps", "at '/crds/enabled': got string, want boolean"),
        ],
    )
    def test_refused(self, value: str, said: str) -> None:
        assert said in refusal(value)

    def test_a_parent_chart_may_set_global_values(self) -> None:
        render("global.anything=1")


class TestOperator:
    """The operator's pods."""

    def test_pods_meet_the_restricted_standard(self) -> None:
        pod = deployment()["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "volumes"} & set(pod)
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }

    def test_replicas_are_spread_and_not_drained_together(self) -> None:
        objects = render()
        (budget,) = of_kind(objects, "PodDisruptionBudget")
        (deployed,) = of_kind(objects, "Deployment")
        assert deployed["spec"]["replicas"] == 2
        assert budget["spec"]["maxUnavailable"] == 1
        selector = deployed["spec"]["selector"]
        (spread,) = deployed["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert spread["topologyKey"] == "kubernetes.io/hostname"
        assert budget["spec"]["selector"] == selector == spread["labelSelector"]

    def test_pods_have_the_labels_that_a_jobs_network_policy_admits(self) -> None:
        labels = deployment()["spec"]["template"]["metadata"]["labels"]
        assert labels.items() >= OPERATOR_POD_LABELS.items()

    def test_only_the_operators_pods_get_its_token(self) -> None:
        (account,) = of_kind(render(), "ServiceAccount")
        pod = deployment()["spec"]["template"]["spec"]
        assert account["automountServiceAccountToken"] is False
        assert pod["automountServiceAccountToken"] is True
        assert pod["serviceAccountName"] == account["metadata"]["name"]

    def test_every_variable_is_one_that_the_operator_reads(self) -> None:
        assert set(environment()) <= {field.alias for field in Settings.model_fields.values()}

    def test_values_arrive_in_the_operators_settings(self) -> None:
        read = Settings.read(
            environment(
                "worker.image.repository=registry.example.com/worker",
                "worker.image.tag=edge",
                "worker.image.pullPolicy=Always",
                "watchNamespace=team-a",
                "topologyLevels={rack,kubernetes.io/hostname}",
                "operator.logLevel=DEBUG",
            )
        )
        assert read.worker_image == "registry.example.com/worker:edge"
        assert read.worker_image_pull_policy == "Always"
        assert read.watch_namespace == "team-a"
        assert read.topology_levels == ("rack", "kubernetes.io/hostname")
        assert read.log_level == "DEBUG"
        assert (read.pod_name, read.pod_namespace) == ("metadata.name", "metadata.namespace")

    def test_probes_and_port_are_where_the_operator_serves(self) -> None:
        (container,) = deployment()["spec"]["template"]["spec"]["containers"]
        assert container["ports"] == [{"name": "http", "containerPort": Settings.read(environment()).http_port}]
        paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
        assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}

    def test_the_image_has_the_charts_version_unless_a_tag_is_set(self) -> None:
        def image(*values: str) -> str:
            return str(deployment(*values)["spec"]["template"]["spec"]["containers"][0]["image"])

        version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
        assert image() == f"pipelinejob/operator:{version}"
        assert image("operator.image.tag=dev") == "pipelinejob/operator:dev"

    def test_where_and_how_it_runs_can_be_chosen(self) -> None:
        pod = deployment(
            "operator.nodeSelector.pool=system",
            "operator.tolerations[0].operator=Exists",
            "operator.imagePullSecrets[0].name=registry",
            "operator.resources.limits.memory=1Gi",
        )["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == {"pool": "system"}
        assert pod["tolerations"] == [{"operator": "Exists"}]
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["containers"][0]["resources"]["limits"] == {"memory": "1Gi"}


class TestNetworkPolicy:
    """Only where it is asked for: the ports of an API server differ from cluster to cluster."""

    def test_it_is_off_unless_asked_for(self) -> None:
        assert of_kind(render(), "NetworkPolicy") == []

    def test_it_lets_the_operator_do_its_work(self) -> None:
        (policy,) = of_kind(render(*EVERYTHING), "NetworkPolicy")
        (ingress,) = policy["spec"]["ingress"]
        assert ingress == {"ports": [{"protocol": "TCP", "port": Settings.read(environment()).http_port}]}
        cluster, stages = policy["spec"]["egress"]
        assert {item["port"] for item in cluster["ports"]} == {53, 443, 6443}
        assert stages["ports"] == [{"protocol": "TCP", "port": STATUS_PORT}]
        (peer,) = stages["to"]
        assert peer["podSelector"]["matchLabels"] == {MANAGED_BY_LABEL: MANAGED_BY}
        assert peer["namespaceSelector"] == {}

    def test_it_ends_at_the_watched_namespace(self) -> None:
        (policy,) = of_kind(render(*EVERYTHING, *ONE_NAMESPACE), "NetworkPolicy")
        (peer,) = policy["spec"]["egress"][1]["to"]
        assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "team-a"}}


class TestCrd:
    """The CRD is a template, because Helm never upgrades what is in a chart's crds folder."""

    def definition(self, *values: str) -> Object | None:
        return next(iter(of_kind(render(*values), "CustomResourceDefinition")), None)

    def test_it_is_the_one_in_crds(self) -> None:
        made = self.definition()
        assert made is not None
        assert made["metadata"].pop("annotations")
        assert made == yaml.safe_load((ROOT / "crds/pipelinejob.dev_pipelinejobs.yaml").read_text())

    def test_it_outlives_the_release_unless_told_otherwise(self) -> None:
        kept, left = self.definition(), self.definition("crds.keep=false")
        assert kept is not None
        assert left is not None
        assert kept["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert "helm.sh/resource-policy" not in left["metadata"]["annotations"]

    def test_it_can_be_left_out(self) -> None:
        assert self.definition("crds.enabled=false") is None


@pytest.mark.parametrize("values", MODES)
def test_the_notes_hold_the_first_commands(values: tuple[str, ...]) -> None:
    done = helm("install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client", *settings(values))
    assert done.returncode == 0, done.stderr
    _, _, notes = done.stdout.partition("NOTES:")
    where = "-n team-a " if values else ""
    commands = [line.strip() for line in notes.splitlines() if line.startswith("  ")]
    assert commands == [
        f"kubectl apply {where}-f examples/tiny-gpt.yaml",
        f"kubectl get pj {where}--watch",
        f"kubectl describe pj {where}tiny-gpt",
    ]
