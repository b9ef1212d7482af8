"""A calibrated compression that is killed goes on in its work folder, and ends with the same bytes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import miracle_hub
from miracle_hub.calibrate import kept_steps, recipe
from miracle_hub.calibrate.inputs import Inputs
from miracle_hub.codec import compress, kept, work
from miracle_hub.errors import (
    BudgetError,
    MiracleError,
    OptionError,
    OutputExistsError,
    OutputWriteError,
    ResumeError,
)
from miracle_hub.files.whole import alone_in
from tests.calibrate.conftest import TEXTS
from tests.chaos.children import KILLED, Child

Saved = Callable[..., tuple[Any, Path]]
Tree = dict[str, bytes]
QUICK: dict[str, Any] = {"bits_per_weight": 8.0, "window_bits": 8, "progress": False}


def llama_of(saved: Saved, layers: int) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": layers}
    return saved(LlamaForCausalLM, tie_word_embeddings=True, **sizes)[1]


@pytest.fixture
def llama(saved: Saved) -> Path:
    return llama_of(saved, 1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps after each of two groups, and three of tuning; all are kept."""
    monkeypatch.setattr(
        recipe, "EFFORTS", tuple(replace(each, most_steps=9, groups=3, looks=1) for each in recipe.EFFORTS)
    )
    monkeypatch.setattr(recipe, "_FEWEST_STEPS", 2)
    monkeypatch.setattr(recipe, "_END", 0.34)
    monkeypatch.setattr(recipe, "_MOST_SELF_MADE", 1024)
    monkeypatch.setattr(kept_steps, "_EVERY_SECONDS", 0.0)


class Interrupted(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After how many savings the next one is interrupted; and how many there were."""
    write, left = kept.write_sealed, [1_000_000]

    def write_or_not(path: Path, *given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        write(path, *given)

    monkeypatch.setattr(kept, "write_sealed", write_or_not)
    yield left


def tree(folder: Path) -> Tree:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kept_in(folder: Path) -> set[str]:
    return {path.name.rpartition("-")[0] or path.name for path in folder.iterdir()}


def cache_of(make: Callable[..., Any]) -> Callable[..., Any]:
    found: list[Any] = []

    def once(*given: Any) -> Any:
        found.extend([] if found else [make(*given)])
        return found[0]

    return once


# Inputs, sensitivity and damping; a rate, three groups and two refits of two steps, of which one is kept; or
# what is in no block, and two blocks; and three steps of tuning, of which the last is the whole.
WHOLE = (1, {}, 1, 3 + 1 + 3 + 2 * 2 + 3, {"rate", "refits", *(f"steps-{phase}" for phase in range(3))})
SHORT_BLOCKS = {"_FEWEST_STEPS": 99, "_FEWEST_BLOCK_STEPS": 2, "_BLOCK_PASSES": 0}
BLOCKS = (2, SHORT_BLOCKS, 3, 3 + 3 + 3, {"outside", "block-0-0", "block-0-1"})


@pytest.mark.calibrated
@pytest.mark.parametrize(
    ("layers", "lengths", "at_once", "n_kept", "steps"), [WHOLE, BLOCKS], ids=["whole", "blocks"]
)
def test_a_run_goes_on_from_everything_that_it_keeps_and_writes_the_same_bytes(
    layers: int, lengths: dict[str, int], at_once: int, n_kept: int, steps: set[str], saved: Saved,
    tmp_path: Path, interrupt: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every run keeps one thing more, or three, and is interrupted before it has kept the next."""
    llama = llama_of(saved, layers)
    for name, value in lengths.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(compress, "survey", cache_of(compress.survey))  # which takes most of the time
    before = interrupt[0]
    report = miracle_hub.compress(llama, tmp_path / "whole", **QUICK)
    assert before == interrupt[0] and report.calibration is not None
    folder, n_runs, seen = tmp_path / "work", 0, set[str]()
    while not (tmp_path / "out").exists():
        interrupt[0], n_runs = at_once, n_runs + 1
        try:
            resumed = miracle_hub.compress(llama, tmp_path / "out", work=folder, **QUICK)
            assert resumed.calibration == report.calibration
        except Interrupted:
            seen |= kept_in(folder)
            assert not (tmp_path / "out").exists()
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert {"run.json", "inputs", "sensitivity", "damping"} | steps <= seen | {"steps-0"}
    assert n_runs == -(-n_kept // at_once)
    assert not list(folder.iterdir())


def test_a_process_that_is_killed_goes_on_and_writes_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    """Signal 9 at one of its calls that change files, at a later one each time."""
    given = {**QUICK, "calibrate": TEXTS}
    miracle_hub.compress(llama, tmp_path / "whole", **given)
    run = lambda: miracle_hub.compress(llama, tmp_path / "out", work=tmp_path / "work", **given)  # noqa: E731
    assert [Child(run, fatal).ended() for fatal in (25, 100, 0)] == [KILLED, KILLED, ""]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not list((tmp_path / "work").iterdir())


@pytest.fixture
def begun(llama: Path, tmp_path: Path, interrupt: list[int], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a run that was interrupted after its first group."""
    monkeypatch.setattr(compress, "survey", cache_of(compress.survey))
    interrupt[0] = 4
    with pytest.raises(Interrupted):
        miracle_hub.compress(llama, tmp_path / "out", work=tmp_path / "work", calibrate=TEXTS, **QUICK)
    assert "refits" in kept_in(tmp_path / "work")
    interrupt[0] = 1_000_000
    return tmp_path / "work"


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"bits_per_weight": 7.0}, "bits_per_weight 8.0 instead of 7.0"),
    ({"bits_per_weight": None, "size": "30kB"}, "bits_per_weight 8.0 instead of none, size none instead of"),
    ({"window_bits": 9}, "window_bits 8 instead of 9"),
    ({"rotation": 1}, "rotation 128 instead of 1"),
    ({"seed": 1}, "seed 0 instead of 1"),
    ({"effort": 2}, "effort 1 instead of 2"),
    ({"modules_to_not_convert": ["lm_head"]}, 'modules_to_not_convert none instead of ["lm_head"]'),
    ({"max_shard_size": "9kB"}, "max_shard_size 5GB instead of 9kB"),
    ({"calibrate": "texts.txt"}, "calibrate list instead of texts.txt"),
]


def test_a_run_of_other_things_is_refused_and_says_of_which(
    begun: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(begun)
    cases: list[tuple[Any, dict[str, Any], str]] = [(None, *case) for case in CHANGED]
    weights = llama / "model.safetensors"
    sound = weights.read_bytes()
    cases.append((lambda: weights.write_bytes(sound[:-1] + b"\1"), {}, "model.safetensors SHA-256 "))
    cases.append((lambda: weights.write_bytes(sound), {"calibrate": TEXTS[:150]}, "expected the data that"))
    cases.append((lambda: (llama / "more.txt").touch(), {}, "more.txt none instead of SHA-256 "))
    cases.append(((llama / "more.txt").unlink, {"seed": 3}, "seed 0 instead of 3; run it"))
    cases.append(
        (lambda: monkeypatch.setattr("miracle_hub.codec.work._FORMAT", 0), {}, "format of the folder 1")
    )
    for change, given, said in cases:
        if change is not None:
            change()
        with pytest.raises(ResumeError) as raised:
            given = {**QUICK, "calibrate": TEXTS, **given}
            miracle_hub.compress(llama, tmp_path / "out", work=begun, **given)
        assert str(raised.value).startswith(f"{begun}: expected the ") and said in str(raised.value)
        assert str(raised.value).endswith("give another folder as work, or remove this one to start anew")
        assert tree(begun).keys() == before.keys() and not (tmp_path / "out").exists()


def test_what_is_damaged_is_made_again_and_said(begun: Path, llama: Path, tmp_path: Path) -> None:
    miracle_hub.compress(llama, tmp_path / "whole", calibrate=TEXTS, **QUICK)
    run = json.loads((begun / "run.json").read_text())
    run["machine"]["threads"] = "999"
    (begun / "run.json").write_text(json.dumps(run))
    files = {path.name.rpartition("-")[0]: path for path in begun.glob("*.safetensors")}
    assert files.keys() == {"inputs", "sensitivity", "damping", "refits"}
    data = files["sensitivity"].read_bytes()
    files["sensitivity"].write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    files["damping"].write_bytes(files["damping"].read_bytes()[:40])
    files["inputs"].write_bytes(b"")
    files["refits"].replace(begun / "refits-0123456789abcdef.safetensors")
    with pytest.warns(UserWarning) as told:
        miracle_hub.compress(llama, tmp_path / "out", work=begun, calibrate=TEXTS, **QUICK)
    said = [str(warning.message) for warning in told]
    assert len(said) == 5 and "kept by a run with threads 999 instead of 1: it goes on, but" in said[0]
    assert [line.partition(", found ")[2].partition(";")[0] for line in said[1:]] == [
        *["a damaged file"] * 3, "one that was made of other inputs",
    ]  # fmt: skip
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_file_of_one_step_is_not_taken_for_another_ones(tmp_path: Path) -> None:
    one, other = (kept.Kept(tmp_path).given(name) for name in ("one", "other"))
    one.save("refits", done=1)
    (path,) = tmp_path.iterdir()
    path.replace(tmp_path / f"refits-{other.digest[:16]}.safetensors")
    with pytest.warns(UserWarning, match="found the file of another one; it is made again"):
        assert other.load("refits") is None


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_size_that_cannot_be_met_is_refused_before_the_model_runs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "load_dense", lambda *_: pytest.fail("the model was loaded"))
    for bits, why in [(0.01, "least possible"), (30.0, "most this model can use")]:
        with pytest.raises(BudgetError, match=why):
            miracle_hub.compress(llama, tmp_path / "out", **{**QUICK, "bits_per_weight": bits})


def test_another_size_goes_on_from_what_depends_on_no_size(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {**QUICK, "calibrate": TEXTS, "work": tmp_path / "work", "effort": 0}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compress, "meet_budget", raise_interrupt)
        miracle_hub.compress(llama, tmp_path / "out", **{**given, "bits_per_weight": 6.0})
    assert kept_in(tmp_path / "work") == {"run.json", "inputs", "sensitivity"}
    monkeypatch.setattr(recipe, "measure", lambda *_: pytest.fail("measured again"))
    miracle_hub.compress(llama, tmp_path / "out", **given)
    assert not list((tmp_path / "work").iterdir())


def test_a_folder_that_cannot_be_one_of_work_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "broken" / f"refits-{'0' * 16}.safetensors").touch()
    out = tmp_path / "out"
    cases: list[tuple[Any, type[MiracleError], str]] = [
        (out, OptionError, "expected a work folder apart from the output"),
        (out / "work", OptionError, "expected a work folder apart from the output"),
        (llama / "work", OptionError, "expected a work folder apart from the source"),
        (tmp_path, OptionError, "expected a work folder apart from the source"),
        (tmp_path / "file", OptionError, "expected a folder to keep work in, found a file"),
        (
            tmp_path / "mine",
            ResumeError,
            "expected an empty folder, or one of an interrupted run",
        ),
        (tmp_path / "broken", ResumeError, "run.json: expected what an interrupted run says of itself"),
        ("/proc/none", OutputWriteError, "cannot be written"),
        (" ", OptionError, "work: expected a path, found ' '"),
        (3, OptionError, "work: expected a path, found 3"),
    ]
    before = tree(tmp_path)
    for folder, error, said in cases:
        with pytest.raises(error) as raised:
            miracle_hub.compress(llama, out, work=folder, calibrate=TEXTS, **QUICK)
        assert said in str(raised.value)
    with pytest.raises(OptionError, match="^work: expected none, since without calibration nothing is kept"):
        miracle_hub.compress(llama, out, work=tmp_path / "new", calibrate=None, **QUICK)
    with alone_in(tmp_path / "new"), pytest.raises(OutputExistsError, match="found one; .* another folder$"):
        miracle_hub.compress(llama, out, work=tmp_path / "new", calibrate=TEXTS, **QUICK)
    out.mkdir()
    with pytest.raises(OutputExistsError, match="the output folder exists"):
        miracle_hub.compress(llama, out, work=tmp_path / "new", calibrate=TEXTS, **QUICK)
    assert tree(tmp_path) == before and not list((tmp_path / "new").iterdir())


def test_a_module_of_the_user_s_own_is_known_by_its_layers_and_buffers(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import nn

    from miracle_hub.options import CompressOptions

    def run_of(model: nn.Module) -> dict[str, str]:
        return work.Run.of(tmp_path, CompressOptions(size=1000), model).model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    same = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    same.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    assert run_of(model) == run_of(same)
    same.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
    other = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.25))
    other.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    assert len({run_of(each)["model"] for each in (model, same, other)}) == 3


def test_inputs_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    images = {"pixel_values": torch.randn(2, 3, 4, 4), "a.mask": torch.tensor([True, False])}
    inputs = Inputs((images, images), ({"b": torch.arange(3)},), "made", 7, "digest")
    folder = kept.Kept(tmp_path).given("run")
    folder.save("inputs", inputs.tensors(), **inputs.facts)
    found = folder.load("inputs")
    assert found is not None
    back = Inputs.of_tensors(found.tensors, found.facts)
    assert (back.said, back.n_tokens, back.digest) == ("made", 7, "digest")
    for own, theirs in zip((*inputs.batches, *inputs.held_out), (*back.batches, *back.held_out), strict=True):
        assert list(own) == list(theirs) and all(torch.equal(own[name], theirs[name]) for name in own)
    folder.drop("inputs")
    assert folder.load("inputs") is None and not list(tmp_path.iterdir())
