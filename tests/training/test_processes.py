"""Two processes that code one model, as torchrun starts them: all end with the same, or all with an error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from miracle_hub.errors import OptionError
from miracle_hub.training.wrapping import refuse_sharded
from tests.limits import HANG_SECONDS
from tests.training.networks import conv_net, loss_of, variational_net

WORKER = Path(__file__).parent / "two_processes.py"


def launched(folder: Path) -> subprocess.CompletedProcess[str]:
    """Two processes by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*torchrun, str(WORKER), str(folder)], capture_output=True, text=True, timeout=HANG_SECONDS
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("two")
    done = launched(folder)
    files = [folder / f"found-{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr
    assert done.returncode != 0  # one of them ended in the middle, on purpose
    found = [json.loads(file.read_text()) for file in files]
    found[0]["left alone"] = json.loads((folder / "left-alone.json").read_text())
    found[0]["folder"] = folder
    return found


@pytest.mark.parametrize("kind", ["mean-kl", "mean-var", "test-channel"])
def test_processes_end_with_the_weights_of_the_file_and_have_batches_of_their_own(
    found: list[dict[str, Any]], kind: str
) -> None:
    (weights, losses, *first), (other_weights, other_losses, *second) = (
        each["kinds_of_posteriors"][kind] for each in found
    )
    assert weights == other_weights and losses == other_losses
    own = [[number for number in range(8) if number % 2 == rank] for rank in (0, 1)]
    measured = 2 if kind == "test-channel" else 1  # the curvature, with the same batches
    assert [first, second] == [[True, own[0] * measured], [True, own[1] * measured]]


def test_gradients_of_refits_are_those_of_both_batches(found: list[dict[str, Any]]) -> None:
    assert all(max(each["gradients_are_means"]) < 1e-6 for each in found)


def test_a_wrapped_model_trains_codes_and_saves_whatever_it_is_told_of_unused_parameters(
    found: list[dict[str, Any]],
) -> None:
    """The penalty of Mean-Var has gradients for what no output depends on."""
    (first, second) = (each["wrapped"] for each in found)
    ways = [f"{kind} {unused}" for kind in ("mean-var", "mean-kl") for unused in (False, True)]
    assert all(first[way] == second[way] and first[way][1] for way in ways)
    assert first["mean-var True"] == first["mean-var False"]


def test_a_wrapper_that_does_not_know_the_parameters_is_named(found: list[dict[str, Any]]) -> None:
    for each in (one["wrapped"] for one in found):
        assert each["before"].endswith("call make_variational first, and wrap what it returns")
        for when in ("inside", "coded since"):
            assert each[when].endswith("wrap it after make_variational, and anew after code_model")


def test_an_error_of_one_process_ends_all_with_its_name(found: list[dict[str, Any]]) -> None:
    first, second = (each["errors"] for each in found)
    assert second["value"] == "ValueError: no such row\nhere"
    assert first["value"] == (
        "ProcessError: process 1 of 2: expected no error, found ValueError: no such row\nhere; mend it "
        "there, and run all processes again"
    )
    text = "expected a finite loss, found nan; the model is as it was after the step before"
    assert first["nan"].startswith(f"TrainingError: refit step 3 after group 2: {text}")
    assert second["nan"].startswith(f"TrainingError: process 0 of 2: refit step 3 after group 2: {text}")
    assert first["disk"].startswith("OutputWriteError: ") and "could not be written" in first["disk"]
    assert second["disk"] == first["disk"].replace("OutputWriteError: ", "OutputWriteError: process 0 of 2: ")
    kinds = "expected one, found 2 kinds of model, options and refits; make them equal"
    assert first["models"] == f"ProcessError: process 0 of 2: {kinds}"


def test_a_process_that_is_left_alone_says_so(found: list[dict[str, Any]]) -> None:
    said = found[0]["left alone"]
    assert said.startswith("ProcessError: process 0 of 2: expected an answer of the others, found none (")
    assert said.endswith("; one of them has ended, or hangs: look at what it says, and run again")


def test_a_process_may_code_a_model_alone(found: list[dict[str, Any]]) -> None:
    assert found[1]["errors"]["alone"] == sum(p.numel() for p in conv_net().parameters())


def test_a_run_goes_on_from_the_checkpoint_of_the_first_process_to_the_same_end(
    found: list[dict[str, Any]],
) -> None:
    assert found[0]["checkpoints"] == found[1]["checkpoints"]
    assert len(set(found[0]["checkpoints"])) == 1
    assert len(json.loads((found[0]["folder"] / "log-2" / "coding.json").read_text())) == 3


def test_the_journal_has_the_mean_of_all_validations(found: list[dict[str, Any]]) -> None:
    assert all(each["validated"] == [0.5] * 3 for each in found)


def test_a_replica_of_data_parallel_is_refused() -> None:
    model: Any = variational_net()
    model._is_replica = True
    with pytest.raises(OptionError, match="found a replica of nn.DataParallel; start a process per device"):
        loss_of(model)(0)


def test_sharded_parameters_are_refused() -> None:
    class DTensor(nn.Parameter):
        pass

    model: Any = conv_net()
    model.head.weight = DTensor(model.head.weight)
    with pytest.raises(OptionError, match="^head.weight: expected a whole parameter, found one that is"):
        refuse_sharded(model)
