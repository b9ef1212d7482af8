"""Processes that use the real huggingface_hub client: it reads its settings when it is imported."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forks

from .loopback import LoopbackHub


@dataclass(frozen=True)
class Client:
    """Processes that know one Hub and share one cache."""

    endpoint: str
    home: Path

    def run(self, code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run code where huggingface_hub has not been imported yet."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return forks.run(code, *arguments, environment=kept | ours | environment)

    def python(self, code: str, *arguments: str | Path, **environment: str) -> Any:
        """Run code whose last line of output is JSON."""
        done = self.run(code, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def miracle(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """The command line; tests/test_cli.py has the installed script."""
        return self.run("from miracle_hub.cli import main; main()", *arguments)


def stopped_url() -> str:
    """An address of this machine where nothing listens any more."""
    with LoopbackHub() as hub:
        return hub.url
