"""`miracle certify`: the errors or costs of what a file decodes to, and the certificate that they make.

The network is built from the counted files alone, whatever else lies in the repository, so that its weights
depend on nothing that the certificate's bits leave out. Answers are asked for twice (asked.py).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from miracle_hub.code import QUANT_METHOD
from miracle_hub.codec.certificate import Certificate, certificate_of_files, check_delta, check_fitted
from miracle_hub.codec.config import read_facts
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.modules import load
from miracle_hub.codec.source import weight_files
from miracle_hub.codec.token_certificate import TokenCertificate, token_certificate_of_files
from miracle_hub.errors import DataError, SourceError
from miracle_hub.evaluate.asked import Asked, Seen
from miracle_hub.evaluate.batches import (
    check_fits,
    equal_lengths,
    read_model_config,
    read_tokenizer,
    tokenized,
)
from miracle_hub.evaluate.data import read_examples, read_texts
from miracle_hub.evaluate.outside import check_nothing_outside
from miracle_hub.evaluate.tokens import token_probabilities
from miracle_hub.hub.card import auto_class
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
    training: str | Path | None = None,
    max_length: int = 128,
    revision: str | None = None,
    progress: bool = True,
) -> Certificate | TokenCertificate:
    """An upper bound on the risk of a text classifier, or on the nats per token of a causal language model.

    codec/certificate.py and codec/token_certificate.py have the theorems.

    Args:
        source: a folder or a Hub id of a compressed repository with its tokenizer.
        data: a file (csv, tsv, json, jsonl, parquet, txt), a folder of `datasets`, or a Hub id.
        fitted: True where the network was fitted to these rows, or to some of them, or chosen with a view to
            them; the size of its files then enters the bound. False promises that it was not.
        split: of the data, where they have several.
        delta: chance that the bound is wrong; chosen before looking.
        text_columns: one or two columns of text; by default those that can be no others. One for a language
            model.
        label_column: of a classifier: whole numbers from 0 on, or names of the model's classes.
        training: data that the network was fitted to, with the same columns: rows that are among them count
            as repeated, so that held-out ones which are not held out tighten nothing.
        max_length: tokens of a text, or of a language model's window, which has no more than the model has
            positions; part of the model, so that it is fixed before the data are seen.

    Raises:
        SourceError: the repository is not compressed, neither classifier nor causal language model, or its
            answers to a row depend on more than the row.
        DataError: the data cannot be read, are empty, or lack a text or a class of the model.
        OptionError: delta, fitted or max_length is none.
        FormatError: and its subclasses: a file is not sound.
    """
    check_delta(delta)
    check_fitted(fitted)
    folder = local_folder(source, revision)
    config = _config(folder)
    if _is_language_model(config):
        texts, known = (
            _one_column(read_texts(some, part, text_columns, "causal-lm"), text_columns) if some else []
            for some, part in ((data, split), (training, None))
        )
        model = _model(folder, config, AutoModelForCausalLM)
        given = (model, read_tokenizer(folder), texts, max_length, str(folder))
        said = token_probabilities(*given, known=known, progress=progress)
        return token_certificate_of_files(
            weight_files(folder), said.probabilities, said.is_repeated, said.vocabulary, fitted=fitted,
            delta=delta, texts=len(texts), repeated=said.repeated_texts, window=said.window,
        )  # fmt: skip
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    columns = (text_columns, label_column, names)
    rows = read_examples(data, split, *columns)
    known = read_examples(training, None, *columns) if training else None
    tally = _classified(folder, config, rows, known, max_length, progress)
    return tally.certificate(weight_files(folder), fitted, delta)


_Examples = tuple[list[list[str]], list[int]]


@torch.inference_mode()
def _classified(
    folder: Path, config: Any, rows: _Examples, known: _Examples | None, max_length: int, progress: bool
) -> "_Tally":
    """Errors of a repository's classifier on rows, some of which are known."""
    model = _model(folder, config, AutoModelForSequenceClassification)
    tokenizer, tally = read_tokenizer(folder), _Tally(_logits_of(model), str(folder))

    def batches(examples: _Examples, step: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        labels = torch.tensor(examples[1])
        inputs = tokenized(tokenizer, examples[0], max_length)
        check_fits(model, inputs)
        return ((batch, labels[at]) for at, batch in equal_lengths(inputs, step))

    for batch, labels in batches(known, _BATCH) if known else ():
        tally.seen.repeated(batch, labels)
    step = _BATCH if getattr(config, "pad_token_id", None) is not None else 1  # some models insist
    with tqdm(total=len(rows[1]), unit="rows", desc="certify", disable=not progress) as bar:
        for batch, labels in batches(rows, step):
            tally.add(batch, labels)
            bar.update(len(labels))
        tally.asked.finish()
    return tally


def _one_column(columns: list[list[str]], names: list[str] | None) -> list[str]:
    """
    Raises:
        DataError: there are two.
    """
    if len(columns) > 1:
        raise DataError(
            f"data: expected one column of text for a language model, found {names}; name one with "
            "--text-columns"
        )
    return columns[0]


def certify_network(
    model: nn.Module | Callable[[], nn.Module],
    path: str | Path,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    fitted: bool,
    delta: float = 0.05,
) -> Certificate:
    """The same of a network in a file that `save` wrote, for any inputs.

    Args:
        model: a module of the same structure, which the file is loaded into, or a function without arguments
            that makes one, such as its class; `[examples, classes]` logits. All that it computes with must be
            in the file: tensors beside it are refused.
        batches: inputs and `[examples]` classes from 0 on, such as a DataLoader gives: every example once,
            without augmentation. Every row is asked twice, in other company.
        fitted, delta: see `certify`.

    Raises:
        SourceError: the model's answers are no logits, or depend on more than a row and the file.
        DataError: there are no examples, or a label is none of the classes.
        OptionError: delta or fitted is none.
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    check_delta(delta)
    check_fitted(fitted)
    module = _module(model)
    load(path, module).eval()
    check_nothing_outside(module)
    tally = _Tally(module, type(module).__name__)
    with torch.inference_mode():
        for inputs, labels in batches:
            tally.add(inputs, labels)
        tally.asked.finish()
    return tally.certificate([Path(path)], fitted, delta)


def _module(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """
    Raises:
        SourceError: it is no module, and makes none.
    """
    made = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(made, nn.Module):
        raise SourceError(
            f"certify_network: expected a module, or a function without arguments that makes one, found "
            f"{type(model).__name__}; pass the network's class or an instance"
        )
    return made


@dataclass
class _Tally:
    """Errors and repetitions, counted batch after batch."""

    ask: Callable[[Any], Tensor]
    where: str
    examples: int = 0
    errors: int = 0
    repeated: int = 0
    repeated_errors: int = 0
    classes: int | None = None
    seen: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        self.asked = Asked(self.ask, self.where)

    def add(self, inputs: Any, labels: Tensor) -> None:
        """A row is an error if it is one in either answer: near a tie, rounding decides.

        Raises:
            SourceError, DataError: what `count_errors` and `Asked` raise.
        """
        first, second = self.asked.twice(inputs, labels)
        wrong = wrong_rows(first, labels, self.where) | wrong_rows(second, labels, self.where)
        if self.classes not in (None, first.shape[1]):
            raise SourceError(
                f"{self.where}: expected logits of {self.classes} classes as before, found {first.shape[1]}; "
                "certify a model with one set of classes"
            )
        repeated = self.seen.repeated(inputs, labels)
        self.classes = first.shape[1]
        self.examples, self.errors = self.examples + len(labels), self.errors + int(wrong.sum())
        self.repeated += int(repeated.sum())
        self.repeated_errors += int((repeated & wrong).sum())

    def certificate(self, files: list[Path], fitted: bool, delta: float) -> Certificate:
        """
        Raises:
            DataError: there are no examples.
        """
        if not self.examples or self.classes is None:
            raise DataError(
                "batches: expected at least one example, found none; an iterator can be used once"
            )
        counts = (self.errors, self.examples, self.classes)
        return certificate_of_files(
            files, *counts, fitted=fitted, delta=delta, repeated=self.repeated,
            repeated_errors=self.repeated_errors,
        )  # fmt: skip


def count_errors(logits: Tensor, labels: Tensor, where: str) -> int:
    """How many rows do not give their own class the one greatest logit: a tie or NaN is an error.

    Raises:
        SourceError: the logits are not one row of at least two classes per label.
        DataError: a label is no whole number below the number of classes.
    """
    return int(wrong_rows(logits, labels, where).sum())


def wrong_rows(logits: Tensor, labels: Tensor, where: str) -> Bool[Tensor, " examples"]:
    """Which rows do not, on the CPU.

    Raises:
        SourceError, DataError: what `count_errors` raises.
    """
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise SourceError(
            f"{where}: expected logits [examples, classes] of a classifier and labels [examples], found "
            f"{list(logits.shape)} and {list(labels.shape)}; certificates are for classifiers"
        )
    is_whole = not labels.is_floating_point() and not labels.is_complex()
    if len(labels) and (not is_whole or not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]):
        real = labels.real if labels.is_complex() else labels
        raise DataError(
            f"{where}: expected labels that are whole numbers from 0 to {logits.shape[1] - 1}, found "
            f"{labels.dtype} from {real.min()} to {real.max()}; number the classes as the model does"
        )
    return _wrong(logits, labels.to(logits.device, torch.int64)).cpu()


def _wrong(
    logits: Float[Tensor, "examples classes"], labels: Integer[Tensor, " examples"]
) -> Bool[Tensor, " examples"]:
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    return ~(own > others)[:, 0]


def _config(folder: Path) -> Any:
    """
    Raises:
        SourceError: the repository is not compressed, or its model chooses neither classes nor tokens.
    """
    if not folder.is_dir() or not read_facts(folder):
        raise SourceError(
            f"{folder}: expected a compressed repository, with quant_method {QUANT_METHOD!r} in config.json, "
            "found none; run miracle compress or fit first, or call certify_network for a file of save"
        )
    config: Any = read_model_config(folder)
    names = config.architectures or []
    is_classifier = config.num_labels > 1 and any(str(n).endswith("ForSequenceClassification") for n in names)
    is_single = config.problem_type in (None, "single_label_classification")
    if not (is_classifier and is_single) and not _is_language_model(config):
        raise SourceError(
            f"{folder}: expected a model that chooses one of several classes (…ForSequenceClassification) or "
            f"the next token (…ForCausalLM), found {names} with {config.num_labels} labels, problem type "
            f"{config.problem_type}; certify a classifier or a causal language model"
        )
    return config


def _is_language_model(config: Any) -> bool:
    names = [str(name) for name in config.architectures or []]
    return any(auto_class(name) == "AutoModelForCausalLM" for name in names) and not config.is_encoder_decoder


def _model(folder: Path, config: Any, auto: Any) -> nn.Module:
    """The model that plain `from_pretrained` gives, from the decoded tensors and its config alone.

    Raises:
        SourceError: tensors are missing, which transformers would draw at random.
        FormatError: and its subclasses: a file is not sound.
    """
    del config.quantization_config
    state = load_state_dict(folder)
    with torch.device("meta"):
        kind = type(auto.from_config(config))
    model, found = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise SourceError(
            f"{folder}: expected every tensor of {kind.__name__}, found none of the name {missing[0]}; "
            "compress the fine-tuned model, not its base"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _logits_of(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    device = next(model.parameters()).device
    return lambda batch: model(**{name: x.to(device) for name, x in batch.items()}).logits
