"""kubectl against one API server."""

import json
import subprocess
from typing import Any

from tests.cluster.control_plane import ControlPlane


class Kubectl:
    """kubectl against one API server, as its administrator or as somebody else."""

    def __init__(self, plane: ControlPlane, user: str = "") -> None:
        self.plane = plane
        command = [str(plane.binaries / "kubectl"), "--kubeconfig", str(plane.kubeconfig)]
        self.command = [*command, "--as", user] if user else command

    def __call__(self, *arguments: str, stdin: Any = None) -> subprocess.CompletedProcess[str]:
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run([*self.command, *arguments], input=text, capture_output=True, text=True, check=False)

    def refusal(self, *arguments: str, stdin: Any = None) -> str:
        """Return the one line with which a command is refused, without the API server's note on what it left out."""
        done = self(*arguments, stdin=stdin)
        assert done.returncode != 0, done.stdout
        lines = done.stderr.strip().splitlines()
        if len(lines) > 1:  # a heading, then one line an error
            lines = [line for line in lines[1:] if "some validation rules were not checked" not in line]
        (line,) = lines
        return line

    def said(self, *arguments: str, stdin: Any = None) -> str:
        """Return what a command that must succeed prints."""
        done = self(*arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout
