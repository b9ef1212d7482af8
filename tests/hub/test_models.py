"""Variational models from keywords to files: what is saved is what evaluation had, and defects are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import miracle_hub
from miracle_hub import CodingOptions, MiracleConfig, VariationalConfig
from miracle_hub.codec.modules import read_state
from miracle_hub.codec.repository import open_repository
from miracle_hub.errors import (
    ChecksumError,
    FormatError,
    OptionError,
    OutputExistsError,
    OutputWriteError,
    TruncatedPayloadError,
)
from miracle_hub.training.model import variational_of

from ..training.networks import IMAGES, conv_net, loss_of, streams_of, variational_net

CODES: list[dict[str, Any]] = [
    {"streams": "tensor", "code": "sliding"},
    {"streams": "tensor", "code": "block", "selection": "sample"},
    {"streams": "network", "code": "sliding", "parametrization": "mean-var"},
    {"streams": "network", "code": "block"},
    {"streams": "network", "sharing": {"hidden.weight": 6.0, "conv.weight": 2.0}},
    {"streams": "network", "sharing": {"weight": 3.0}, "sharing_kind": "tile", "selection": "sample"},
    {"streams": "tensor", "modules_to_save": ["head", "norm"]},
    {"streams": "network", "modules_to_save": ["head", "norm"]},
]


def coded(**options: Any) -> nn.Module:
    """A network that was fitted for a few steps, so that its batch norm has averages, and coded."""
    model = variational_net(**options)
    coding = CodingOptions(groups=3, refit_steps=2)
    miracle_hub.code_model(model, loss_of(model), options=coding, progress=False)
    return model.eval()


def weights_in_use(model: nn.Module) -> dict[str, Tensor]:
    """What forward passes read: by attribute, so that a posterior gives its draw or mean."""
    return {
        name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in conv_net().state_dict()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The file of a coded network, for both kinds of stream."""
    found: dict[str, bytes] = {}

    def file(streams: str) -> bytes:
        if streams not in found:
            path = tmp_path_factory.mktemp(streams) / "net.safetensors"
            miracle_hub.save(coded(streams=streams), path)
            found[streams] = path.read_bytes()
        return found[streams]

    return file


@pytest.mark.parametrize("options", CODES, ids=lambda options: "-".join(map(str, options.values())))
def test_a_saved_network_loads_with_the_weights_that_evaluation_had(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = coded(**options)
    n_bytes = miracle_hub.save(model, tmp_path / "net.safetensors")
    assert n_bytes == (tmp_path / "net.safetensors").stat().st_size
    fresh = conv_net(seed=5)
    assert miracle_hub.load(tmp_path / "net.safetensors", fresh) is fresh
    found, expected = fresh.state_dict(), weights_in_use(model)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert float(found["norm.running_mean"].abs().sum()) > 0 and int(found["norm.num_batches_tracked"]) > 0
    assert torch.equal(fresh.eval()(IMAGES), model(IMAGES))
    # The model goes on as it was, and saving it again gives the same file.
    before = (tmp_path / "net.safetensors").read_bytes()
    assert miracle_hub.save(model, str(tmp_path / "net.safetensors")) == n_bytes
    assert (tmp_path / "net.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "net.safetensors"]


def test_the_file_of_a_network_is_its_message_scales_and_little_more(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5), nn.Linear(80, 50), nn.Linear(50, 10))
    options: Any = {"streams": "network", "sharing": {"1.weight": 16.0, "2.weight": 8.0}}
    miracle_hub.make_variational(model, message_bits=3000, **options, window_bits=10)
    miracle_hub.code_model(model, options=CodingOptions(groups=1), progress=False)
    (stream,) = streams_of(model)
    n_bytes = miracle_hub.save(model, tmp_path / "net.safetensors")
    assert stream.code.message_bytes(stream.n_values) <= 375
    assert n_bytes - stream.code.message_bytes(stream.n_values) - 2 * len(stream.members) <= 120


def test_tied_weights_and_other_dtypes_are_saved_once_and_as_they_are(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12).bfloat16())
        model.append(nn.Linear(12, 12, bias=False))
        model[3].weight = model[0].weight
        return model

    model = miracle_hub.make_variational(make(), rate=2.0, streams="network", window_bits=6)
    miracle_hub.code_model(model, options=CodingOptions(groups=2), progress=False)
    miracle_hub.save(model, tmp_path / "net.safetensors")
    fresh: Any = miracle_hub.load(tmp_path / "net.safetensors", make())
    assert fresh[3].weight is fresh[0].weight and fresh[2].weight.dtype == torch.bfloat16
    for number in (0, 2):
        own: Any = model.eval().get_submodule(str(number))
        assert torch.equal(fresh[number].weight, own.weight) and torch.equal(fresh[number].bias, own.bias)


def test_a_network_that_was_an_ordinary_one_in_between_loads_into_a_fresh_one(tmp_path: Path) -> None:
    """The order of a module's parameters is that of the file: it survives removal."""
    model = variational_net(streams="network", target_modules=r".*weight")
    miracle_hub.remove_variational(model)
    options: Any = {"rate": 3.0, "streams": "network", "window_bits": 6}
    miracle_hub.make_variational(model, **options)
    miracle_hub.code_model(model, options=CodingOptions(groups=1), progress=False)
    miracle_hub.save(model, tmp_path / "net.safetensors")
    fresh = miracle_hub.load(tmp_path / "net.safetensors", conv_net())
    assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))


def changed(**modules: nn.Module) -> nn.Module:
    model = conv_net()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def renamed() -> nn.Module:
    model: Any = changed(last=conv_net().head)
    del model.head
    return model


def other_buffer() -> nn.Module:
    model: Any = conv_net()
    model.norm.running_mean = torch.zeros(5)
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "wider": lambda: changed(head=nn.Linear(10, 6)),
    "half": lambda: conv_net().half(),
    "deeper": lambda: changed(extra=nn.Linear(2, 2)),
    "shallower": lambda: changed(norm=nn.Identity()),
    "renamed": renamed,
    "buffer": other_buffer,
    "variational": variational_net,
}
DIFFERS = "expected the tensors of ConvNet, found one that differs in "
STRUCTURE = "the module's coded tensors have other names, dtypes or shapes than those of the file"
REFUSED = [
    ("network", "wider", STRUCTURE),
    ("network", "half", STRUCTURE),
    ("network", "renamed", STRUCTURE),
    ("network", "deeper", "expected a stream of the module's 10 coded tensors, found one of 8"),
    ("network", "shallower", "expected a stream of the module's 6 coded tensors, found one of 8"),
    ("network", "buffer", "norm.running_mean: expected shape (5,), found (4,)"),
    ("tensor", "wider", "head.weight: expected shape (6, 10), found (5, 10)"),
    ("tensor", "deeper", f"{DIFFERS}extra.bias, extra.weight"),
    ("tensor", "shallower", f"{DIFFERS}norm.bias, norm.num_batches_tracked, norm.running_mean, "),
    ("tensor", "renamed", f"{DIFFERS}head.bias, head.weight, last.bias, last.weight"),
    ("tensor", "variational", DIFFERS),
]


@pytest.mark.parametrize(("streams", "other", "message"), REFUSED)
def test_a_file_of_another_module_is_refused_and_the_module_stays(
    streams: str, other: str, message: str, saved: Callable[[str], bytes], tmp_path: Path
) -> None:
    (tmp_path / "net.safetensors").write_bytes(saved(streams))
    model = OTHERS[other]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError) as raised:
        miracle_hub.load(tmp_path / "net.safetensors", model)
    assert str(raised.value).startswith(f"{tmp_path / 'net.safetensors'}: ")
    assert message in str(raised.value)
    assert "load it into the module that it was made from" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("streams", ["tensor", "network"])
def test_every_truncation_and_every_flipped_byte_of_what_is_coded_is_found(
    streams: str, saved: Callable[[str], bytes], tmp_path: Path
) -> None:
    data, path = saved(streams), tmp_path / "net.safetensors"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            miracle_hub.load(path, conv_net())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    for name, entry in header.items():
        if entry["dtype"] == "U8":
            first, last = (start + at for at in entry["data_offsets"])
            for at in (first, first + 5, first + 12, last - 1):
                path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
                is_frame = at < first + 9  # which the file's guard covers, whatever its name
                with pytest.raises(
                    FormatError, match=str(path) if streams == "network" or is_frame else name
                ):
                    miracle_hub.load(path, conv_net())


def test_files_that_lack_the_stream_or_hold_half_of_it_are_named(
    saved: Callable[[str], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(saved("network"))
    tensors = load_file(path)
    stream = tensors.pop("miracle")
    save_file(tensors, path)
    with pytest.raises(
        FormatError, match="expected the tensors of ConvNet, found one that differs in conv.bias, "
    ):
        miracle_hub.load(path, conv_net())
    save_file({**tensors, "miracle": stream[:-1]}, path)
    with pytest.raises((TruncatedPayloadError, ChecksumError)):
        miracle_hub.load(path, conv_net())
    with pytest.raises(FormatError, match=f"^{tmp_path / 'no'}: expected a safetensors file"):
        miracle_hub.load(tmp_path / "no", conv_net())


def test_only_a_coded_model_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(
        OptionError, match="^model: expected a variational model, found ConvNet without posteriors"
    ):
        miracle_hub.save(conv_net(), path)
    model = variational_net(streams="network")
    with pytest.raises(
        OptionError, match="^conv.weight: expected a coded stream, found one that is not; call "
    ):
        miracle_hub.save(model, path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named_and_the_file_before_stays(tmp_path: Path) -> None:
    model, path = coded(streams="network"), tmp_path / "net.safetensors"
    with pytest.raises(OutputWriteError, match=f"{tmp_path / 'no'}.*cannot be written: No such file"):
        miracle_hub.save(model, tmp_path / "no" / "net.safetensors")
    miracle_hub.save(model, path)
    before = path.read_bytes()
    strange: Any = model
    strange.register_buffer("strange", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(FormatError, match="^strange: expected one of .*, found torch.complex64; "):
        miracle_hub.save(model, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_is_read_back_must_be_what_was_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded(streams="network")

    def otherwise(path: Path, module: nn.Module) -> dict[str, Tensor]:
        state = read_state(path, module)
        return {**state, "head.bias": state["head.bias"] + 1}

    monkeypatch.setattr("miracle_hub.finetune.models.read_state", otherwise)
    with pytest.raises(
        ChecksumError, match="head.bias: what was written does not decode to the model's weights"
    ):
        miracle_hub.save(model, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_keywords_a_config_and_transformers_config_make_the_same_model() -> None:
    options: Any = {"rate": 3.0, "window_bits": 6, "modules_to_save": ["head"]}
    models = [
        miracle_hub.make_variational(conv_net(), **options),
        miracle_hub.make_variational(conv_net(), VariationalConfig(**options)),
        miracle_hub.make_variational(conv_net(), MiracleConfig(**options)),
    ]
    configs = [variational_of(model).config for model in models]
    assert configs[0] == configs[1] == configs[2] == VariationalConfig(**options)
    for arguments, keywords in (((), {}), ((VariationalConfig(rate=1.0),), options)):
        with pytest.raises(
            OptionError, match="^make_variational: expected either a config or options as keywords; "
        ):
            miracle_hub.make_variational(conv_net(), *arguments, **keywords)
    with pytest.raises(OptionError, match="^make_variational: expected options among .*, found 'rte'; "):
        miracle_hub.make_variational(conv_net(), rte=1.0)


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    layers: Any = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return BertForSequenceClassification(BertConfig(**sizes, **layers, max_position_embeddings=16))


@pytest.mark.parametrize(
    ("kind", "auto"), [("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModelForSequenceClassification")]
)
def test_a_coded_transformers_model_loads_with_plain_from_pretrained(
    kind: str, auto: str, tmp_path: Path
) -> None:
    model = tiny(kind)
    some: Any = {"modules_to_save": ["classifier"], "exclude_modules": ["pooler"]} if kind == "bert" else {}
    miracle_hub.make_variational(model, rate=2.0, window_bits=8, **some)
    miracle_hub.code_model(model, options=CodingOptions(groups=2), progress=False)
    report = miracle_hub.compress_model(model, tmp_path / "out", progress=False)
    assert report.compressed_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    names = {tensor.name for tensor in open_repository(tmp_path / "out").tensors if tensor.is_coded}
    assert names == {member.name for stream in streams_of(model) for member in stream.members}
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "out").eval()
    dense = miracle_hub.posterior_mean(model.eval())
    for name, tensor in dense.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokens = torch.arange(8).view(1, 8)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(OutputExistsError):
        miracle_hub.compress_model(model, tmp_path / "out", progress=False)


def test_a_repository_needs_a_coded_model_with_a_stream_per_tensor(tmp_path: Path) -> None:
    model = miracle_hub.make_variational(tiny("bert"), rate=2.0, window_bits=8)
    with pytest.raises(
        OptionError, match="embeddings.weight: expected a coded stream, found one that is not; "
    ):
        miracle_hub.compress_model(model, tmp_path / "out", progress=False)
    one = miracle_hub.make_variational(tiny("bert"), rate=2.0, window_bits=8, streams="network")
    with pytest.raises(
        OptionError, match="^streams: expected 'tensor' for a repository, found 'network'; use save"
    ):
        miracle_hub.compress_model(one, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_payloads_of_tensor_streams_are_ordinary_payloads(
    saved: Callable[[str], bytes], tmp_path: Path
) -> None:
    """Whoever reads compressed repositories reads them too."""
    (tmp_path / "model.safetensors").write_bytes(saved("tensor"))
    fresh = miracle_hub.load(tmp_path / "model.safetensors", conv_net())
    found = miracle_hub.load_state_dict(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(found) == set(fresh.state_dict())
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(found[name], tensor), name
