"""Buffers keep every bit in transformers and every verb; compress, verify and push agree on infinities."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import miracle_hub
from miracle_hub.codec.report import Report
from miracle_hub.errors import NonFiniteWeightError
from miracle_hub.plugin.roles import roles_of
from tests import forks

CAUSAL = torch.tril(torch.ones(64, 64))


class MaskedConfig(PreTrainedConfig):
    model_type = "masked"


class Masked(PreTrainedModel):
    """A layer beside buffers of many dtypes, as nanoGPT and its kind save them."""

    config_class = MaskedConfig
    base_model_prefix = "masked"

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(64, 64)
        for name, buffer in self.made().items():
            self.register_buffer(name, buffer)
        self.post_init()

    def made(self) -> dict[str, Tensor]:
        """The buffers as they are built."""
        return {
            "mask": CAUSAL.clone(),
            "infinite": torch.full((64, 64), -torch.inf).triu(1),
            "truth": CAUSAL.bool(),
            "places": torch.arange(500)[None],
            "bytes": CAUSAL.byte(),
            "row_of_bytes": (torch.arange(900) % 3).byte(),
            "short": torch.arange(300).short(),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.mask  # pyright: ignore[reportOperatorIssue]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    model = Masked(MaskedConfig())
    model.save_pretrained(folder / "dense")
    return folder, miracle_hub.compress(
        folder / "dense", folder / "out", bits_per_weight=0.8, window_bits=8, progress=False
    )


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_load_as_from_the_dense_model(
    masked: tuple[Path, Report], keep: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, report = masked
    assert set(report.exact) == {"mask", "infinite", "truth", "places", "bytes", "row_of_bytes", "short"}
    options: dict[str, Any] = {"dtype": dtype}
    dense = Masked.from_pretrained(folder / "dense", **options)
    config = miracle_hub.MiracleConfig(keep_compressed=keep)
    found = Masked.from_pretrained(folder / "out", quantization_config=config, **options)
    for name, buffer in buffers(dense).items():
        ours = buffers(found)[name]
        assert ours.dtype == buffer.dtype and torch.equal(ours, buffer), name
    if keep:
        found.save_pretrained(tmp_path / "again")
        again = Masked.from_pretrained(tmp_path / "again", **options)
        assert all(torch.equal(buffers(again)[name], buffer) for name, buffer in buffers(dense).items())


def test_buffers_decompress_and_verify_to_the_same_bits(masked: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = masked
    miracle_hub.verify(folder / "out", dense=folder / "dense").require()
    miracle_hub.decompress(folder / "out", tmp_path / "dense", progress=False)
    source, found = (load_file(at / "model.safetensors") for at in (folder / "dense", tmp_path / "dense"))
    for name in source.keys() - {"layer.weight", "layer.bias"}:
        assert found[name].dtype == source[name].dtype and torch.equal(found[name], source[name]), name
    reports = {tensor.name: tensor for tensor in miracle_hub.inspect(folder / "out").tensors}
    assert reports["mask"].codec == "exact" and reports["mask"].reason == "every bit kept, in fewer bytes"
    assert reports["mask"].n_bytes < 200


def test_a_reader_of_before_refuses_a_repository_with_exact_tensors(masked: tuple[Path, Report]) -> None:
    """By its version; and a file alone by its guard, in which other bytes stood for a payload."""
    program = (
        "import sys; import miracle_hub.code as code; code.FORMAT_VERSION = 2\n"
        "from miracle_hub.codec import payloads; del payloads.CODECS[b'MRCX']\n"
        "from miracle_hub.codec.decompress import load_state_dict\n"
        "from miracle_hub.errors import MiracleError\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_state_dict(path); print('read')\n"
        "    except MiracleError as error: print(type(error).__name__)\n"
    )
    out = masked[0] / "out"
    done = forks.run(program, out, out / "model.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["UnsupportedVersionError", "ChecksumError"]


def test_the_class_says_which_tensors_are_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "model")
    roles = roles_of(tmp_path / "model")
    assert roles.said_by == "ResNetForImageClassification"
    assert roles.buffers == set(dict(model.named_buffers()))
    assert roles.parameters == set(dict(model.named_parameters()))


def test_a_class_that_cannot_be_asked_is_reported_and_values_decide(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of nobody", "architectures": ["Nothing"]}')
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert roles_of(tmp_path).said_by.startswith("values alone: ValueError: ")
    (tmp_path / "config.json").write_text("[]")
    assert roles_of(tmp_path).said_by.startswith("values alone: ")
    (tmp_path / "config.json").unlink()
    assert roles_of(tmp_path).said_by == "values alone: there is no config.json"


def test_names_of_older_checkpoints_and_of_bases_are_found(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(file).items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(tensors, file, {"format": "pt"})
    roles = roles_of(tmp_path)
    assert roles.buffers == {"bert.embeddings.position_ids"}
    assert roles.buffers | roles.parameters == tensors.keys()


def test_a_dtype_that_cannot_hold_weights_is_said(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertModel(config)
    model.pooler.dense.weight.data.mul_(1e7)  # pyright: ignore[reportOptionalMemberAccess]
    model.save_pretrained(tmp_path / "dense")
    miracle_hub.compress(
        tmp_path / "dense", tmp_path / "out", bits_per_weight=6, window_bits=8, progress=False
    )
    with pytest.warns(
        UserWarning, match=r"in 1 tensors, which became infinite: pooler.dense.weight; load with"
    ):
        AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float16)
    AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)


NAN, INF = torch.tensor(torch.nan), torch.tensor(torch.inf)
# What a tensor holds, whether it is left out by the user, and whether that is taken.
SWEEP: dict[str, tuple[Tensor, bool, bool]] = {
    "a weight with NaN": (torch.randn(64, 64).index_put((torch.tensor(3),), NAN), False, False),
    "a weight with infinity": (torch.randn(64, 64).index_put((torch.tensor(3),), INF), False, False),
    "a small weight with NaN": (torch.randn(8, 8).index_put((torch.tensor(3),), NAN), False, False),
    "a bias with infinity": (torch.randn(64).index_put((torch.tensor(3),), INF), False, False),
    "an infinite scalar": (INF.clone(), False, False),
    "a mask of -inf": (torch.full((64, 64), -torch.inf).triu(1), False, True),
    "a small mask of -inf": (torch.full((8, 8), -torch.inf).triu(1).half(), False, True),
    "a mask of -inf and NaN": (torch.full((64, 64), -torch.inf).triu(1) * NAN, False, False),
    "a mask in bfloat16": (torch.full((1, 1, 40, 40), -torch.inf).triu(1).bfloat16(), False, True),
    "edges of bins": (torch.cat([torch.arange(40.0).square(), INF[None]]), False, True),
    "a weight with NaN that is left out": (
        torch.randn(64, 64).index_put((torch.tensor(3),), NAN),
        True,
        True,
    ),
    "a mask that is left out": (torch.full((64, 64), -torch.inf).triu(1), True, True),
}


@pytest.mark.parametrize("name", SWEEP)
def test_compress_verify_and_push_agree_on_what_is_not_finite(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, is_left_out, is_taken = SWEEP[name]
    source, out = tmp_path / "dense", tmp_path / "out"
    source.mkdir()
    save_file({"w": torch.randn(64, 64), "other": tensor}, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text('{"model_type": "of nobody"}')
    options: dict[str, Any] = {"modules_to_not_convert": ["other"]} if is_left_out else {}
    n_bytes = 3000 + tensor.numel() * tensor.element_size() * is_left_out

    def compress() -> None:
        miracle_hub.compress(source, out, size=n_bytes, window_bits=8, progress=False, **options)

    if not is_taken:
        with pytest.raises(NonFiniteWeightError, match=r"^other: expected finite weights, found"):
            compress()
        return
    compress()
    found = miracle_hub.load_state_dict(out)["other"]
    assert torch.equal(found.nan_to_num(7), tensor.nan_to_num(7))
    miracle_hub.verify(out, dense=source).require()
    monkeypatch.setattr("miracle_hub.hub.push.write_plots", lambda *_: ())

    class Uploaded(Exception):
        pass

    def upload(*args: Any, **kwargs: Any) -> None:
        raise Uploaded

    monkeypatch.setattr("miracle_hub.hub.push.upload", upload)
    with pytest.raises(Uploaded):
        miracle_hub.push(out, "user/name")


def test_verify_takes_infinite_masks_of_repositories_without_a_list(
    masked: tuple[Path, Report], tmp_path: Path
) -> None:
    """As they were written before; NaN is in no list, and in no constant."""
    shutil.copytree(masked[0] / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"].pop("non_finite") == ["infinite"]
    del config["quantization_config"]["guard"]["config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    miracle_hub.verify(tmp_path / "out", dense=masked[0] / "dense").require()


def test_a_buffer_of_the_class_may_hold_anything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    name, buffer = next((n, b) for n, b in model.named_buffers() if n.endswith("running_var"))
    buffer.fill_(torch.nan)
    model.save_pretrained(tmp_path / "dense")
    miracle_hub.compress(
        tmp_path / "dense", tmp_path / "out", bits_per_weight=9, window_bits=8, progress=False
    )
    assert bool(miracle_hub.load_state_dict(tmp_path / "out")[name].isnan().all())
    miracle_hub.verify(tmp_path / "out", dense=tmp_path / "dense").require()
