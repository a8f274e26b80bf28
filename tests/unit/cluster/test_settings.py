"""What nodes are called and labelled, what a start remembers, how the API server is configured."""

from pathlib import Path

import pytest

from tests.cluster import builder, control_plane, lifecycle, node, settings
from tests.cluster.control_plane import Configuration
from tests.cluster.errors import ClusterError
from tests.cluster.lifecycle import Cluster


def test_two_nodes_share_a_rack_and_four_a_zone() -> None:
    racks = [node.labels(index)[node.RACK_LABEL] for index in range(1, 6)]
    zones = [node.labels(index)["topology.kubernetes.io/zone"] for index in range(1, 6)]
    assert racks == ["rack-1", "rack-1", "rack-2", "rack-2", "rack-3"]
    assert zones == ["zone-1"] * 4 + ["zone-2"]


def test_a_cluster_of_an_earlier_boot_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "STATE", tmp_path)
    assert Cluster.read() is None

    this_boot = Cluster(nodes=4, gpus=2, simulated=0, boot=lifecycle.BOOT_ID.read_text().strip())
    this_boot.write()
    assert Cluster.read() == this_boot

    Cluster(nodes=4, gpus=2, simulated=0, boot="another").write()
    assert Cluster.read() is None
    with pytest.raises(ClusterError, match="no cluster runs on this machine; start one with `make cluster-up`"):
        lifecycle.running()


def test_a_configuration_becomes_arguments_and_survives_a_restart_of_python(tmp_path: Path) -> None:
    configuration = Configuration({"B": False, "A": True}, ("x.io/v1=true", "y.io/v1=true"), ("--v=2",))
    assert configuration.flags() == (
        "--feature-gates=A=true,B=false",
        "--runtime-config=x.io/v1=true,y.io/v1=true",
        "--v=2",
    )
    assert Configuration().flags() == ()

    control_plane.save_configuration(configuration, tmp_path / "kept")
    assert control_plane.load_configuration(tmp_path / "kept") == configuration


def test_images_have_the_tag_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGE_TAG", raising=False)
    assert builder.tag() == "dev"
    monkeypatch.setenv("IMAGE_TAG", "next")
    assert builder.tag() == "next"
