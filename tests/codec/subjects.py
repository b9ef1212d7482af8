"""Repositories of every kind, and everybody who reads them: what is damaged, and who must see it."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import miracle_hub
from miracle_hub import MiracleHubMixin
from miracle_hub.errors import MiracleError
from miracle_hub.plugin.quantizer import MiracleConfig

from ..training.networks import SMALL, conv_net, variational_net

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


def copy_of(subject: Subject, folder: Path) -> Subject:
    """The same repository, for a test that changes it for good."""
    return Subject(subject.name, shutil.copytree(subject.folder, folder), subject.readers)
