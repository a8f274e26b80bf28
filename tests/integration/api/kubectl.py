"""kubectl against one API server."""

import json
import re
import subprocess
from typing import Any

from tests.cluster.control_plane import ControlPlane


class Kubectl:
    """kubectl against one API server, as its administrator."""

    def __init__(self, plane: ControlPlane) -> None:
        self.command = [str(plane.binaries / "kubectl"), "--kubeconfig", str(plane.kubeconfig)]

    def __call__(self, *arguments: str, stdin: Any = None) -> subprocess.CompletedProcess[str]:
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run([*self.command, *arguments], input=text, capture_output=True, text=True, check=False)

    def refusal(self, *arguments: str, stdin: Any = None) -> str:
        """Return the one line with which a command is refused.

        Where the schema refuses, kubectl adds a note on the rules that were then left out, and a heading.
        """
        done = self(*arguments, stdin=stdin)
        assert done.returncode != 0, done.stdout
        lines = done.stderr.strip().splitlines()
        if len(lines) > 1:
            lines = [line.removeprefix("* ") for line in lines[1:] if "some validation rules were not" not in line]
        (line,) = lines
        return re.sub(r'^The PipelineJob ".*?" is invalid: ', "", line)

    def said(self, *arguments: str, stdin: Any = None) -> str:
        """Return what a command that must succeed prints."""
        done = self(*arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout
