"""The chart as helm renders it."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import binaries

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts/pipelinejob"
RELEASE = "pipelinejob"
NAMESPACE = "pipelinejob-system"

Object = dict[str, Any]

ONE_NAMESPACE = ("watchNamespace=team-a",)
EVERYTHING = ("networkPolicy.enabled=true",)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm; the caller looks at its return code."""
    command = (str(binaries.ensure() / "helm"), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def settings(values: tuple[str, ...]) -> list[str]:
    """The arguments that set values, each written as name=value."""
    return [argument for value in values for argument in ("--set", value)]


def render(*values: str) -> list[Object]:
    """The objects of the release."""
    done = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *settings(values))
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def refusal(*values: str) -> str:
    """What helm says when it refuses the values."""
    done = helm("template", RELEASE, str(CHART), *settings(values))
    assert done.returncode != 0, f"{values} were taken"
    return done.stderr


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """The objects of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def deployment(*values: str) -> Object:
    """The operator's Deployment."""
    (found,) = of_kind(render(*values), "Deployment")
    return found
