"""How near inputs without data come to real ones, in docs/results.md."""

from typing import Any

from figures import load

_TITLES = {"stories": "stories260K", "minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
_TITLES |= {"resnet": "ResNet-44"}
_SETS = ("again", "self", "c4", "stories", "white noise")
_HEAD = """## Inputs without data

How near second moments of the inputs of every layer, E[x xᵀ], come to those of real data: the mean cosine
over layers (`benchmarks/self_inputs.py`). "Again" is other data of the same source, "self" what the model
makes by itself; real texts of another kind stand beside it."""


def section() -> str:
    """One row per model."""
    results = load("self_inputs")["results"]
    lines = [
        _HEAD,
        "",
        f"| model | beside | {' | '.join(_SETS)} |",
        "|---" * (2 + len(_SETS)) + "|",
        *(_row(_TITLES[name], found) for name, found in results.items()),
    ]
    return "\n".join(lines)


def _row(title: str, found: dict[str, Any]) -> str:
    cosines = {name: f"{one['cosine']:.3f}" for name, one in found["found"].items()}
    return f"| {title} | {found['beside']} | {' | '.join(cosines.get(name, '') for name in _SETS)} |"
