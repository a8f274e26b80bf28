"""Jobs that serve: their fronts, whose checkpoint they take, and what they tell."""

from dataclasses import replace
from typing import Any

import pytest

from pipelinejob_operator.api.status import Condition, ProgressStatus, Status
from pipelinejob_operator.build.fronts import front_objects
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.membership import membership
from pipelinejob_operator.build.network import network_objects
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.build.source import SourceJob
from pipelinejob_operator.controller.observed import Fronts
from pipelinejob_operator.controller.plan import Plan
from pipelinejob_operator.policy import source
from pipelinejob_operator.policy.reasons import Reason, Verdict
from pipelinejob_worker.front.engines import addresses
from pipelinejob_worker.front.settings import from_environment
from pipelinejob_worker.protocol import ENGINE_PORT, AgentStatus, Progress, Serving, WorkerConfig
from tests.unit.operator.builders import (
    INSTALLATION,
    decide,
    ended,
    job,
    kinds,
    manifest,
    message,
    place,
    pod,
    settled,
    told,
)

LLAMA = {"huggingFace": {"path": "/models/llama", "context": 512}}
TWO = Shape(2)
MOUNTED = {
    "spec": {
        "containers": [{"name": "worker", "image": "mine:1", "volumeMounts": [{"name": "m", "mountPath": "/models"}]}],
        "volumes": [{"name": "m", "persistentVolumeClaim": {"claimName": "models"}}, {"name": "other", "emptyDir": {}}],
        "imagePullSecrets": [{"name": "registry"}],
    }
}


def served(status: Status | None = None, **spec: Any) -> Job:
    """A job of two stages that serves a model from a directory."""
    return job(status, **{"mode": "Serve", "stages": 2, "train": None, "model": LLAMA, "serve": {}} | spec)


def objects(some: Job) -> dict[str, dict[str, Any]]:
    """What a Serve job has beside its stages, by kind and name."""
    return {f"{o['kind']}/{o['metadata']['name']}": o for o in front_objects(some, INSTALLATION)}


def front(some: Job) -> dict[str, Any]:
    """The pod of a front."""
    made: dict[str, Any] = objects(some)["Deployment/tiny-front"]["spec"]["template"]["spec"]
    return made


def variables(some: Job) -> dict[str, str]:
    return {item["name"]: item["value"] for item in front(some)["containers"][0]["env"]}


class TestFronts:
    def test_a_job_that_trains_has_none(self) -> None:
        assert front_objects(job(), INSTALLATION) == []
        assert [item["kind"] for item in network_objects(job(), INSTALLATION)] == ["Service", "NetworkPolicy"]

    def test_they_are_made_with_the_network_of_the_stages(self) -> None:
        names = [f"{item['kind']}/{item['metadata']['name']}" for item in network_objects(served(), INSTALLATION)]
        assert names == [
            "Service/tiny",
            "NetworkPolicy/tiny",
            "Service/tiny-engine-0",
            "ConfigMap/tiny-front",
            "Service/tiny-front",
            "NetworkPolicy/tiny-front",
            "PodDisruptionBudget/tiny-front",
            "Deployment/tiny-front",
        ]

    def test_they_find_stage_0_of_each_pipeline_by_a_service_of_its_own(self) -> None:
        made = objects(served(pipelines=2))
        lines = addresses(made["ConfigMap/tiny-front"]["data"]["engines"])
        assert lines == {k: (f"tiny-engine-{k}.team.svc", ENGINE_PORT) for k in range(2)}
        for pipeline in range(2):
            spec = made[f"Service/tiny-engine-{pipeline}"]["spec"]
            labels = stage_pod(served(pipelines=2), place(0, pipeline, Shape(2, 2)), INSTALLATION, share_host=False)[
                "metadata"
            ]["labels"]
            assert spec["selector"].items() <= labels.items()
            assert spec["publishNotReadyAddresses"], "a stage is asked before it is ready, too"

    def test_each_pipeline_is_a_group_of_its_own(self) -> None:
        shape = Shape(2, 2)
        gang = {p.place.rank: p for p in (pod(s, pipeline=k, shape=shape) for k in range(2) for s in range(2))}
        members = [membership(gang, gang[rank].place, 0, replicas=True) for rank in range(4)]
        assert [member.master_address for member in members] == ["10.0.0.0", "10.0.0.0", "10.0.0.2", "10.0.0.2"]

    def test_clients_reach_them_at_the_port_of_the_spec(self) -> None:
        spec = objects(served(serve={"port": 80}))["Service/tiny-front"]["spec"]
        assert spec["ports"] == [{"name": "http", "port": 80, "targetPort": 8000, "protocol": "TCP"}]
        labels = objects(served())["Deployment/tiny-front"]["spec"]["template"]["metadata"]["labels"]
        assert spec["selector"].items() <= labels.items()

    def test_jobs_that_share_a_service_are_all_behind_it_and_it_goes_with_the_last(self) -> None:
        made = objects(served(serve={"sharedService": "chat", "port": 80}))
        service, labels = made["Service/chat"], made["Deployment/tiny-front"]["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert service["spec"]["ports"] == [{"name": "http-80", "port": 80, "targetPort": 8000, "protocol": "TCP"}]
        (owner,) = service["metadata"]["ownerReferences"]
        assert (owner["name"], owner["controller"]) == ("tiny", False)
        assert made["Service/tiny-front"]["spec"]["selector"] == {"pipelinejob.dev/front": "job-uid"}

    def test_clients_call_the_model_as_the_spec_says_or_by_the_name_of_the_job(self) -> None:
        assert variables(served())["PIPELINEJOB_FRONT_MODEL"] == "tiny"
        assert variables(served(serve={"modelName": "chat"}))["PIPELINEJOB_FRONT_MODEL"] == "chat"

    def test_there_are_as_many_as_the_spec_says(self) -> None:
        assert objects(served(serve={"fronts": 3}))["Deployment/tiny-front"]["spec"]["replicas"] == 3

    def test_they_leave_a_node_that_does_not_answer_as_soon_as_stages_do(self) -> None:
        stage = stage_pod(served(), place(0, shape=TWO), INSTALLATION, share_host=False)
        assert front(served())["tolerations"] == stage["spec"]["tolerations"] != []

    def test_the_settings_are_those_that_the_front_reads(self) -> None:
        limits = {
            "bodyBytes": 65536,
            "promptTokens": 512,
            "outputTokens": 64,
            "requests": 32,
            "requestSeconds": 60,
            "recoverySeconds": 30,
        }
        settings, kept = from_environment(variables(served(serve={"limits": limits})))
        assert (settings.model, settings.port) == ("tiny", 8000)
        assert (settings.tokenizer, str(settings.tokenizer_directory)) == ("HuggingFace", "/models/llama")
        told = {name: getattr(kept, name) for name in kept.model_fields_set}
        assert told == {
            "body_bytes": 65536,
            "prompt_tokens": 512,
            "output_tokens": 64,
            "requests": 32,
            "request_seconds": 60,
            "recovery_seconds": 30,
            "drain_seconds": 60,
        }

    def test_streams_may_end_before_a_pod_is_killed(self) -> None:
        some = served(serve={"limits": {"requestSeconds": 90}})
        sleep = front(some)["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert front(some)["terminationGracePeriodSeconds"] > sleep + 90

    def test_a_longest_request_of_a_day_is_no_wrong_setting(self) -> None:
        _, limits = from_environment(variables(served(serve={"limits": {"requestSeconds": 86400}})))
        assert (limits.request_seconds, limits.drain_seconds) == (86400, 3600)

    def test_the_token_is_a_file_from_the_secret(self) -> None:
        some = served(serve={"bearerTokenSecretName": "secret"})
        (volume,) = [item for item in front(some)["volumes"] if "secret" in item]
        assert volume["secret"] == {"secretName": "secret", "items": [{"key": "token", "path": "token"}]}
        (mount,) = [m for m in front(some)["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
        assert variables(some)["PIPELINEJOB_FRONT_BEARER_TOKEN_FILE"] == f"{mount['mountPath']}/token"
        assert "PIPELINEJOB_FRONT_BEARER_TOKEN_FILE" not in variables(served())

    def test_they_run_the_workers_image_and_see_its_volumes_read_only(self) -> None:
        made = front(served(template=MOUNTED))
        (container,) = made["containers"]
        assert container["image"] == "mine:1"
        assert {"name": "m", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
        assert {"name": "m", "persistentVolumeClaim": {"claimName": "models"}} in made["volumes"]
        assert made["imagePullSecrets"] == [{"name": "registry"}]
        assert "other" not in [volume["name"] for volume in made["volumes"]], "the worker does not mount it"

    def test_they_meet_the_restricted_standard_and_have_no_token(self) -> None:
        made = front(served())
        (container,) = made["containers"]
        assert made["automountServiceAccountToken"] is False
        assert made["securityContext"]["runAsNonRoot"] and made["securityContext"]["seccompProfile"]
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "nvidia.com/gpu" not in container["resources"]["requests"]

    def test_a_tokenizer_from_the_hub_is_fetched_before_the_front_starts(self) -> None:
        some = served(model={"huggingFace": {"path": "Qwen/Qwen3-0.6B", "revision": "abc", "context": 512}})
        (fetcher,) = front(some)["initContainers"]
        assert fetcher["command"][3:6] == ["Qwen/Qwen3-0.6B", "abc", "/model"]
        assert variables(some)["PIPELINEJOB_FRONT_TOKENIZER_DIRECTORY"] == "/model"
        assert {"ports": [{"protocol": "TCP", "port": 443}]} in objects(some)["NetworkPolicy/tiny-front"]["spec"][
            "egress"
        ]
        assert "initContainers" not in front(served())

    def test_only_they_reach_the_engine_and_they_reach_nothing_else_of_a_stage(self) -> None:
        policies = {
            o["metadata"]["name"]: o["spec"] for o in network_objects(served(), INSTALLATION) if "Policy" in o["kind"]
        }
        stages, fronts = policies["tiny"], policies["tiny-front"]
        assert {"key": "pipelinejob.dev/front", "operator": "DoesNotExist"} in stages["podSelector"]["matchExpressions"]
        own = {"podSelector": stages["podSelector"]}
        assert {"from": [own]} in stages["ingress"], "stages reach each other; fronts are none"
        assert [{"protocol": "TCP", "port": ENGINE_PORT}] in [rule.get("ports") for rule in stages["ingress"]]
        assert fronts["egress"][0]["ports"] == [{"protocol": "TCP", "port": ENGINE_PORT}]
        assert fronts["ingress"] == [{"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": 8000}]}]


def trained(step: int = 50, mode: str = "Train", **spec: Any) -> dict[str, Any]:
    """A job that has trained, as the API server would send it."""
    status = Status(progress=ProgressStatus(step=60, last_checkpoint_step=step))
    made = manifest(status, **{"mode": mode, "checkpoint": {"volumeClaimName": "weights"}} | spec)
    made["metadata"]["name"] = "trained"
    return made


FROM_JOB = {"fromJob": {"name": "trained"}}


def with_source(some: Job, **spec: Any) -> Job:
    found = source.find(some, trained(**spec))
    assert isinstance(found, SourceJob), found
    return replace(some, source=found)


class TestSource:
    """``model.fromJob``: the model of another job."""

    @pytest.mark.parametrize(
        ("other", "reason", "words"),
        [
            (None, Reason.MODEL_JOB_NOT_FOUND, 'PipelineJob "trained" does not exist in namespace "team"; create it'),
            (trained(0), Reason.MODEL_NOT_SAVED, "has no complete checkpoint yet"),
            (
                trained(checkpoint={}),
                Reason.MODEL_JOB_UNFIT,
                "keeps its weights nowhere; allowed: a job with spec.check",
            ),
            (
                trained(model={"module": {"function": "mine:build"}}),
                Reason.MODEL_JOB_UNFIT,
                "trains a model from a function",
            ),
            (
                trained(mode="Serve", train=None, serve={}, model=LLAMA),
                Reason.MODEL_JOB_UNFIT,
                "has mode Serve; allowed: a job of mode Train",
            ),
            (trained(stages="many"), Reason.MODEL_JOB_UNFIT, "cannot be read"),
        ],
        ids=["absent", "not saved", "no volume", "module", "another mode", "unreadable"],
    )
    def test_what_cannot_be_served_is_said_in_words(self, other: Any, reason: Reason, words: str) -> None:
        found = source.find(served(model=FROM_JOB), other)
        assert isinstance(found, Verdict)
        assert found.reason == reason
        assert found.message.startswith("spec.model.fromJob.name: ")
        assert words in found.message

    @pytest.mark.parametrize(("step", "waits"), [(50, False), (40, False), (51, True)])
    def test_a_certain_step_is_waited_for(self, step: int, waits: bool) -> None:
        found = source.find(served(model={"fromJob": {"name": "trained", "step": step}}), trained(50))
        assert isinstance(found, Verdict) == waits
        if isinstance(found, Verdict):
            assert "no complete checkpoint of step 51 yet, the newest is of 50;" in found.message

    def test_stages_get_the_other_jobs_model_and_mount_its_checkpoints_read_only(self) -> None:
        some = with_source(served(model={"fromJob": {"name": "trained", "step": 40}}))
        made = stage_pod(some, place(0, shape=TWO), INSTALLATION, share_host=False)
        config = WorkerConfig.model_validate_json(made["metadata"]["annotations"]["pipelinejob.dev/config"])
        assert (config.mode, config.train, config.oldest_reader) == ("Serve", None, 4)
        assert config.model == Job.read(trained()).spec.model
        assert config.source is not None
        assert (config.source.job, config.source.seed, config.source.step) == ("trained", 0, 40)
        (volume,) = [item for item in made["spec"]["volumes"] if "persistentVolumeClaim" in item]
        assert volume["persistentVolumeClaim"] == {"claimName": "weights"}
        (mount,) = [m for m in made["spec"]["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
        assert mount["readOnly"] is True

    @pytest.mark.parametrize(
        ("data", "model", "serve", "tokenizer"),
        [
            ({}, None, {}, ("Bytes", "/model")),
            ({"tokenizer": "HuggingFace", "tokenizerPath": "/t"}, None, {}, ("HuggingFace", "/t")),
            ({"tokenizer": "HuggingFace"}, LLAMA, {}, ("HuggingFace", "/models/llama")),
            ({"format": "Tokens"}, LLAMA, {}, ("HuggingFace", "/models/llama")),
            ({}, None, {"tokenizerPath": "/mine"}, ("HuggingFace", "/mine")),
        ],
        ids=["bytes", "a directory", "the model's", "tokens were the model's", "the user's word"],
    )
    def test_the_tokenizer_is_that_of_the_training_data(
        self, data: dict[str, str], model: dict[str, Any] | None, serve: dict[str, str], tokenizer: tuple[str, str]
    ) -> None:
        train = {"data": {"files": ["/data/*"], **data}, "steps": 200, "globalBatchSize": 8, "microbatches": 4}
        some = with_source(served(model=FROM_JOB, serve=serve), train=train, **({"model": model} if model else {}))
        settings, _ = from_environment(variables(some))
        assert (settings.tokenizer, str(settings.tokenizer_directory)) == tokenizer

    def test_nothing_is_made_before_there_is_a_model(self) -> None:
        some = served(model=FROM_JOB)
        problem = source.find(some, None)
        made = decide(some, source_problem=problem)
        assert kinds(made) == []
        assert told(made)["Placed"] == ("False", "ModelJobNotFound")
        assert made.look_again_at is not None, "nobody tells this job that the other one has come"

    def test_what_runs_goes_on_when_the_other_job_is_deleted(self) -> None:
        some = settled(with_source(served(model=FROM_JOB)), *pods())
        made = decide(replace(some, source=None), *pods(), source_problem=source.find(some, None), network_due=True)
        assert kinds(made) == []
        assert told(made)["Running"][0] == "True"

    def test_more_stages_than_its_layers_are_refused(self) -> None:
        made = decide(with_source(served(model=FROM_JOB, stages=11)))
        assert told(made)["Accepted"] == ("False", "TooFewLayers")


def pods(**facts: Any) -> list[Any]:
    return [pod(stage, shape=TWO, **facts) for stage in range(2)]


def available(made: Plan) -> tuple[str, str]:
    return told(made)["Available"]


class TestStatus:
    def test_a_job_that_trains_is_not_available_to_anybody(self) -> None:
        assert "Available" not in told(decide(job()))

    @pytest.mark.parametrize(
        ("ready", "stage_ready", "expected", "words"),
        [
            (2, True, ("True", "Serving"), "2 of 2 fronts and 1 of 1 pipelines are ready"),
            (1, True, ("True", "Serving"), "1 of 2 fronts"),
            (0, True, ("False", "FrontsNotReady"), "0 of 2 fronts are ready: no quota"),
            (2, False, ("False", "NoPipelineReady"), "accepted requests wait for up to 120 s"),
        ],
    )
    def test_it_is_available_with_a_front_and_a_pipeline(
        self, ready: int, stage_ready: bool, expected: tuple[str, str], words: str
    ) -> None:
        some = settled(served(), *pods())
        seen = Fronts(wanted=2, ready=ready, problem="" if ready else "no quota")
        made = decide(some, *pods(ready=stage_ready), fronts=seen)
        assert available(made) == expected
        assert words in message(made, "Available")
        assert made.status.ready_fronts == ready

    @pytest.mark.parametrize(("ready", "again"), [(1, True), (2, False)])
    def test_fronts_that_are_missing_are_looked_for_again(self, ready: int, again: bool) -> None:
        some = settled(served(), *pods())
        assert (decide(some, *pods(), fronts=Fronts(2, ready)).look_again_at is not None) == again

    def test_one_replica_of_two_is_enough(self) -> None:
        shape = Shape(2, 2)
        both = [pod(s, pipeline=p, shape=shape, ready=p == 1) for p in range(2) for s in range(2)]
        made = decide(served(pipelines=2), *both, fronts=Fronts(2, 2))
        assert available(made) == ("True", "Serving")
        assert "1 of 2 pipelines" in message(made, "Available")

    def test_what_all_pipelines_do_adds_up(self) -> None:
        def agent(pipeline: int) -> AgentStatus:
            work = Serving(requests_per_second=1.25, queued=2, running=3, cache_percent=20 + 20 * pipeline)
            progress = Progress(tokens_per_second=600, bubble_percent=10 + 10 * pipeline, serving=work)
            return AgentStatus(job_uid="u", stage=0, epoch=1, state="Running", progress=progress)

        shape = Shape(2, 2)
        all_pods = [pod(s, pipeline=p, shape=shape) for p in range(2) for s in range(2)]
        made = decide(served(pipelines=2), *all_pods, pipelines=[agent(0), agent(1)], fronts=Fronts(2, 2))
        shown = made.status.summary
        assert (shown.requests_per_second, shown.tokens_per_second, shown.queue) == ("2.5", "1.2k", "4")
        assert (shown.bubble, shown.fronts, made.status.progress.cache_percent) == ("15%", "2/2", 30)
        assert (shown.step, shown.progress, shown.loss) == ("", "", "")


class TestLife:
    def test_it_never_succeeds_by_itself(self) -> None:
        some = settled(served(), *pods())
        made = decide(some, *(ended(stage, 0, shape=TWO) for stage in range(2)))
        assert told(made)["Succeeded"][0] == "Unknown"

    def test_a_batch_does(self) -> None:
        batch = {"input": "/in", "output": "/out"}
        some = settled(served(mode="Batch", serve=None, batch=batch), *pods())
        made = decide(some, *(ended(stage, 0, shape=TWO) for stage in range(2)))
        assert told(made)["Succeeded"] == ("True", "AllStagesSucceeded")

    def test_suspended_it_has_no_fronts(self) -> None:
        some = settled(served(suspend=True))
        made = decide(some, fronts=Fronts(wanted=2, ready=2))
        assert [action.manifest["spec"]["replicas"] for action in made.actions] == [0]  # type: ignore[union-attr]
        assert available(made) == ("False", "Suspended")
        assert kinds(decide(some, fronts=Fronts(wanted=0))) == []

    def test_suspended_it_stops_its_stages_only_when_the_fronts_have_ended_their_requests(self) -> None:
        some = served(settled(served(), *pods()).status, suspend=True)
        made = decide(some, *pods(), fronts=Fronts(wanted=2, ready=2, pods=2))
        assert kinds(made) == ["ApplyObject"]
        assert message(made, "Suspended") == "spec.suspend is set; the fronts end the requests that they have accepted"
        assert kinds(decide(some, *pods(), fronts=Fronts(wanted=0, pods=1))) == []
        then = message(decide(some, *pods(), fronts=Fronts(wanted=0)), "Suspended")
        assert then.startswith("spec.suspend is set; the stage pods are on their way out")

    def test_finished_it_has_no_fronts(self) -> None:
        end = Condition(
            type="Succeeded", status="False", last_transition_time="2026-01-01T12:00:00Z", reason="DeadlineExceeded"
        )
        some = served(Status(conditions=[end], completion_time="2026-01-01T12:00:00Z"))
        made = decide(some, fronts=Fronts(wanted=2, ready=2))
        assert [action.manifest["spec"]["replicas"] for action in made.actions] == [0]  # type: ignore[union-attr]

    def test_a_worker_with_a_command_of_its_own_cannot_serve(self) -> None:
        template = {"spec": {"containers": [{"name": "worker", "command": ["vllm"]}]}}
        made = decide(served(template=template))
        assert told(made)["Accepted"] == ("False", "InvalidTemplate")
        assert "mode Serve is our worker's; remove the command" in message(made, "Accepted")
