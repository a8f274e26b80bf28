"""What a job says of its network reaches the stages, and what they reach."""

from collections.abc import Iterator

import pytest

from tests.e2e import kit

HTTPS = 443
SERVE = f"import http.server as h; h.HTTPServer(('', {HTTPS}), h.SimpleHTTPRequestHandler).serve_forever()"
CONNECT = "import socket; socket.create_connection(('{address}', {port}), timeout=1); print('yes')"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


def test_stages_train_over_the_interface_that_the_job_names(namespace: kit.Namespace) -> None:
    network = {"interface": "eth0", "nccl": [{"name": "NCCL_DEBUG", "value": "INFO"}]}
    run = kit.Job(namespace, "train", kit.spec(2, 200, network=network)).create()
    run.wait_step(1)
    pod = run.pods()[0]["metadata"]["name"]
    printed = kit.kubectl("exec", pod, "-n", namespace.name, "--", "env").splitlines()
    assert {"GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0", "NCCL_DEBUG=INFO"} <= set(printed)
    run.wait_succeeded()


def test_an_interface_that_pods_do_not_have_fails_the_job_by_name(namespace: kit.Namespace) -> None:
    run = kit.Job(namespace, "train", kit.spec(2, 20, network={"interface": "ib9"})).create()
    failed = run.wait("Succeeded", "False", "InvalidConfiguration")
    assert "spec.network.interface: this pod has no network interface ib9; allowed: " in failed["message"]
    assert "eth0" in failed["message"]


@pytest.fixture
def https_server(namespace: kit.Namespace) -> Iterator[str]:
    """The address of a server on port 443 that is no part of any job."""
    container = {
        "name": "python",
        "image": kit.WORKER_IMAGE,
        "command": ["python3", "-c", SERVE],
        "readinessProbe": {"tcpSocket": {"port": HTTPS}, "periodSeconds": 1},
    }
    spec = {
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "securityContext": {"sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]},
        "containers": [container],
    }
    namespace.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hub"}, "spec": spec})
    kit.kubectl("wait", "pod/hub", "-n", namespace.name, "--for=condition=Ready", "--timeout=60s")
    yield kit.get("pod", "hub", "-n", namespace.name)["status"]["podIP"]


def test_only_a_job_with_a_model_from_a_hub_reaches_https(namespace: kit.Namespace, https_server: str) -> None:
    sleeping = kit.template(command=["sleep", "600"])
    hub = {"huggingFace": {"path": "Qwen/Qwen3-0.6B", "context": 32}}
    jobs = {
        "downloads": kit.Job(namespace, "downloads", kit.spec(1, template=sleeping, model=hub)).create(),
        "has-all": kit.Job(namespace, "has-all", kit.spec(1, template=sleeping)).create(),
    }
    for run in jobs.values():
        run.wait("Running")

    def reaches(name: str) -> bool:
        connect = CONNECT.format(address=https_server, port=HTTPS)
        pod = jobs[name].pods()[0]["metadata"]["name"]
        said = kit.kubectl("exec", pod, "-n", namespace.name, "--", "python3", "-c", connect, check=False)
        assert said.strip() == "yes" or "TimeoutError" in said, said  # a policy drops: nothing else may be the reason
        return said.strip() == "yes"

    kit.wait_for("the job with a model from a hub reaches the server", lambda: reaches("downloads"), 30)
    kit.wait_for("the other job does not", lambda: not reaches("has-all"), 30)


def test_the_network_of_the_node_is_refused_where_pods_are_restricted() -> None:
    with kit.namespace("host-network", RESTRICTED) as namespace:
        run = kit.Job(namespace, "train", kit.spec(2, network={"hostNetwork": True})).create()
        message = run.wait("Placed", "False", "PodSecurityViolation")["message"]
        assert "host namespaces (hostNetwork=true)" in message
        assert "remove from spec.template and spec.network what the namespace's pod security level forbids" in message
        assert run.pods() == []
