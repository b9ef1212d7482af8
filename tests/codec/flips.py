"""Random damage to repositories, and what every reader makes of it: an error, the same, or silence.

A case is one damage (a flipped bit, a truncation, inserted bytes, two tensors that changed places) to one
file of one repository, read by one reader. It is drawn from a seed and a number, which reproduce it.
"""

import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import miracle_hub
from miracle_hub import MiracleHubMixin
from miracle_hub.errors import MiracleError
from miracle_hub.plugin.quantizer import MiracleConfig

from ..training.networks import SMALL, conv_net, variational_net

# Of our own readers a MiracleError is asked for. transformers opens config.json, index and weights before it
# calls the plug-in, and says in its own words what it cannot read.
LOUD: dict[str, tuple[type[Exception], ...]] = {
    # Not JSON (OSError); no such model type, or an option that a configuration refuses (ValueError); no such
    # dtype in torch (AttributeError); the method's name is lost, so that payloads have the wrong sizes
    # (RuntimeError).
    "config": (OSError, ValueError, AttributeError, RuntimeError),
    # Not JSON (ValueError), without a weight_map (KeyError), or with the name of no file (OSError).
    "index": (ValueError, KeyError, OSError),
    # A header that is not sound, of which the dtype was to be read.
    "weights": (SafetensorError, OSError),
}
TRANSFORMERS = ("from_pretrained", "keep_compressed")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# What is read from a repository: every tensor's dtype, shape and bytes, and what else must not change.
Found = dict[str, Any]
Reader = Callable[[Path, Path], Found]


class Digits(nn.Module, MiracleHubMixin):
    """A network of a mixin's repository, with arguments that change its shapes and others that do not."""

    def __init__(self, width: int = 6, activation: str = "relu") -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Digits' logits."""
        return self.head(getattr(torch, self.activation)(self.norm(self.body(x))))


@dataclass
class Subject:
    """A repository or a single file in a folder, and who reads it.

    Attributes:
        readers: of the folder and of the damaged file; `of_file` says which look at that file alone.
        intact: what the undamaged files give, by reader and file.
    """

    name: str
    folder: Path
    readers: dict[str, Reader]
    intact: dict[tuple[str, str], Found] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Weight files, indices and config.json, the former about three times as often."""
        names = sorted(
            path.name for path in self.folder.iterdir() if path.suffix in (".safetensors", ".json")
        )
        names = [name for name in names if not name.startswith("generation")]
        weights = [name for name in names if name.endswith(".safetensors")]
        others = [name for name in names if name not in weights]
        return weights * max(1, 3 * len(others) // max(1, len(weights))) + others

    def expected(self, reader: str, file: str) -> Found:
        """What the undamaged repository gives; to be asked for before anything is damaged."""
        key = (reader, file if reader.endswith("(file)") else "")
        if key not in self.intact:
            self.intact[key] = self.readers[reader](self.folder, self.folder / file)
        return self.intact[key]


# Readers.


def found_in(tensors: dict[str, Tensor], **more: Any) -> Found:
    """Bytes, so that -0.0 and NaN count."""
    flat = {name: t.detach().cpu().contiguous().reshape(-1) for name, t in tensors.items()}
    return {
        name: (str(t.dtype), tuple(tensors[name].shape), t.view(torch.uint8).numpy().tobytes())
        for name, t in flat.items()
    } | more


def read_folder(folder: Path, file: Path) -> Found:
    return found_in(miracle_hub.load_state_dict(folder))


def read_file(folder: Path, file: Path) -> Found:
    return found_in(miracle_hub.load_state_dict(file))


def decompressed(folder: Path, file: Path) -> Found:
    """The dense checkpoint, its config.json included."""
    out = folder.with_name("dense")
    miracle_hub.decompress(folder, out, overwrite=True, progress=False)
    tensors = {k: t for path in out.glob("*.safetensors") for k, t in load_file(path).items()}
    return found_in(tensors, config=json.loads((out / "config.json").read_text(encoding="utf-8")))


def verified(read: Reader) -> Reader:
    """If verify finds no defect, `read` gives what it gave."""

    def reader(folder: Path, file: Path) -> Found:
        miracle_hub.verify(folder).require()
        try:
            return read(folder, file)
        except MiracleError as error:
            return {"verify found no defect, but": error}

    return reader


def with_config(read: Reader) -> Reader:
    """What config.json says counts too, but not what it says of itself alone."""

    def reader(folder: Path, file: Path) -> Found:
        found = read(folder, file)
        return found | {"config": without_guard(json.loads((folder / "config.json").read_bytes()))}

    return reader


def without_guard(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without its guards: where these alone are damaged, nothing else is."""
    facts = config.get("quantization_config")
    if not isinstance(facts, dict):
        return config
    return config | {"quantization_config": {key: facts[key] for key in facts if key != "guard"}}


def from_pretrained(auto: Any, **options: Any) -> Reader:
    """Plain from_pretrained, with the keys that it reports and the configuration that the model has."""

    def reader(folder: Path, file: Path) -> Found:
        model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
        config = without_guard(json.loads(model.config.to_json_string(use_diff=False)))
        config.pop("_name_or_path", None)
        if options:
            model.dequantize()
        keys = {kind: sorted(map(str, names)) for kind, names in info.items()}
        return found_in(model.state_dict(), config=config, keys=keys)

    return reader


def mixin(folder: Path, file: Path) -> Found:
    model = Digits.from_pretrained(folder)
    return found_in(model.state_dict(), arguments=[model.body.out_features, model.activation])


def into_digits(folder: Path, file: Path) -> Found:
    return found_in(miracle_hub.load(file, Digits(width=10)).state_dict())


def into_conv_net(folder: Path, file: Path) -> Found:
    return found_in(miracle_hub.load(file, conv_net(seed=9)).state_dict())


# Repositories.


def subjects(work: Path) -> list[Subject]:
    """One of every kind, made in `work`."""
    bert, lm = transformers.BertModel, transformers.LlamaForCausalLM
    tied: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}
    plain = compressed(work / "bert", bert(transformers.BertConfig(**SIZES)))
    half = compressed(work / "bf16", bert(transformers.BertConfig(**SIZES)).bfloat16())
    sharded = compressed(work / "sharded", bert(transformers.BertConfig(**SIZES)), max_shard_size="10kB")
    staged = compressed(work / "stages", bert(transformers.BertConfig(**SIZES)), stages=2)
    language = compressed(work / "tied", lm(transformers.LlamaConfig(**tied)))
    model, causal = transformers.AutoModel, transformers.AutoModelForCausalLM
    return [
        Subject("bert", plain, readers(model, keeps=True)),
        Subject("bert in BF16", half, readers(model)),
        Subject("shards", sharded, readers(model)),
        Subject("stages", staged, {k: read for k, read in readers(model).items() if read is not read_file}),
        Subject("tied language model", language, readers(causal, keeps=True)),
        *networks(work),
    ]


def readers(auto: Any, keeps: bool = False) -> dict[str, Reader]:
    """Who reads a compressed transformers model."""
    kept = {"keep_compressed": from_pretrained(auto, quantization_config=MiracleConfig(keep_compressed=True))}
    return {
        "load_state_dict": read_folder,
        "load_state_dict (file)": read_file,
        "from_pretrained": from_pretrained(auto),
        "decompress": decompressed,
        "verify": verified(with_config(read_folder)),
        **(kept if keeps else {}),
    }


def compressed(work: Path, model: transformers.PreTrainedModel, **options: Any) -> Path:
    """None of its tensors is constant, so that one that was left uninitialized shows."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim:
            noise = 0.05 * torch.randn(tensor.shape, generator=generator) + (tensor.ndim == 1)
            tensor.data.copy_(noise)
    model.save_pretrained(work / "source")
    options = {"bits_per_weight": 8.0, "window_bits": 8, "progress": False, **options}
    miracle_hub.compress(work / "source", work / "out", **options)
    (work / "out" / "README.md").unlink()
    return work / "out"


def networks(work: Path) -> Iterator[Subject]:
    """A network's stream with a batch norm beside it, one of payloads, and both as a mixin's repository."""
    for streams in ("network", "tensor"):
        net, folder = coded(variational_net(streams=streams)), work / streams
        folder.mkdir()
        miracle_hub.save(net, folder / "model.safetensors")
        known: dict[str, Reader] = {"load (file)": into_conv_net, "verify": verified(_only(into_conv_net))}
        yield Subject(f"network, streams={streams}", folder, known)
        digits: Any = Digits(width=10, activation="tanh")
        miracle_hub.make_variational(digits, **{**SMALL, "target_modules": "all", "streams": streams})
        coded(digits).save_pretrained(work / f"mixin-{streams}")
        (work / f"mixin-{streams}" / "README.md").unlink()
        known = {"mixin": mixin, "load (file)": into_digits, "verify": verified(mixin)}
        yield Subject(f"mixin, streams={streams}", work / f"mixin-{streams}", known)


def _only(read: Reader) -> Reader:
    """A reader of the only weights of a folder."""
    return lambda folder, file: read(folder, folder / "model.safetensors")


def coded(model: Any) -> Any:
    """A network as coding leaves it, with a batch norm that has seen something."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)):
        generator = torch.Generator().manual_seed(1)
        for tensor in (norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.copy_(1 + torch.rand(tensor.shape, generator=generator))
    options = miracle_hub.CodingOptions(groups=1, refit_steps=0)
    miracle_hub.code_model(model, lambda number: torch.zeros(()), options=options, progress=False)
    return model.eval()


# Damage.


def damage(data: bytes, name: str, draw: random.Random) -> tuple[str, bytes]:
    """What was done to the bytes of a file, and the bytes that are left."""
    is_weights = name.endswith(".safetensors")
    kinds = [flipped, flipped, truncated, inserted] + [swapped_bytes, swapped_names] * is_weights
    return draw.choice(kinds)(data, is_weights, draw)


def flipped(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """One bit, of anything, of the header or of a plain tensor."""
    first, last = draw.choice(regions(data)) if is_weights else (0, len(data))
    bit = draw.randrange(8 * first, 8 * last)
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return f"bit {bit % 8} of byte {bit // 8} flipped", bytes(changed)


def truncated(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """The end is lost."""
    kept = draw.randrange(len(data))
    return f"truncated to {kept} bytes", data[:kept]


def inserted(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """Some bytes too many."""
    at, more = draw.randrange(len(data) + 1), draw.randbytes(draw.choice([1, 1, 2, 8]))
    return f"{more!r} inserted at byte {at}", data[:at] + more + data[at:]


def swapped_bytes(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """The bytes of two tensors of one size."""
    start, header = header_of(data)
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    pairs = [
        (one, other)
        for one in spans
        for other in spans
        if one < other and spans[one][1] - spans[one][0] == spans[other][1] - spans[other][0] > 0
    ]
    if not pairs:
        return flipped(data, is_weights, draw)
    one, other = draw.choice(pairs)
    (a, b), (c, d) = spans[one], spans[other]
    changed = bytearray(data)
    changed[start + a : start + b], changed[start + c : start + d] = (
        data[start + c : start + d],
        data[start + a : start + b],
    )
    return f"bytes of {one} and {other} swapped", bytes(changed)


def swapped_names(data: bytes, is_weights: bool, draw: random.Random) -> tuple[str, bytes]:
    """The names of two tensors, of one dtype and shape where there are two."""
    start, header = header_of(data)
    names = sorted(name for name in header if name != "__metadata__")
    kinds = {name: (header[name]["dtype"], header[name]["shape"]) for name in names}
    pairs = [(a, b) for a in names for b in names if a < b]
    pairs = [(a, b) for a, b in pairs if kinds[a] == kinds[b]] or pairs
    if not pairs:
        return flipped(data, is_weights, draw)
    one, other = draw.choice(pairs)
    other_name = {one: other, other: one}
    text = json.dumps({other_name.get(name, name): entry for name, entry in header.items()}).encode()
    text += b" " * (-len(text) % 8)
    return f"names {one} and {other} swapped", len(text).to_bytes(8, "little") + text + data[start:]


def header_of(data: bytes) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and its header."""
    start = 8 + int.from_bytes(data[:8], "little")
    return start, json.loads(data[8:start])


def regions(data: bytes) -> list[tuple[int, int]]:
    """All of a file, its header, and some of its plain tensors."""
    start, header = header_of(data)
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    spans = [(start + first, start + last) for first, last in offsets if first < last]
    plain = [(a, b) for a, b in spans if data[a : a + 3] != b"MRC"]
    return [(0, len(data)), (0, start), *plain[:: max(1, len(plain) // 2)]]


# Cases.


@dataclass
class Counts:
    """Outcomes by reader, kind of file and outcome; and what was silent, or loud without a name."""

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Lines of figures, a reader and a kind of file each."""
        kinds = ("equal", "named", "unnamed", "SILENT")
        lines = [f"{'reader':24}{'file':8}" + "".join(f"{kind:>9}" for kind in kinds)]
        for reader, file in sorted({key[:2] for key in self.outcomes}):
            figures = "".join(f"{self.outcomes[reader, file, kind]:9}" for kind in kinds)
            lines.append(f"{reader:24}{file:8}{figures}")
        totals = {kind: sum(n for key, n in self.outcomes.items() if key[2] == kind) for kind in kinds}
        lines.append(f"{'all':32}" + "".join(f"{totals[kind]:9}" for kind in kinds))
        return "\n".join(lines)


def sweep(all_subjects: list[Subject], cases: range, seed: int = 0) -> Counts:
    """Cases of the given numbers, each undone before the next."""
    counts = Counts()
    with quiet():
        for number in cases:
            draw = random.Random(f"damage {seed} {number}")
            subject = draw.choice(all_subjects)
            file = draw.choice(subject.files)
            is_weights = file.endswith(".safetensors")
            kind = "weights" if is_weights else "config" if file == "config.json" else "index"
            reader = draw.choice([r for r in subject.readers if is_weights or not r.endswith("(file)")])
            expected = subject.expected(reader, file)
            path = subject.folder / file
            whole = path.read_bytes()
            what, left = damage(whole, file, draw)
            path.write_bytes(left)
            try:
                allowed = (MiracleError, *(LOUD[kind] if reader in TRANSFORMERS else ()))
                outcome, said = outcome_of(subject.readers[reader], subject.folder, path, expected, allowed)
            finally:
                path.write_bytes(whole)
            counts.outcomes[reader, kind, outcome] += 1
            if outcome in ("named", "unnamed"):
                counts.errors[reader, said] += 1
            if outcome in ("unnamed", "SILENT"):
                where = f"case {number} of seed {seed}: {subject.name}, {reader}, {file}"
                counts.faults.append(f"{outcome}: {where}: {what}: {said}")
    return counts


def outcome_of(
    read: Reader, folder: Path, path: Path, expected: Found, allowed: tuple[type[Exception], ...]
) -> tuple[str, str]:
    """Which of the four outcomes, and the error's name or what differs."""
    try:
        found = read(folder, path)
    except allowed as error:
        return "named", type(error).__name__
    except Exception as error:
        return "unnamed", f"{type(error).__name__}: {str(error)[:80]}"
    if found == expected:
        return "equal", ""
    differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return "SILENT", ", ".join(differ[:3])


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' reports and bars would fill pages."""
    logging, before = transformers.utils.logging, transformers.utils.logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def copy_of(subject: Subject, folder: Path) -> Subject:
    """The same repository, for a test that changes it for good."""
    return Subject(subject.name, shutil.copytree(subject.folder, folder), subject.readers)
