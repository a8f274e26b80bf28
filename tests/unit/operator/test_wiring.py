"""What ``spec.network`` makes of a stage pod."""

import json
from typing import Any

import pytest

from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.placement.pods import requests
from pipelinejob_operator.policy import acceptance
from tests.unit.operator.builders import INSTALLATION, job, place


def built(template: dict[str, Any] | None = None, **network: Any) -> dict[str, Any]:
    some = job(network=network, **({"template": template} if template else {}))
    return stage_pod(some, place(1), INSTALLATION, share_host=False)


def environment(pod: dict[str, Any]) -> dict[str, str]:
    """Names and values, where of two with one name the last wins, as in a container."""
    return {item["name"]: item.get("value", "") for item in pod["spec"]["containers"][0]["env"]}


def resources(pod: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pod["spec"]["containers"][0].get("resources", {})
    return found


def worker(**container: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "worker", **container}]}}


@pytest.mark.parametrize(
    ("network", "variables"),
    [
        ({}, {"NCCL_DEBUG": "WARN"}),
        ({"interface": "eth1"}, {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "WARN"}),
        ({"infinibandDevices": ["mlx5_0"]}, {"NCCL_IB_HCA": "=mlx5_0"}),
        ({"infinibandDevices": ["mlx5_0:1", "mlx5_1:1"]}, {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1"}),
        ({"nccl": [{"name": "NCCL_DEBUG", "value": "INFO"}]}, {"NCCL_DEBUG": "INFO"}),
        (
            {"interface": "eth1", "nccl": [{"name": "NCCL_SOCKET_IFNAME", "value": "ib0"}]},
            {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth1"},
        ),
        (
            {"infinibandDevices": ["mlx5_0"], "nccl": [{"name": "NCCL_IB_HCA", "value": "^mlx5_9"}]},
            {"NCCL_IB_HCA": "^mlx5_9"},
        ),
    ],
)
def test_nccl_and_gloo_are_told_and_the_users_variables_win(network: dict[str, Any], variables: dict[str, str]) -> None:
    found = environment(built(**network))
    assert {name: found[name] for name in variables} == variables


def test_nothing_is_said_of_a_network_that_the_job_does_not_describe() -> None:
    pod = built()
    assert not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA"} & set(environment(pod))
    assert not {"hostNetwork", "dnsPolicy", "resourceClaims"} & set(pod["spec"])
    assert "k8s.v1.cni.cncf.io/networks" not in pod["metadata"]["annotations"]


def test_a_default_of_nccl_is_the_templates_to_replace() -> None:
    given = worker(env=[{"name": "NCCL_DEBUG", "value": "TRACE"}])
    assert environment(built(given))["NCCL_DEBUG"] == "TRACE"


def test_the_rdma_devices_come_beside_the_gpus_and_the_templates_resources() -> None:
    given = worker(resources={"requests": {"cpu": "2"}})
    assert resources(built(given, rdmaResourceName="rdma/hca", rdmaResourceCount=4)) == {
        "requests": {"cpu": "2", "nvidia.com/gpu": "1", "rdma/hca": "4"},
        "limits": {"nvidia.com/gpu": "1", "rdma/hca": "4"},
    }


def test_every_further_network_is_asked_of_multus_in_order() -> None:
    pod = built(additionalNetworks=[{"name": "rail-0", "namespace": "fabric", "interface": "net1"}, {"name": "rail-1"}])
    assert json.loads(pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"]) == [
        {"name": "rail-0", "namespace": "fabric", "interface": "net1"},
        {"name": "rail-1"},
    ]


def test_networks_are_asked_for_in_one_place() -> None:
    given = {"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "rail-9"}}}
    some = job(template=given, network={"additionalNetworks": [{"name": "rail-0"}]})
    verdict = acceptance.check(acceptance.Case(some.spec, some.template, None, 0))
    assert verdict is not None
    assert verdict.message == (
        "spec.template.metadata.annotations: k8s.v1.cni.cncf.io/networks is set by spec.network.additionalNetworks; "
        "name all networks there, or all in the annotation"
    )
    alone = job(template=given)
    assert acceptance.check(acceptance.Case(alone.spec, alone.template, None, 0)) is None
    assert built(given)["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "rail-9"


def test_a_claim_of_each_pod_and_a_shared_one_reach_the_worker() -> None:
    given = worker(resources={"claims": [{"name": "gpu"}]})
    given["spec"]["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    claims = [
        {"name": "domain", "resourceClaimTemplateName": "tiny-domain"},
        {"name": "card", "resourceClaimName": "shared-card"},
    ]
    pod = built(given, resourceClaims=claims)
    assert pod["spec"]["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}, *claims]
    assert resources(pod)["claims"] == [{"name": "gpu"}, {"name": "domain"}, {"name": "card"}]


class TestHostNetwork:
    def test_names_of_pods_still_resolve(self) -> None:
        spec = built(hostNetwork=True)["spec"]
        assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")

    def test_the_templates_own_dns_policy_wins(self) -> None:
        spec = built({"spec": {"dnsPolicy": "None"}}, hostNetwork=True)["spec"]
        assert spec["dnsPolicy"] == "None"

    def test_two_stages_do_not_fit_on_one_node(self) -> None:
        assert requests(built(hostNetwork=True))["hostPort/TCP/8471"] == 1
        assert "hostPort/TCP/8471" not in requests(built())
