"""The model card of a compressed repository: measured facts only."""

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from miracle_hub.codec.compress import Report
from miracle_hub.format.container import writing

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A compressed copy{% if base %} of [{{ base }}](https://huggingface.co/{{ base }}){% endif %}, written by
miracle-hub: {{ compressed }} bytes of weights instead of {{ dense }}, {{ rate }} bits per weight
(all `*.safetensors` files / all weights). It decodes to the same bits on every machine.

```python
# pip install miracle-hub
from transformers import AutoModel

model = AutoModel.from_pretrained("path/or/repository")
```

| | |
|---|---|
| weights | {{ weights }} |
| bytes, dense → compressed | {{ dense }} → {{ compressed }} ({{ ratio }} times smaller) |
| bits per weight, whole file | {{ rate }} |
| digest of the decoded tensors | `{{ digest }}` |

Without miracle-hub installed, loading fails with a size mismatch; it never loads wrong weights.
"""

# License, languages and task carry over; scores of the dense model do not.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Tags of other formats, which the compressed repository does not hold.
_FORMAT_TAGS = {"pytorch", "tf", "jax", "onnx", "openvino", "coreml", "rust", "gguf", "tflite"}


def write_card(folder: Path, report: Report, source: Path, base_model: str | None) -> None:
    """README.md, with the license, languages and tags of the source's card."""
    name = base_model or source.resolve().name
    card = ModelCard.from_template(
        _card_data(_metadata(source / "README.md"), base_model),
        template_str=_TEMPLATE,
        title=f"{name.split('/')[-1]}, {report.bits_per_weight:.2f} bits per weight",
        base=base_model,
        compressed=f"{report.compressed_bytes:,}",
        dense=f"{report.dense_bytes:,}",
        ratio=f"{report.dense_bytes / report.compressed_bytes:.2f}",
        rate=f"{report.bits_per_weight:.4f}",
        weights=f"{report.n_weights:,}",
        digest=report.digest,
    )
    with writing(folder / "README.md"):
        (folder / "README.md").write_text(str(card), encoding="utf-8")


def _card_data(source: dict[str, Any], base_model: str | None) -> ModelCardData:
    """What the Hub reads: how to load the repository, and what it was made from."""
    tags = source.get("tags") or []
    kept_tags = {str(tag) for tag in ([tags] if isinstance(tags, str) else tags)} - _FORMAT_TAGS
    facts = {key: source[key] for key in _KEPT if key in source}
    if base_model is not None:
        facts |= {"base_model": base_model, "base_model_relation": "quantized"}
    tags = sorted(kept_tags | {"miracle", "compressed"})
    return ModelCardData(library_name="transformers", tags=tags, **facts)


def _metadata(path: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty where there is none."""
    try:
        return (metadata_load(path) or {}) if path.is_file() else {}
    except (ValueError, YAMLError) as error:
        warnings.warn(
            f"{path}: expected a model card with a YAML block at its head, found {error}; license and "
            "languages do not carry over to the compressed repository: add them to its README.md",
            stacklevel=2,
        )
        return {}
