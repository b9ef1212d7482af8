"""Processes that use the real huggingface_hub client: it reads its settings when it is imported."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.limits import HANG_SECONDS

from .loopback import LoopbackHub


@dataclass(frozen=True)
class Client:
    """Processes that know one Hub and share one cache."""

    endpoint: str
    home: Path

    def start(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        environment = kept | ours | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)

    def python(self, code: str, *arguments: str | Path, **environment: str) -> Any:
        """Run code in a fresh interpreter; its last line of output is JSON."""
        done = self.start([sys.executable, "-c", code, *map(str, arguments)], **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def miracle(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = Path(sys.executable).with_name("miracle")
        return self.start([str(command), *map(str, arguments)])


def stopped_url() -> str:
    """An address of this machine where nothing listens any more."""
    with LoopbackHub() as hub:
        return hub.url
