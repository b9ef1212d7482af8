"""Adapters of PEFT, smaller: through PEFT and transformers as ever, and loud without the plug-in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import miracle_hub
from miracle_hub.codec import adapter as coding
from miracle_hub.codec.adapter import why_not_balanced
from miracle_hub.codec.detector import detect
from miracle_hub.codec.factors import squared, squared_distance
from miracle_hub.codec.kinds import Kind
from miracle_hub.errors import ChecksumError, FormatError, OptionError, SourceError, SourceKindError

from .here import UPLOADS_WARN, use_here
from .loopback import LoopbackHub
from .loopback_parts import TOKEN
from .test_loading import assert_same
from .test_plugin import run

pytestmark = [
    UPLOADS_WARN,
    # PEFT asks transformers for an attribute of an older name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning"),
]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = torch.arange(16).view(2, 8)
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    sizes: Any = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 160}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(**sizes, intermediate_size=256, max_position_embeddings=8)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def model_of(base: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(base).eval()


@pytest.fixture
def save(base: Path, tmp_path: Path) -> Save:
    """Writes an adapter as PEFT does after some training: no tensor of it is as it began."""

    def saved(name: str = "adapter", kind: Any = peft.LoraConfig, **options: Any) -> Path:
        given = {"target_modules": ["query", "value"], **({"r": 8} if kind is peft.LoraConfig else {})}
        model = peft.get_peft_model(model_of(base), kind(**{**given, **options}))
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    decay = 0.5 ** torch.arange(parameter.shape[-1] if parameter.shape[-1] <= 8 else 1)
                    parameter += 0.1 * decay * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return saved


def compressed(source: Path, bits: float = 4, **options: Any) -> Path:
    given: Any = {"bits_per_weight": bits, "window_bits": 8, "progress": False, **options}
    miracle_hub.compress(source, source.with_name(f"{source.name}-small"), **given)
    return source.with_name(f"{source.name}-small")


def decompressed(folder: Path) -> Path:
    miracle_hub.decompress(folder, folder.with_name(f"{folder.name}-dense"), progress=False)
    return folder.with_name(f"{folder.name}-dense")


def pairs(state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """B and A of every layer."""
    found = [name for name in sorted(state) if re.search("lora_(embedding_)?A", name)]
    return [(state[re.sub("(lora_(?:embedding_)?)A", r"\1B", name)], state[name]) for name in found]


def error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Squared error of all products over their square."""
    both = list(zip(pairs(one), pairs(other), strict=True))
    return sum(squared_distance(*two) for two in both) / sum(squared(*two[0]) for two in both)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


# What each process does: both readers, and what either made of the factors.
_LOAD = """
import hashlib
from peft import PeftModel
from transformers import AutoModelForSequenceClassification as Auto
def tell(model):
    state = {{n.removeprefix("base_model.model."): t for n, t in model.state_dict().items() if "lora_" in n}}
    values = b"".join(t.numpy().tobytes() for _, t in sorted(state.items()))
    print("loaded", len(state), hashlib.sha256(values).hexdigest())
for load in (
    lambda: PeftModel.from_pretrained(Auto.from_pretrained({base!r}), {folder!r}),
    lambda: (model := Auto.from_pretrained({base!r}), model.load_adapter({folder!r}))[0],
    lambda: Auto.from_pretrained({folder!r}),
):
    try:
        tell(load())
    except RuntimeError as error:
        print("refused", "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error))
"""
_HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "miracle_hub":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def test_the_user_imports_nothing_of_this_package_and_without_it_all_is_refused(
    base: Path, save: Save, tmp_path: Path
) -> None:
    small = compressed(save())
    dense = decompressed(small)
    loads = {folder: _LOAD.format(base=str(base), folder=str(folder)) for folder in (small, dense)}
    expected = run(loads[dense], tmp_path)
    assert expected.returncode == 0, expected.stderr
    assert re.fullmatch(r"(loaded 4 [0-9a-f]{64}\n)\1\1", expected.stdout)
    assert run(loads[small], tmp_path).stdout == expected.stdout
    hidden = run(_HIDDEN + loads[small], tmp_path, "-I", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert hidden.stdout == 3 * "refused True\n", hidden.stderr


@pytest.mark.parametrize("first", ["import peft, miracle_hub", "import miracle_hub, peft"])
def test_without_autoloading_one_import_is_enough(first: str, base: Path, save: Save, tmp_path: Path) -> None:
    load = _LOAD.format(base=str(base), folder=str(compressed(save())))
    done = run(first + load, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout.count("loaded 4") == 3, done.stderr


# Options of a LoraConfig → how many pairs are balanced.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "odd rank": ({"r": 11}, 2),
    "ranks of layers": ({"rank_pattern": {"value": 16}, "alpha_pattern": {"query": 3}}, 2),
    "a head beside it": ({"task_type": "SEQ_CLS"}, 2),
    "a matrix beside it": ({"modules_to_save": ["pooler"]}, 2),
    "DoRA": ({"use_dora": True}, 2),
    "rank-stabilized": ({"use_rslora": True}, 2),
    "words": ({"target_modules": ["word_embeddings", "query"]}, 2),
    "tokens": ({"trainable_token_indices": {"word_embeddings": [1, 2]}}, 2),
    "few weights": ({"r": 2, "rank_pattern": {"value": 24}}, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_lora_is_loaded_as_it_decompresses(name: str, base: Path, save: Save) -> None:
    options, n_pairs = KINDS[name]
    source = save(**options)
    small = compressed(source, 8)
    found = miracle_hub.load_state_dict(small)
    state = load_file(source / FILE)
    specs = [{n: (t.shape, t.dtype) for n, t in tensors.items()} for tensors in (found, state)]
    assert specs[0] == specs[1]
    folders = (small, decompressed(small))
    models = [peft.PeftModel.from_pretrained(model_of(base), folder) for folder in folders]
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert_same({k: v.contiguous() for k, v in peft.get_peft_model_state_dict(models[0]).items()}, found)
    assert error(state, found) < 0.02
    dense = peft.PeftModel.from_pretrained(model_of(base), source)
    torch.testing.assert_close(logits(models[0]), logits(dense), rtol=0.05, atol=0.05)
    for model, folder in zip(plain := [model_of(base), model_of(base)], folders, strict=True):
        model.load_adapter(str(folder))
    assert_same(plain[0].state_dict(), plain[1].state_dict())
    assert coded_pairs(source) == n_pairs


def coded_pairs(source: Path) -> int:
    report = miracle_hub.compress(
        source, source.with_name("again"), bits_per_weight=8, window_bits=8, progress=False
    )
    (note,) = report.notes
    said = re.fullmatch(r"(\d+) pairs of factors, balanced; of their products, relative error² \S+", note)
    assert said is not None
    return int(said[1])


def test_the_report_has_the_error_of_the_products_which_is_less_by_balancing(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(target_modules=["query", "value", "dense"])
    options: Any = {"size": "9kB", "window_bits": 8, "progress": False}
    report = miracle_hub.compress(source, source.with_name("balanced"), **options)
    state = load_file(source / FILE)
    found = error(state, miracle_hub.load_state_dict(source.with_name("balanced")))
    assert float(report.notes[0].rpartition(" ")[2]) == pytest.approx(found, rel=1e-3)
    monkeypatch.setattr(coding, "why_not_balanced", lambda config: "to compare")
    miracle_hub.compress(source, source.with_name("as-trained"), **options)
    as_trained = error(state, miracle_hub.load_state_dict(source.with_name("as-trained")))
    assert found < 0.8 * as_trained


def test_the_size_is_met_and_the_file_is_a_part_of_a_16_bit_one(save: Save) -> None:
    source = save(target_modules=["query", "value", "dense"])
    n_bytes = 2 * sum(tensor.numel() for tensor in load_file(source / FILE).values())
    small = compressed(source, None, size=n_bytes // 2)  # pyright: ignore[reportArgumentType]
    assert 0.99 * (n_bytes // 2) < (small / FILE).stat().st_size <= n_bytes // 2
    assert sorted(path.name for path in small.iterdir()) == ["README.md", CONFIG, FILE]
    assert (small / CONFIG).read_bytes() == (source / CONFIG).read_bytes()


@pytest.mark.parametrize("kind", [peft.AdaLoraConfig, peft.LoHaConfig])
def test_adapters_of_other_kinds_are_coded_as_they_are(kind: Any, base: Path, save: Save) -> None:
    options: dict[str, Any] = {"init_r": 8, "total_step": 9} if kind is peft.AdaLoraConfig else {"r": 8}
    source = save(kind=kind, **options)
    report = miracle_hub.compress(source, source.with_name("small"), bits_per_weight=8, progress=False)
    (note,) = report.notes
    assert note.startswith("factors of LoRA stay as they are, not balanced: peft_type ")
    found, state = miracle_hub.load_state_dict(source.with_name("small")), load_file(source / FILE)
    assert all(float((found[k] - v).norm() / v.norm()) < 0.05 for k, v in state.items())
    model = peft.PeftModel.from_pretrained(model_of(base), source.with_name("small"))
    assert_same({k: v.contiguous() for k, v in peft.get_peft_model_state_dict(model).items()}, found)


@pytest.mark.parametrize("name", ["target_parameters", "use_bdlora", "kasa_config", "of_tomorrow"])
def test_options_by_which_more_than_the_product_counts_keep_factors(name: str, save: Save) -> None:
    config = json.loads((save() / CONFIG).read_text())
    assert why_not_balanced(config) == ""
    assert why_not_balanced({**config, name: ["x"]}) == f"adapter_config.json has {name}"


def test_two_adapters_take_turns_on_one_model(base: Path, save: Save) -> None:
    small = [compressed(save(name)) for name in ("one", "another")]
    dense = [decompressed(folder) for folder in small]
    found, states = [], []
    for one, another in (small, dense):
        model = peft.PeftModel.from_pretrained(model_of(base), one, adapter_name="one")
        model.load_adapter(str(another), adapter_name="another")
        for name in ("one", "another"):
            model.set_adapter(name)
            found.append(logits(model))
        transformed = model_of(base)
        for name, folder in (("one", one), ("another", another)):
            transformed.load_adapter(str(folder), adapter_name=name)
        states.append(transformed.state_dict())
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    assert_same(*states)


def test_it_is_merged_and_saved_again_as_a_dense_adapter(base: Path, save: Save, tmp_path: Path) -> None:
    small = compressed(save())
    model = peft.PeftModel.from_pretrained(model_of(base), small)
    model.save_pretrained(str(tmp_path / "again"))
    assert detect(tmp_path / "again").kind is Kind.PEFT
    assert_same(load_file(tmp_path / "again" / FILE), miracle_hub.load_state_dict(small))
    expected = logits(model)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    options: Any = {"base": base, "size": "12kB", "calibrate": None, "progress": False}
    report = miracle_hub.compress(tmp_path / "merged", tmp_path / "delta", **options)
    assert report.n_differing == 2


def test_base_and_adapter_may_both_be_compressed(base: Path, save: Save, tmp_path: Path) -> None:
    miracle_hub.compress(base, tmp_path / "base", bits_per_weight=8, window_bits=8, progress=False)
    small, found = compressed(save()), []
    for adapter, model in (
        (small, tmp_path / "base"),
        (decompressed(small), decompressed(tmp_path / "base")),
    ):
        config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(model)}
        (adapter / CONFIG).write_text(json.dumps(config))
        found.append(BertForSequenceClassification.from_pretrained(adapter).state_dict())
    assert_same(*found)


def test_a_dense_adapter_passes_through(base: Path, save: Save) -> None:
    source = save()
    model = peft.PeftModel.from_pretrained(model_of(base), source)
    assert_same(dict(peft.get_peft_model_state_dict(model)), load_file(source / FILE))


def test_what_is_left_out_stays_bit_for_bit(save: Save) -> None:
    source = save(modules_to_save=["pooler"])
    small = compressed(source, 28, modules_to_not_convert=["pooler.dense.weight", "query.lora_A.weight"])
    found, state = miracle_hub.load_state_dict(small), load_file(source / FILE)
    kept = [name for name in state if "pooler.dense.weight" in name or "query.lora_A" in name]
    assert len(kept) == 2 and all(torch.equal(found[name], state[name]) for name in kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": 2}, "stages: expected 1 for an adapter"),
        ({"base": "elsewhere"}, "base: expected none for an adapter.*merge_and_unload"),
        ({"calibrate": "texts.txt"}, "calibrate: expected none for an adapter"),
        ({"work": "work"}, "work: expected none"),
        ({"max_shard_size": "1kB"}, "max_shard_size: expected room for all of an adapter"),
    ],
    ids=str,
)
def test_options_of_models_are_refused(options: dict[str, Any], said: str, save: Save) -> None:
    source = save()
    with pytest.raises(OptionError, match=said):
        compressed(source, **options)
    assert not source.with_name("adapter-small").exists()


def test_every_verb_takes_it_or_says_why_not(save: Save, run: Any, tmp_path: Path) -> None:
    source = save()
    status, said, errors = run("compress", source, tmp_path / "small", "--bits-per-weight", 4)
    assert status == 0, errors
    assert "2 pairs of factors, balanced" in said
    small = tmp_path / "small"
    assert detect(small).kind is Kind.CODED_ADAPTER
    assert run("verify", small)[0] == 0
    inspection = miracle_hub.inspect(small)
    assert len(inspection.tensors) == 4 and inspection.file_bytes == (small / FILE).stat().st_size
    assert run("decompress", small, tmp_path / "dense")[0] == 0
    assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == [CONFIG, FILE]
    assert_same(load_file(tmp_path / "dense" / FILE), miracle_hub.load_state_dict(small))
    with pytest.raises(OptionError, match="dense: expected none for an adapter"):
        miracle_hub.verify(small, dense=source)
    with pytest.raises(SourceKindError, match="found a compressed adapter of PEFT.*decompress it first"):
        miracle_hub.compress(small, tmp_path / "twice", bits_per_weight=4)
    for verb in (
        lambda: miracle_hub.fit(small, tmp_path / "fit", data="none.tsv", rate=1.0),
        lambda: miracle_hub.compare(small, small, data="none.txt"),
        lambda: miracle_hub.certify(small, data="none.tsv", fitted=True),
    ):
        with pytest.raises(SourceError, match=r"expected .*, found .*; "):
            verb()


def test_it_is_pushed_with_a_card_that_names_its_base(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(task_type="SEQ_CLS")
    config = json.loads((source / CONFIG).read_text()) | {"base_model_name_or_path": "org/base"}
    (source / CONFIG).write_text(json.dumps(config))
    small = compressed(source)
    with LoopbackHub() as hub:
        use_here(hub, monkeypatch)
        report = miracle_hub.push(small, "user/small", token=TOKEN)
        assert report.n_files >= 3
    card = ModelCard.load(small / "README.md")
    head = card.data.to_dict()
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "adapter")
    assert head["library_name"] == "peft"
    assert "An adapter of [org/base]" in card.text
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("user/small")' in card.text


def test_a_local_base_is_not_told_to_strangers(save: Save) -> None:
    small = compressed(save())
    assert "base_model" not in ModelCard.load(small / "README.md").data.to_dict()


def damaged(folder: Path, at: Callable[[bytes], int]) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[at(bytes(data))] ^= 1
    (folder / FILE).write_bytes(bytes(data))


@pytest.mark.parametrize(
    "at", [lambda data: len(data) - 1, lambda data: data.index(b"MRCL") + 20], ids=["message", "header"]
)
def test_damage_is_found_by_both_readers(at: Callable[[bytes], int], base: Path, save: Save) -> None:
    small = compressed(save())
    damaged(small, at)
    with pytest.raises(FormatError):
        peft.PeftModel.from_pretrained(model_of(base), small)
    with pytest.raises(FormatError):
        model_of(base).load_adapter(str(small))
    assert miracle_hub.verify(small).defects


def test_a_factor_of_another_adapter_is_found(base: Path, save: Save) -> None:
    """Payloads are sound by themselves: the guard has which of them are together."""
    files = [compressed(save(name)) / FILE for name in ("one", "another")]
    states = [load_file(path) for path in files]
    name = next(iter(states[0]))
    with safe_open(files[0], "pt") as file:
        metadata = file.metadata()
    save_file({**states[0], name: states[1][name]}, files[0], metadata)
    with pytest.raises(ChecksumError, match="guard"):
        peft.PeftModel.from_pretrained(model_of(base), files[0].parent)


@pytest.mark.parametrize("text", ["{", "[]", '"LORA"'])
def test_a_config_that_is_none_is_refused(text: str, save: Save, tmp_path: Path) -> None:
    source = save()
    (source / CONFIG).write_text(text)
    with pytest.raises(SourceError, match=r"adapter_config\.json: expected "):
        compressed(source)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_names_that_lie_about_factors_are_coded_as_they_are(save: Save) -> None:
    source = save()
    state = load_file(source / FILE)
    generator = torch.Generator().manual_seed(0)
    state["odd.lora_A.weight"] = torch.randn(40, 32, generator=generator)
    state["odd.lora_B.weight"] = torch.randn(32, 41, generator=generator)
    state["alone.lora_A.weight"] = torch.randn(40, 32, generator=generator)
    save_file(state, source / FILE)
    small = compressed(source, 8)
    found = miracle_hub.load_state_dict(small)
    assert all(float((found[n] - state[n]).norm() / state[n].norm()) < 0.05 for n in state if "bert" not in n)


def test_factors_that_float16_cannot_hold_balanced_stay_as_they_are(save: Save) -> None:
    source = save()
    state = {name: tensor.half() for name, tensor in load_file(source / FILE).items()}
    generator = torch.Generator().manual_seed(0)
    (a,) = (tensor for name, tensor in state.items() if "query.lora_A" in name)
    (b,) = (tensor for name, tensor in state.items() if "query.lora_B" in name)
    a[:, 0] = 20000 + 10000 * torch.rand(8, generator=generator).half()
    b.copy_(20000 + 10000 * torch.rand(b.shape, generator=generator))
    save_file(state, source / FILE)
    found = miracle_hub.load_state_dict(compressed(source, 8))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert coded_pairs(source) == 1
