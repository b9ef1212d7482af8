"""One thread, and a Hub on 127.0.0.1; set here, before numba, torch and the Hub's client are imported.

Children are forked, and of a process's threads only the one that forks goes on in the child.
"""

import os
import tempfile
from pathlib import Path

from ..hub.loopback import LoopbackHub
from ..hub.loopback_parts import TOKEN

WORK = Path(tempfile.mkdtemp(prefix="miracle-chaos-"))
HUB = LoopbackHub()
HUB.start()
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HOME": str(WORK / "home"),
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "NO_PROXY": "127.0.0.1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
