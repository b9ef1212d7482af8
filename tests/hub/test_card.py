"""Model cards state what was measured, and have no line of what was not."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from miracle_hub.codec.verification import verify_folder
from miracle_hub.errors import DataError
from miracle_hub.hub import card
from miracle_hub.hub.card import auto_class, carried_facts, stale_card, update_card
from miracle_hub.hub.facts import CardFacts, Evaluation

ROOT = Path(__file__).parents[2]
LEAST = CardFacts(n_bytes=1650, sha256="5a" * 32)
ALL = CardFacts(
    n_bytes=1650,
    sha256="5a" * 32,
    n_weights=431_080,
    digest="0123456789abcdef",
    code="windows of 16 bits",
    seed=0,
    dense_bytes=1_724_320,
    versions={"miracle-hub": "0.1.0"},
    hardware="one core",
    evaluations=(
        Evaluation("MNIST test error, %", 0.9, 0.8, "python lenet.py"),
        Evaluation("pruned, %", 1.5),
    ),
    certificate="With probability 0.95, the error is at most 3 %.",
    limits=("Digits only.",),
    plots=("plots/kl_per_group.png",),
)


def written(folder: Path, facts: CardFacts) -> ModelCard:
    update_card(folder, facts, name="LeNet", repo_id="user/lenet", usage="model = load()")
    return ModelCard.load(folder / "README.md")


def test_every_fact_has_its_line(tmp_path: Path) -> None:
    text = written(tmp_path, ALL).text
    for line in (
        "# LeNet, 0.03 bits per weight",
        "1,650 bytes of weights instead of 1,724,320, 0.0306 bits per weight",
        "| weights | 431,080 |",
        "| bytes, dense | 1,724,320 (1045.04 times as many) |",
        "| bits per weight, whole file | 0.0306 |",
        "| code | windows of 16 bits |",
        "| seed | 0 |",
        "| digest of the decoded tensors | `0123456789abcdef` |",
        f"| SHA-256 of the weight files | `{ALL.sha256}` |",
        "| written by | miracle-hub 0.1.0 |",
        "| hardware | one core |",
        "- MNIST test error, %: 0.8 before, 0.9 after (repeated by `python lenet.py`)",
        "- pruned, %: 1.5",
        "With probability 0.95, the error is at most 3 %.",
        "- Digits only.",
        "![kl per group](plots/kl_per_group.png)",
        "pip install miracle-hub",
        "model = load()",
    ):
        assert line in text, line


def test_what_nobody_measured_has_no_line(tmp_path: Path) -> None:
    text = written(tmp_path, LEAST).text
    rows = [line for line in text.splitlines() if line.startswith("| ") and line != "| | |"]
    assert rows == ["| bytes | 1,650 |", f"| SHA-256 of the weight files | `{LEAST.sha256}` |"]
    for word in ("None", "nan", "instead of", "bits per weight", "Limits", "Evaluation", "![", "dense"):
        assert word not in text
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {"tags": ["compressed", "miracle"]}


@pytest.mark.parametrize("name", ["hardware", "evaluations", "certificate", "limits", "plots", "seed"])
def test_a_fact_that_goes_takes_its_line_with_it_and_no_other(name: str, tmp_path: Path) -> None:
    empty = {"seed": None, "hardware": "", "certificate": ""}.get(name, ())
    full = set(written(tmp_path, ALL).text.splitlines())
    less = set(written(tmp_path, replace(ALL, **{name: empty})).text.splitlines())
    assert less < full and len(full - less) <= 3


def test_facts_travel_in_the_head_of_the_card_for_the_same_files_only(tmp_path: Path) -> None:
    written(tmp_path, ALL)
    own = replace(LEAST, n_weights=431_080)
    found = carried_facts(tmp_path, own)
    assert found.evaluations == ALL.evaluations and found.certificate == ALL.certificate
    assert found.limits == ALL.limits and found.versions == ALL.versions and found.hardware == "one core"
    other = replace(own, sha256="00" * 32)
    assert carried_facts(tmp_path, other) == other


def test_a_strangers_facts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="here: expected numbers in before and after, found"):
        LEAST.with_carried({"evaluations": [{"what": "x", "after": "best"}]}, "here")
    (tmp_path / "README.md").write_text("---\nmiracle: {hardware: [1]}\n---\n")
    with pytest.warns(UserWarning, match="the card is written without them"):
        assert carried_facts(tmp_path, LEAST) == LEAST


def test_a_card_is_written_twice_like_once(tmp_path: Path) -> None:
    written(tmp_path, ALL)
    once = (tmp_path / "README.md").read_text()
    written(tmp_path, ALL)
    assert (tmp_path / "README.md").read_text() == once


def test_a_card_of_other_weights_is_stale(tmp_path: Path) -> None:
    assert stale_card(tmp_path, verify_folder(tmp_path)) == ""
    written(tmp_path, ALL)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert "README.md: expected weight files of SHA-256 5a5a" in stale_card(tmp_path, verify_folder(tmp_path))


def test_the_class_that_loads_a_model_follows_from_its_architecture() -> None:
    assert auto_class("LlamaForCausalLM") == auto_class("GPT2LMHeadModel") == "AutoModelForCausalLM"
    assert auto_class("BertModel") == auto_class("") == "AutoModel"


def test_the_template_is_that_of_the_repositorys_cards() -> None:
    assert (ROOT / "model_cards" / "template.md").read_bytes() == card.TEMPLATE.read_bytes()
