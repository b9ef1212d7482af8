"""`miracle compare`: what two models, dense or compressed, answer to the same texts, images or arrays."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax
from tqdm import tqdm

from miracle_hub.codec.detector import TO_RUN
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.errors import DataError, SourceError
from miracle_hub.evaluate.batches import (
    Batches,
    array_batches,
    check_fits,
    equal_lengths,
    image_batches,
    masked,
    read_model_config,
    read_processor,
    shared_tokenizer,
    tokenized,
)
from miracle_hub.evaluate.data import read_texts
from miracle_hub.hub.card import auto_class
from miracle_hub.hub.resolve import local_folder

_CAUSAL, _MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
_IMAGES, _EMBEDDING = "AutoModelForImageClassification", "AutoModel"
# What is compared, by the class that loads a model.
_TASKS = {
    _CAUSAL: "next token",
    _MASKED: "masked token",
    "AutoModelForSequenceClassification": "class of a text",
    _IMAGES: "class of an image",
    _EMBEDDING: "embedding",
}
# Rows of a batch, and distributions that are in float64 at a time: choices that bound memory.
_BATCH = 16
_DISTRIBUTIONS_AT_ONCE = 256


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows.

    Attributes:
        task: what a prediction is: "next token", "masked token", "class of a text", "class of an image" or
            "embedding".
        predictions: that were compared: tokens of a language model, else rows.
        bytes_a, bytes_b: of the safetensors files.
        changes: predictions whose most likely answer differs; None for embeddings.
        kl_nats: mean KL of A's distribution to B's; None for embeddings.
        cosine: mean cosine similarity of mean-pooled last hidden states; None unless the task is "embedding".
    """

    task: str
    rows: int
    predictions: int
    bytes_a: int
    bytes_b: int
    changes: int | None
    kl_nats: float | None
    cosine: float | None

    @property
    def statement(self) -> str:
        """The figures but for sizes, for people."""
        start = f"{self.rows:,} rows, {self.predictions:,} predictions ({self.task}): "
        if self.agreement is None:
            return f"{start}mean cosine similarity {self.cosine:.6f}"
        return (
            f"{start}top-1 agreement {100 * self.agreement:.2f} % ({self.changes:,} changes), mean KL(A ‖ B) "
            f"{self.kl_nats:.6f} nats"
        )

    @property
    def agreement(self) -> float | None:
        """Share of the predictions whose most likely answer is the same."""
        return None if self.changes is None else 1 - self.changes / self.predictions


def compare(
    a: str | Path,
    b: str | Path,
    *,
    data: str | Path,
    split: str | None = None,
    text_columns: list[str] | None = None,
    max_length: int = 128,
    revision_a: str | None = None,
    revision_b: str | None = None,
    progress: bool = True,
) -> Comparison:
    """How much two models, dense or compressed, differ in size and in what they answer to the same data.

    Args:
        a, b: folders or Hub ids; the tokenizer or image processor is that of `a`, or else of `b`.
        data: texts (csv, tsv, json, jsonl, parquet, txt; a folder of `datasets`; a Hub id); for image models
            a folder of images, an image, or a txt of their paths; or an npz of the model's own inputs.
        split: of the data, where they have several.
        text_columns: one or two columns of text; by default those that can be no others.
        max_length: tokens of a text.
        revision_a, revision_b: branch, tag or commit of a Hub id.

    Raises:
        SourceError: a model cannot be read, is of a kind that is not compared, or has other classes, another
            vocabulary or another task than the other.
        DataError: the data cannot be read, are empty, or are not what the model takes.
        FormatError: and its subclasses: a file is not sound.
    """
    sides = [_Side.read(local_folder(*side, taken=TO_RUN)) for side in ((a, revision_a), (b, revision_b))]
    _check_alike(*sides)
    rows, batches = _batches(sides, Path(data), split, text_columns, max_length)
    tally = _Tally()
    with torch.inference_mode(), tqdm(total=rows, unit="rows", desc="compare", disable=not progress) as bar:
        for inputs, chosen in batches:
            first, second = (side.answers(inputs, chosen) for side in sides)
            tally.add(first, second, sides[0].auto == _EMBEDDING, sides)
            bar.update(len(next(iter(inputs.values()))))
    return tally.comparison(_TASKS[sides[0].auto], rows, sides)


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    folder: Path
    n_bytes: int
    auto: str
    model: Any

    @classmethod
    def read(cls, folder: Path) -> "_Side":
        """
        Raises:
            SourceError: the model is of another kind, or misses tensors that its answers depend on.
        """
        n_bytes, config = inspect_folder(folder).file_bytes, read_model_config(folder)
        architecture = str((config.architectures or [""])[0])
        auto = auto_class(architecture)
        is_known = architecture.endswith("Model") or auto != _EMBEDDING
        is_double = config.is_encoder_decoder or hasattr(config, "vision_config")
        if auto not in _TASKS or not is_known or is_double:
            raise SourceError(
                f"{folder}: expected a model that chooses classes or tokens (…ForSequenceClassification, "
                "…ForImageClassification, …ForCausalLM, …ForMaskedLM) or gives embeddings (…Model), found "
                f"{architecture or 'no architecture in config.json'}; compare such models"
            )
        model, found = _loaded(folder, getattr(transformers, auto))
        if missing := [name for name in sorted(found["missing_keys"]) if not name.startswith("pooler.")]:
            raise SourceError(
                f"{folder}: expected every tensor of {type(model).__name__}, found none of the name "
                f"{missing[0]}; compare models with the heads that they were trained with"
            )
        return cls(folder, n_bytes, auto, model.to("cuda" if torch.cuda.is_available() else "cpu").eval())

    def answers(self, inputs: dict[str, Tensor], chosen: Tensor | None) -> Tensor:
        """Logits `[predictions, classes]`, or embeddings `[rows, hidden]`, on the model's device."""
        model, mask = self.model, inputs.get("attention_mask")
        placed = {
            name: values.to(model.device, model.dtype if values.is_floating_point() else values.dtype)
            for name, values in inputs.items()
        }
        outputs = self._outputs(placed)
        if self.auto != _EMBEDDING:
            logits = outputs.logits
            kept = mask.bool() if chosen is None and mask is not None and logits.ndim == 3 else chosen
            return (logits if kept is None else logits[kept.to(logits.device)]).flatten(0, -2).float()
        hidden = getattr(outputs, "last_hidden_state", None)
        if hidden is None:
            raise SourceError(f"{self.folder}: expected embeddings, found none; compare another model")
        hidden = hidden.double() if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2).double()
        share = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden)
        return (hidden * share).sum(1) / share.sum(1)

    def _outputs(self, inputs: dict[str, Tensor]) -> Any:
        """
        Raises:
            DataError: the model does not take the inputs.
        """
        try:
            return self.model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            shapes = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in inputs.items())
            raise DataError(
                f"{self.folder}: expected inputs that the model takes, found {shapes} "
                f"({str(error).partition(chr(10))[0]}); give what its forward expects"
            ) from error


def _loaded(folder: Path, auto: Any) -> tuple[Any, dict[str, Any]]:
    """
    Raises:
        SourceError: a package is missing that a model quantized by somebody else needs.
    """
    try:
        return auto.from_pretrained(folder, output_loading_info=True)
    except ImportError as error:
        said = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"{folder}: expected a model that transformers loads here, found a package missing ({said}); "
            "install it, or compare with the model that it was made from"
        ) from error


def _check_alike(a: _Side, b: _Side) -> None:
    """
    Raises:
        SourceError: the two models do not answer the same question.
    """
    if a.auto != b.auto:
        raise SourceError(
            f"{b.folder}: expected a model for the task of {a.folder} ({_TASKS[a.auto]}), found "
            f"{_TASKS[b.auto]}; compare models of one task"
        )
    what, wanted, found = "vocabulary of size", *(getattr(s.model.config, "vocab_size", 0) for s in (a, b))
    if "class" in _TASKS[a.auto]:
        what, wanted, found = "classes", *(dict(side.model.config.id2label) for side in (a, b))
    if wanted != found:
        raise SourceError(
            f"{b.folder}: expected the {what} {str(wanted)[:80]} of {a.folder}, found {str(found)[:80]}; "
            "compare models that answer alike"
        )


@dataclass
class _Tally:
    """Sums over predictions."""

    predictions: int = 0
    changes: int = 0
    kl_nats: float = 0.0
    cosine: float = 0.0

    def add(self, a: Tensor, b: Tensor, is_embedding: bool, sides: list[_Side]) -> None:
        """
        Raises:
            SourceError: the answers have different sizes, or are not finite.
        """
        if a.shape != b.shape:
            raise SourceError(
                f"{sides[1].folder}: expected answers of shape {list(a.shape)} as {sides[0].folder} gives "
                f"them, found {list(b.shape)}; compare models that answer alike"
            )
        for side, answers in zip(sides, (a, b), strict=True):
            if n_bad := int((~torch.isfinite(answers)).sum()):
                raise SourceError(
                    f"{side.folder}: expected finite answers, found {n_bad} of {answers.numel()} that are "
                    "NaN or infinite; repair the model, or compare in float32"
                )
        self.predictions += len(a)
        if is_embedding:
            self.cosine += float(cosine_similarity(a, b).sum())
            return
        self.changes += int((a.argmax(1) != b.argmax(1)).sum())
        # A few at a time: a vocabulary is large in float64.
        for some_a, some_b in zip(
            a.split(_DISTRIBUTIONS_AT_ONCE), b.split(_DISTRIBUTIONS_AT_ONCE), strict=True
        ):
            self.kl_nats += _kl_nats(some_a, some_b)

    def comparison(self, task: str, rows: int, sides: list[_Side]) -> Comparison:
        """
        Raises:
            DataError: there was nothing to predict.
        """
        if not self.predictions:
            raise DataError("data: expected something to predict, found no token; give longer texts")
        sizes = (sides[0].n_bytes, sides[1].n_bytes)
        if task == _TASKS[_EMBEDDING]:
            return Comparison(
                task, rows, self.predictions, *sizes, None, None, self.cosine / self.predictions
            )
        kl_nats = self.kl_nats / self.predictions
        return Comparison(task, rows, self.predictions, *sizes, self.changes, kl_nats, None)


def _kl_nats(a: Float[Tensor, "rows classes"], b: Float[Tensor, "rows classes"]) -> float:
    """Σ over rows of KL(softmax a ‖ softmax b)."""
    first, second = log_softmax(a.double(), 1), log_softmax(b.double(), 1)
    return float(kl_div(second, first, reduction="sum", log_target=True))


def _batches(
    sides: list[_Side], data: Path, split: str | None, columns: list[str] | None, max_length: int
) -> tuple[int, Batches]:
    """The number of rows, and the models' inputs with the positions whose answers count (None: all).

    Raises:
        DataError: the data cannot be read, or are empty. SourceError: there is no tokenizer or processor.
    """
    model, folders = sides[0].model, [side.folder for side in sides]
    known = inspect.signature(model.forward).parameters
    if data.suffix == ".npz":
        return array_batches(data, set(known), _BATCH)
    if model.main_input_name == "pixel_values":
        return image_batches(data, read_processor(folders), _BATCH)
    tokenizer, task = shared_tokenizer(folders), "causal-lm" if "token" in _TASKS[sides[0].auto] else "texts"
    inputs = tokenized(tokenizer, read_texts(data, split, columns, task), max_length)
    for side in sides:
        check_fits(side.model, inputs)
    inputs = {name: values for name, values in inputs.items() if name in known}
    step = _BATCH if getattr(model.config, "pad_token_id", None) is not None else 1  # some models insist
    hide = masked if sides[0].auto == _MASKED else lambda batch, _: (batch, None)
    return len(inputs["input_ids"]), (hide(batch, tokenizer) for _, batch in equal_lengths(inputs, step))
