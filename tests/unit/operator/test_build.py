"""What the operator makes: pods that satisfy the restricted standard, with the user's own parts kept."""

from typing import Any

import pytest

from pipelinejob_operator.api.status import MAX_PODS
from pipelinejob_operator.api.v1alpha1 import MAX_NAME, MAX_PIPELINES
from pipelinejob_operator.build.names import pod_name
from pipelinejob_operator.build.network import network_objects, network_policy, service
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.placement.affinity import near_neighbours
from pipelinejob_worker.protocol import Env, WorkerConfig
from tests.unit.operator.builders import INSTALLATION, job, place

LEVELS = ("topology.kubernetes.io/zone", "kubernetes.io/hostname")


def built(rank: int = 1, share_host: bool = False, **spec: Any) -> dict[str, Any]:
    some = job(**spec)
    return stage_pod(some, some.shape.places()[rank], INSTALLATION, share_host=share_host)


def worker(pod: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pod["spec"]["containers"][0]
    assert found["name"] == "worker"
    return found


def environment(pod: dict[str, Any]) -> dict[str, str]:
    """Names and values, where of two with one name the last wins, as in a container."""
    return {item["name"]: item.get("value", "") for item in worker(pod)["env"]}


def template(**container: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "worker", **container}]}}


def hugging_face(path: str) -> dict[str, Any]:
    return {"huggingFace": {"path": path, "context": 32}}


class TestStagePod:
    def test_it_satisfies_the_restricted_pod_security_standard(self) -> None:
        pod = built()
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = worker(pod)["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["readOnlyRootFilesystem"] is True

    def test_it_holds_no_token_of_the_api_server(self) -> None:
        assert built()["spec"]["automountServiceAccountToken"] is False

    def test_it_belongs_to_the_job_and_goes_with_it(self) -> None:
        (owner,) = built()["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("PipelineJob", "job-uid", True)

    def test_its_environment_is_the_classic_one(self) -> None:
        found = environment(built(rank=2))
        assert set(Env) - {Env.SPARE} <= set(found)  # a spare is no stage yet
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("2", "3", "0")
        assert found["MASTER_ADDR"] == "tiny-s0-a0.tiny.team.svc"
        assert found["OMP_NUM_THREADS"] == "1"

    def test_a_stage_of_the_second_pipeline_knows_its_place_and_meets_the_others_at_the_first(self) -> None:
        pod = built(rank=5, pipelines=2)
        assert pod["metadata"]["name"] == pod["spec"]["hostname"] == "tiny-p1-s2-a0"
        assert pod["metadata"]["labels"]["pipelinejob.dev/pipeline"] == "1"
        found = environment(pod)
        assert (found["RANK"], found["WORLD_SIZE"]) == ("5", "6")
        assert (found["PIPELINE_STAGE"], found["PIPELINE_STAGES"]) == ("2", "3")
        assert (found["PIPELINE_INDEX"], found["PIPELINE_COUNT"]) == ("1", "2")
        assert found["MASTER_ADDR"] == "tiny-p0-s0-a0.tiny.team.svc"

    def test_the_longest_name_of_a_pod_is_a_dns_label(self) -> None:
        widest = Shape(MAX_PODS // MAX_PIPELINES, MAX_PIPELINES)
        longest = pod_name("j" * MAX_NAME, widest.places()[-1], 10**9)
        assert longest.endswith("-p63-s7-a1000000000")
        assert max(map(len, (longest, pod_name("j" * MAX_NAME, Shape(256, 2).places()[-1], 10**9)))) <= 63

    def test_every_stage_is_told_what_to_train(self) -> None:
        config = WorkerConfig.model_validate_json(built()["metadata"]["annotations"]["pipelinejob.dev/config"])
        assert (config.job, config.job_uid, config.train.steps) == ("tiny", "job-uid", 200)

    def test_the_membership_is_empty_at_first_and_shown_as_a_file(self) -> None:
        pod = built()
        assert pod["metadata"]["annotations"]["pipelinejob.dev/membership"] == ""
        (info,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "pipelinejob-info"]
        assert [item["path"] for item in info["downwardAPI"]["items"]] == ["membership", "config"]

    @pytest.mark.parametrize(("count", "wanted"), [(1, {"nvidia.com/gpu": "1"}), (0, None)])
    def test_it_asks_for_gpus_or_for_none(self, count: int, wanted: dict[str, str] | None) -> None:
        resources = worker(built(gpu={"count": count})).get("resources", {})
        assert (resources.get("requests"), resources.get("limits")) == (wanted, wanted)

    def test_the_checkpoint_claim_is_mounted_where_one_is_named(self) -> None:
        pod = built(checkpoint={"volumeClaimName": "saves"})
        assert {"name": "pipelinejob-checkpoint", "mountPath": "/checkpoint"} in worker(pod)["volumeMounts"]
        assert "pipelinejob-checkpoint" not in str(built())

    def test_a_model_from_a_directory_never_asks_the_hub_and_caches_in_scratch_space(self) -> None:
        found = environment(built(model=hugging_face("/models/llama")))
        assert found["HF_HOME"].startswith("/tmp/")
        assert (found["HF_HUB_OFFLINE"], found["HF_HUB_DISABLE_TELEMETRY"]) == ("1", "1")

    def test_a_model_from_the_hub_is_downloaded_into_scratch_space(self) -> None:
        found = environment(built(model=hugging_face("Qwen/Qwen3-0.6B")))
        assert found["HF_HOME"].startswith("/tmp/")
        assert "HF_HUB_OFFLINE" not in found

    def test_the_users_own_cache_of_the_hub_wins(self) -> None:
        given = template(env=[{"name": "HF_HOME", "value": "/cache"}])
        assert environment(built(model=hugging_face("Qwen/Qwen3-0.6B"), template=given))["HF_HOME"] == "/cache"

    def test_a_dead_node_is_left_after_30_seconds(self) -> None:
        assert [item["tolerationSeconds"] for item in built()["spec"]["tolerations"]] == [30, 30]


class TestTemplate:
    def test_all_that_is_the_users_is_kept(self) -> None:
        pod = built(
            template={
                "metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
                "spec": {
                    "nodeSelector": {"gpu": "h100"},
                    "priorityClassName": "high",
                    "volumes": [{"name": "data", "emptyDir": {}}],
                    "containers": [
                        {"name": "sidecar", "image": "s"},
                        {
                            "name": "worker",
                            "image": "mine",
                            "env": [{"name": "A", "value": "1"}],
                            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                            "resources": {"requests": {"cpu": "2"}},
                        },
                    ],
                },
            }
        )
        spec = pod["spec"]
        assert pod["metadata"]["labels"]["team"] == "a"
        assert pod["metadata"]["annotations"]["note"] == "b"
        assert (spec["nodeSelector"], spec["priorityClassName"]) == ({"gpu": "h100"}, "high")
        assert [container["name"] for container in spec["containers"]] == ["worker", "sidecar"]
        assert worker(pod)["image"] == "mine"
        assert environment(pod)["A"] == "1"
        assert worker(pod)["resources"]["requests"] == {"cpu": "2", "nvidia.com/gpu": "1"}
        assert {"name": "data", "mountPath": "/data"} in worker(pod)["volumeMounts"]
        assert {"name": "data", "emptyDir": {}} in spec["volumes"]

    def test_building_does_not_change_the_template(self) -> None:
        given = template(resources={"limits": {"cpu": "1"}}, env=[{"name": "A", "value": "1"}])
        some = job(template=given)
        first = stage_pod(some, place(0), INSTALLATION, share_host=False)
        assert stage_pod(some, place(0), INSTALLATION, share_host=False) == first

    def test_a_users_label_cannot_pretend_to_be_another_job(self) -> None:
        pod = built(template={"metadata": {"labels": {"pipelinejob.dev/job-uid": "other"}}})
        assert pod["metadata"]["labels"]["pipelinejob.dev/job-uid"] == "job-uid"

    def test_without_a_command_the_agent_runs_and_tells_when_it_is_ready(self) -> None:
        found = worker(built(template=template(args=["x"])))
        assert found["command"] == ["python3", "-m", "pipelinejob_worker.agent"]
        assert found["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8471}

    def test_a_command_of_the_users_own_is_left_alone(self) -> None:
        found = worker(built(template=template(command=["torchrun"], args=["train.py"])))
        assert (found["command"], found["args"]) == (["torchrun"], ["train.py"])
        assert "readinessProbe" not in found

    def test_a_users_own_scratch_volume_replaces_ours(self) -> None:
        given = template(volumeMounts=[{"name": "big", "mountPath": "/tmp"}])
        pod = built(template=given)
        assert "pipelinejob-scratch" not in str(pod["spec"])

    def test_a_privileged_worker_is_the_users_to_ask_for(self) -> None:
        security = worker(built(template=template(securityContext={"privileged": True})))["securityContext"]
        assert "allowPrivilegeEscalation" not in security

    def test_added_capabilities_keep_the_rest_dropped(self) -> None:
        given = template(securityContext={"capabilities": {"add": ["IPC_LOCK"]}})
        security = worker(built(template=given))["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}

    @pytest.mark.parametrize(
        "given",
        [
            [{"operator": "Exists"}],
            [
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists"},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists"},
            ],
        ],
    )
    def test_tolerations_of_the_users_own_are_not_shortened(self, given: list[dict[str, str]]) -> None:
        assert built(template={"spec": {"tolerations": given}})["spec"]["tolerations"] == given


class TestAffinity:
    def test_neighbours_draw_each_other_most_at_the_narrowest_level(self) -> None:
        terms = near_neighbours(built(rank=1)["metadata"]["labels"], 3, LEVELS)
        assert [(term["weight"], term["podAffinityTerm"]["topologyKey"]) for term in terms] == [
            (50, "topology.kubernetes.io/zone"),
            (100, "kubernetes.io/hostname"),
        ]
        (expression,) = terms[0]["podAffinityTerm"]["labelSelector"]["matchExpressions"]
        assert expression["values"] == ["0", "2"]

    @pytest.mark.parametrize(("stage", "neighbours"), [(0, ["1"]), (2, ["1"])])
    def test_the_ends_of_the_chain_have_one_neighbour(self, stage: int, neighbours: list[str]) -> None:
        terms = near_neighbours(built(rank=stage)["metadata"]["labels"], 3, LEVELS)
        assert terms[0]["podAffinityTerm"]["labelSelector"]["matchExpressions"][0]["values"] == neighbours

    def test_neighbours_are_those_of_the_own_pipeline(self) -> None:
        terms = near_neighbours(built(rank=4, pipelines=2)["metadata"]["labels"], 3, LEVELS)
        assert terms[0]["podAffinityTerm"]["labelSelector"]["matchLabels"] == {
            "pipelinejob.dev/job-uid": "job-uid",
            "pipelinejob.dev/attempt": "0",
            "pipelinejob.dev/pipeline": "1",
        }

    def test_a_job_of_one_stage_has_no_neighbours(self) -> None:
        assert "affinity" not in built(rank=0, stages=1)["spec"]

    def test_the_users_own_affinity_stays(self) -> None:
        node = {"nodeAffinity": {"x": "y"}, "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{}]}}
        affinity = built(template={"spec": {"affinity": node}})["spec"]["affinity"]
        assert affinity["nodeAffinity"] == {"x": "y"}
        assert len(affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]) == 3

    def test_a_claim_for_one_node_keeps_all_stages_of_the_attempt_on_one(self) -> None:
        rules = built(share_host=True)["spec"]["affinity"]["podAffinity"]
        (term,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"]["pipelinejob.dev/attempt"] == "0"


class TestNetwork:
    def test_names_resolve_before_the_pods_are_ready(self) -> None:
        spec = service(job())["spec"]
        assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
        assert spec["selector"] == {"pipelinejob.dev/job-uid": "job-uid"}

    def test_the_policy_lets_in_the_jobs_own_pods_and_the_operator_to_the_status_port(self) -> None:
        spec = network_policy(job(), INSTALLATION)["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        own, operator = spec["ingress"]
        assert own == {"from": [{"podSelector": {"matchLabels": {"pipelinejob.dev/job-uid": "job-uid"}}}]}
        assert operator["ports"] == [{"protocol": "TCP", "port": 8471}]
        (peer,) = operator["from"]
        assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "operators"}}

    def test_it_lets_out_to_the_jobs_own_pods_and_to_dns(self) -> None:
        own, dns = network_policy(job(), INSTALLATION)["spec"]["egress"]
        assert own == {"to": [{"podSelector": {"matchLabels": {"pipelinejob.dev/job-uid": "job-uid"}}}]}
        assert dns == {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}

    @pytest.mark.parametrize(
        ("path", "open_ports"), [("Qwen/Qwen3-0.6B", [443]), ("gpt2", [443]), ("/models/llama", [])]
    )
    def test_it_lets_out_to_https_where_the_model_comes_from_a_hub(self, path: str, open_ports: list[int]) -> None:
        _, _, *more = network_policy(job(model=hugging_face(path)), INSTALLATION)["spec"]["egress"]
        assert more == [{"ports": [{"protocol": "TCP", "port": port}]} for port in open_ports]

    def test_no_policy_is_made_where_it_is_disabled(self) -> None:
        made = network_objects(job(network={"networkPolicy": "Disabled"}), INSTALLATION)
        assert [item["kind"] for item in made] == ["Service"]
