"""The model card of a compressed repository: measured facts only."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from miracle_hub.codec.compress import Report

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


def write_card(folder: Path, report: Report, source: Path, base_model: str | None) -> None:
    """README.md with the license of the source's card, if it has one."""
    data = _source_card_data(source)
    data.library_name = "transformers"
    data.tags = sorted({*map(str, data.tags or []), "miracle", "compressed"})
    if base_model is not None:
        data.base_model = base_model
        data["base_model_relation"] = "quantized"
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"{(base_model or source.name).split('/')[-1]}, {report.bits_per_weight:.2f} bits per weight",
        base=base_model,
        compressed=f"{report.compressed_bytes:,}",
        dense=f"{report.dense_bytes:,}",
        ratio=f"{report.dense_bytes / report.compressed_bytes:.2f}",
        rate=f"{report.bits_per_weight:.4f}",
        weights=f"{report.n_weights:,}",
        digest=report.digest,
    )
    (folder / "README.md").write_text(str(card))


def _source_card_data(source: Path) -> ModelCardData:
    """License, language and pipeline tag carry over; scores of the dense model do not."""
    path = source / "README.md"
    if not path.exists():
        return ModelCardData()
    found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
    return ModelCardData(**{key: found[key] for key in kept if key in found})
