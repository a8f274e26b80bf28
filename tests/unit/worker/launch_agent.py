"""Runs an agent with other paths, another port or another program than in a pod: the settings as JSON."""

import json
import sys
from pathlib import Path

from pipelinejob_worker.agent.__main__ import run
from pipelinejob_worker.agent.settings import Settings

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    for path in ("pod_info", "checkpoint_directory", "scratch_directory", "recovery_directory", "termination_log"):
        settings[path] = Path(settings[path])
    sys.exit(run(Settings(**settings)))
