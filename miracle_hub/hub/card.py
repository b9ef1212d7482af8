"""The model card of a compressed repository: measured facts only, in a section of their own."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from miracle_hub.codec.base import read_base
from miracle_hub.codec.config import read_config, read_quantization
from miracle_hub.codec.inspection import inspected
from miracle_hub.codec.naming import CARD
from miracle_hub.codec.parts import is_miracle
from miracle_hub.codec.reading import read_all
from miracle_hub.codec.report import Report, told_by_reason
from miracle_hub.codec.repository import repository_of
from miracle_hub.codec.source import is_adapter
from miracle_hub.codec.verification import Verification, verify_folder
from miracle_hub.errors import DataError, OptionError
from miracle_hub.files.whole import whole_file, writing
from miracle_hub.hub.adapter_card import base_of_adapter, usage_of_adapter
from miracle_hub.hub.facts import CardFacts, facts_of_folder, versions

# In the package, so that every installation has it; model_cards/template.md is a link to it.
TEMPLATE = Path(__file__).with_name("card_template.md")
# License, languages and task carry over; scores of the dense model do not.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Tags of other formats, which the compressed repository does not hold.
_FORMAT_TAGS = {"pytorch", "tf", "jax", "onnx", "openvino", "coreml", "rust", "gguf", "tflite"}
PLACEHOLDER = "path/or/repository"
_SECTION = re.compile(r"<!-- miracle-hub: measured -->.*<!-- /miracle-hub -->", re.DOTALL)
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}


def auto_class(architecture: str) -> str:
    """The class of transformers that loads a model of this name from a repository."""
    return next((auto for end, auto in _AUTO_CLASSES.items() if architecture.endswith(end)), "AutoModel")


def write_card(
    folder: Path, report: Report, source: Path, base_model: str | None, base: Path | None = None
) -> None:
    """README.md of what was just compressed, with the license, languages and tags of the source's card.

    Args:
        base: a folder with the model to which differences are stored, if there is one.
    """
    reading = read_all(folder)
    found = facts_of_folder(folder, inspected(repository_of(reading, base)), reading.weights_sha256)
    left_out = tuple(told_by_reason(report.left_out))
    facts = replace(
        found, dense_bytes=report.dense_bytes, versions=versions(), left_out=left_out,
        calibration=report.calibration_lines,
    )  # fmt: skip
    metadata = read_metadata(source / CARD)
    kept_tags = set(_tags(metadata)) - _FORMAT_TAGS
    kept = {key: metadata[key] for key in _KEPT if key in metadata} | {"tags": sorted(kept_tags)}
    name = base_model or source.resolve().name
    base_model = None if is_adapter(folder) else base_model  # which would be a dense adapter's
    update_card(folder, facts, metadata=kept, base=base_model, name=name)


def update_card(
    folder: Path,
    facts: CardFacts,
    *,
    metadata: dict[str, Any] | None = None,
    base: str | None = None,
    name: str = "",
    repo_id: str = "",
    usage: str = "",
) -> None:
    """Write the measured section of a folder's README.md, and what the Hub reads at its head.

    Text that is not between the section's marks stays as it is.

    Args:
        metadata: the head to complete; None means that of the folder's README.md.
        base: the dense model's Hub id.
        name: for the title of a card that has none yet.
        repo_id: where the card will be, if that is known.
        usage: code that loads the model; by default that of transformers.
    """
    path, config = folder / CARD, read_config(folder)
    text = _text(path) if metadata is None else ""
    head = dict(read_metadata(path) if metadata is None else metadata)
    is_plugin, of_adapter = is_miracle(read_quantization(folder)), is_adapter(folder)
    if (difference := read_base(read_quantization(folder), path)) is not None:
        base = difference.repository or None
    if of_adapter:
        base = base or base_of_adapter(folder)
        usage = usage_of_adapter(folder, repo_id or PLACEHOLDER)
    base = base or (head.get("base_model") if isinstance(head.get("base_model"), str) else None)
    reader = "peft" if of_adapter else "transformers" if is_plugin else ""
    data = _completed(head, facts, base, reader if of_adapter or "model_type" in config else "")
    usage = usage or ("" if is_plugin else _kept_usage(text, repo_id))
    usage = usage or _usage(config, repo_id or PLACEHOLDER, is_plugin)
    section = rendered(data, facts, base, name, usage, reader, repo_id)
    if text.strip():
        own = _SECTION.search(section)
        assert own is not None
        has_own = _SECTION.search(text) is not None
        body = _SECTION.sub(lambda _: own[0], text) if has_own else f"{text.rstrip()}\n\n{own[0]}\n"
        section = f"---\n{data.to_yaml()}\n---\n{body}"
    with writing(path), whole_file(path) as temporary:  # a kill must not cost a user's own text
        temporary.write_text(section, encoding="utf-8")


def rendered(
    data: ModelCardData,
    facts: CardFacts,
    base: str | None,
    name: str,
    usage: str,
    reader: str,
    repo_id: str,
) -> str:
    """The whole card; a fact that is missing has no line.

    Args:
        reader: the library that loads the repository where miracle-hub is installed; empty if none does.
    """
    rate = f"{facts.bits_per_weight:.4f}" if facts.bits_per_weight else ""
    short = f"{facts.bits_per_weight:.2f} bits per weight" if facts.bits_per_weight else "compressed"
    title = f"{name.split('/')[-1]}, {short}" if name else short
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), title=title, base=base, usage=usage, reader=reader,
        compressed=f"{facts.n_bytes:,}", dense=f"{facts.dense_bytes:,}" if facts.dense_bytes else "",
        rate=rate, rows=_rows(facts), evaluations=facts.evaluations, calibration=facts.calibration,
        certificate=facts.certificate, limits=facts.limits, copied=facts.copied, left_out=facts.left_out,
        plots=facts.plots, verify=repo_id, added_to=facts.added_to,
        lossless=facts.lossless,
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def _rows(facts: CardFacts) -> list[tuple[str, str]]:
    ratio = f"{facts.dense_bytes / facts.n_bytes:.2f}" if facts.dense_bytes else ""
    found = {
        "weights": f"{facts.n_weights:,}" if facts.n_weights else "",
        "bytes": f"{facts.n_bytes:,}",
        "bytes, dense": f"{facts.dense_bytes:,} ({ratio} times as many)" if facts.dense_bytes else "",
        "bits per weight, whole file": f"{facts.bits_per_weight:.4f}" if facts.bits_per_weight else "",
        "code": facts.code,
        "seed": "" if facts.seed is None else str(facts.seed),
        "digest of the decoded tensors": f"`{facts.digest}`" if facts.digest else "",
        "SHA-256 of the weight files": f"`{facts.sha256}`",
        "written by": ", ".join(f"{name} {number}" for name, number in facts.versions.items()),
        "hardware": facts.hardware,
    }
    return [(name, value) for name, value in found.items() if value]


def _completed(head: dict[str, Any], facts: CardFacts, base: str | None, library: str) -> ModelCardData:
    """What the Hub reads: how to load the repository, what it was made from, and what was measured."""
    relation = "adapter" if library == "peft" else "finetune" if facts.added_to else "quantized"
    head = {**head, "tags": sorted({*_tags(head), "miracle", "compressed"})}
    if library:
        head["library_name"] = library
    if base is not None:
        head |= {"base_model": base, "base_model_relation": relation}
    head.pop("miracle", None)
    if carried := facts.carried():
        head["miracle"] = carried
    return ModelCardData(ignore_metadata_errors=True, **head)


def _kept_usage(text: str, repo_id: str) -> str:
    """The code in a measured section that only its writer can know, with the repository's id of now."""
    section = _SECTION.search(text)
    code = re.search(r"```python\n(.*?)\n```", section[0], re.DOTALL) if section else None
    call = re.compile(r'(from_pretrained|hf_hub_download|load_state_dict)\("[^"]*"')
    return call.sub(lambda m: f'{m[1]}("{repo_id or PLACEHOLDER}"', code[1]) if code else ""


def _usage(config: dict[str, Any], repo_id: str, is_plugin: bool) -> str:
    if not is_plugin:
        return f'import miracle_hub\n\nweights = miracle_hub.load_state_dict("{repo_id}")'
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    auto = auto_class(name)
    return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{repo_id}")'


def _tags(metadata: dict[str, Any]) -> list[str]:
    tags = metadata.get("tags")
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags] if isinstance(tags, str) else [])]


def _text(path: Path) -> str:
    """What follows the head of a card; empty where there is none, or no card."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return re.sub(r"\A\s*---[^\S\n]*\n.*?\n---[^\S\n]*(\n|\Z)", "", text, count=1, flags=re.DOTALL)


def carried_facts(folder: Path, facts: CardFacts) -> CardFacts:
    """Facts of the files with those that the folder's card has of the same files."""
    given = read_metadata(folder / CARD).get("miracle")
    try:
        return facts if given is None else facts.with_carried(given, str(folder / CARD))
    except DataError as error:
        warnings.warn(f"{error}; the card is written without them", stacklevel=2)
        return facts


def stale_card(folder: Path, verification: Verification) -> str:
    """Why the facts in a folder's card are not those of its weights; empty if they are, or if it has none."""
    facts = read_metadata(folder / CARD).get("miracle") if folder.is_dir() else None
    expected = facts.get("sha256") if isinstance(facts, dict) else None
    found = verification.weights_sha256
    if expected is None or expected in (found, *(file.sha256 for file in verification.files)):
        return ""
    return (
        f"{folder / CARD}: expected weight files of SHA-256 {expected}, found {found}; they are damaged: "
        "download them again. If they were changed on purpose, remove `miracle` from the card's head"
    )


def verify_with_card(
    folder: Path, dense: Path | None, backend: str = "auto", base: Path | None = None
) -> Verification:
    """Whether a repository is sound, and its card is that of its files; see `miracle_hub.verify`.

    Raises:
        OptionError: an adapter is to be compared with a dense one.
    """
    if dense is not None and is_adapter(folder):
        raise OptionError(
            f"dense: expected none for an adapter, found {dense}: its factors were balanced before they were "
            "coded, and only their products can be compared; leave it out (the report of compress has the "
            "error of the products)"
        )
    found = verify_folder(folder, dense=dense, backend=backend, base=base)
    stale = stale_card(folder, found)
    return replace(found, defects=(*found.defects, stale)) if stale else found


def read_metadata(path: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty where there is none."""
    try:
        found = (metadata_load(path) or {}) if path.is_file() else {}
        return {key: value for key, value in found.items() if isinstance(key, str)}
    except (ValueError, YAMLError) as error:
        warnings.warn(
            f"{path}: expected a model card with a YAML block at its head, found {error}; license and "
            "languages do not carry over to the compressed repository: add them to its README.md",
            stacklevel=2,
        )
        return {}
