"""`miracle certify`: the errors of what a file decodes to, counted, and the certificate that they make.

The network is built from the counted files alone, whatever else lies in the repository, so that its weights
depend on nothing that the certificate's bits leave out.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from miracle_hub.code import QUANT_METHOD
from miracle_hub.codec.certificate import Certificate, certificate_of_files, check_delta
from miracle_hub.codec.config import read_facts
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.modules import load
from miracle_hub.codec.source import weight_files
from miracle_hub.errors import DataError, SourceError
from miracle_hub.evaluate.batches import (
    check_fits,
    equal_lengths,
    read_model_config,
    read_tokenizer,
    tokenized,
)
from miracle_hub.evaluate.data import read_examples
from miracle_hub.hub.resolve import local_folder

_BATCH = 64  # rows of one length at a time: a choice that bounds memory


def certify(
    source: str | Path,
    *,
    data: str | Path,
    fitted: bool,
    split: str | None = None,
    delta: float = 0.05,
    text_columns: list[str] | None = None,
    label_column: str = "label",
    max_length: int = 128,
    revision: str | None = None,
    progress: bool = True,
) -> Certificate:
    """An upper bound on the risk of a compressed text classifier; codec/certificate.py has the theorem.

    Args:
        source: a folder or a Hub id of a compressed repository with its tokenizer.
        data: a file (csv, tsv, json, jsonl, parquet, txt), a folder of `datasets`, or a Hub id.
        fitted: True where the network was fitted to these rows, or to some of them, or chosen with a view to
            them; the size of its files then enters the bound. False promises that it was not.
        split: of the data, where they have several.
        delta: chance that the bound is wrong; chosen before looking.
        text_columns: one or two columns of text; by default those that can be no others.
        label_column: whole numbers from 0 on, or names of the model's classes.
        max_length: tokens of a text; part of the classifier, so that it is fixed before the data are seen.

    Raises:
        SourceError: the repository is not compressed, or no classifier.
        DataError: the data cannot be read, are empty, or lack a text or a class of the model.
        OptionError: delta is out of range.
        FormatError: and its subclasses: a file is not sound.
    """
    check_delta(delta)
    folder = local_folder(source, revision)
    config = _classifier_config(folder)
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    texts, labels = read_examples(data, split, text_columns, label_column, names)
    model, inputs = _model(folder, config), tokenized(read_tokenizer(folder), texts, max_length)
    check_fits(model, inputs)
    step = _BATCH if getattr(config, "pad_token_id", None) is not None else 1  # some models insist
    answers = _answers(model, inputs, torch.tensor(labels), step)
    with tqdm(total=len(labels), unit="rows", desc="certify", disable=not progress) as bar:
        errors = 0
        for logits, expected in answers:
            errors += count_errors(logits, expected, str(folder))
            bar.update(len(expected))
    files = weight_files(folder)
    return certificate_of_files(files, errors, len(labels), len(names), fitted=fitted, delta=delta)


def certify_network(
    model: nn.Module,
    path: str | Path,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    fitted: bool,
    delta: float = 0.05,
) -> Certificate:
    """The same of a network in a file that `save` wrote, for any inputs.

    Args:
        model: a module of the same structure, which the file is loaded into; `[examples, classes]` logits.
        batches: inputs and `[examples]` classes from 0 on, such as a DataLoader gives: every example once,
            without augmentation.
        fitted, delta: see `certify`.

    Raises:
        SourceError: the model's answers are no logits.
        DataError: there are no examples, or a label is none of the classes.
        OptionError: delta is out of range.
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    check_delta(delta)
    load(path, model).eval()
    errors = examples = classes = 0
    with torch.inference_mode():
        for inputs, labels in batches:
            logits = model(inputs)
            errors += count_errors(logits, labels, type(model).__name__)
            examples, classes = examples + len(labels), logits.shape[1]
    if not examples:
        raise DataError("batches: expected at least one example, found none; an iterator can be used once")
    return certificate_of_files([Path(path)], errors, examples, classes, fitted=fitted, delta=delta)


def count_errors(logits: Tensor, labels: Tensor, where: str) -> int:
    """How many rows do not give their own class the one greatest logit: a tie or NaN is an error.

    Raises:
        SourceError: the logits are not one row of at least two classes per label.
        DataError: a label is no whole number below the number of classes.
    """
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise SourceError(
            f"{where}: expected logits [examples, classes] of a classifier and labels [examples], found "
            f"{list(logits.shape)} and {list(labels.shape)}; certificates are for classifiers"
        )
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise DataError(
            f"{where}: expected labels that are whole numbers from 0 to {logits.shape[1] - 1}, found "
            f"{labels.dtype} from {labels.min()} to {labels.max()}; number the classes as the model does"
        )
    return _count(logits, labels.to(logits.device, torch.int64))


def _count(logits: Float[Tensor, "examples classes"], labels: Integer[Tensor, " examples"]) -> int:
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    return int((~(own > others)).sum())


def _classifier_config(folder: Path) -> Any:
    """
    Raises:
        SourceError: the repository is not compressed, or its model chooses no class of a text.
    """
    if not folder.is_dir() or not read_facts(folder):
        raise SourceError(
            f"{folder}: expected a compressed repository, with quant_method {QUANT_METHOD!r} in config.json, "
            "found none; run miracle compress or fit first, or call certify_network for a file of save"
        )
    config: Any = read_model_config(folder)
    names = config.architectures or []
    is_classifier = config.num_labels > 1 and any(str(n).endswith("ForSequenceClassification") for n in names)
    if not is_classifier or config.problem_type not in (None, "single_label_classification"):
        raise SourceError(
            f"{folder}: expected a model that chooses one of several classes (…ForSequenceClassification), "
            f"found {names} with {config.num_labels} labels, problem type {config.problem_type}; certify a "
            "classifier"
        )
    return config


def _model(folder: Path, config: Any) -> nn.Module:
    """The model that plain `from_pretrained` gives, from the decoded tensors and its config alone.

    Raises:
        SourceError: tensors are missing, which transformers would draw at random.
        FormatError: and its subclasses: a file is not sound.
    """
    del config.quantization_config
    state = load_state_dict(folder)
    with torch.device("meta"):
        kind = type(AutoModelForSequenceClassification.from_config(config))
    model, found = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise SourceError(
            f"{folder}: expected every tensor of {kind.__name__}, found none of the name {missing[0]}; "
            "compress the fine-tuned classifier, not its base"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def _answers(
    model: nn.Module, inputs: dict[str, list[list[int]]], labels: Tensor, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of up to `step` rows at a time."""
    device = next(model.parameters()).device
    for rows, batch in equal_lengths(inputs, step):
        yield model(**{name: x.to(device) for name, x in batch.items()}).logits, labels[rows]
