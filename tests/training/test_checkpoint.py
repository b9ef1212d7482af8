"""A coding run that is killed goes on where it was and ends with the same bytes; nothing of it is lost."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from miracle_hub.errors import FormatError, MiracleError, OptionError, OutputWriteError, TrainingError
from miracle_hub.files import sealed
from miracle_hub.training import checkpoint
from miracle_hub.training.checkpoint import Checkpoint, RunState
from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.journal import Journal
from tests import forks

from .networks import IMAGES, assert_same_state, loss_of, posterior_of, streams_of, variational_net

OPTIONS = CodingOptions(groups=4, refit_steps=3)
CONFIGS: dict[str, dict[str, Any]] = {
    "network": {"streams": "network", "selection": "sample"},
    "tensor": {"streams": "tensor", "code": "block", "parametrization": "mean-var"},
}

WORKER = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from safetensors import safe_open
import miracle_hub
from tests.training.networks import loss_of, variational_net
torch.set_num_threads(1)
folder = Path(sys.argv[2])
options = miracle_hub.CodingOptions(groups=8, refit_steps=6)

def run(name):
    torch.manual_seed(0)
    model = variational_net(streams="network", selection="sample")
    state = miracle_hub.Checkpoint(folder / f"{name}.state", every_seconds=0)
    miracle_hub.code_model(model, loss_of(model), options=options, checkpoint=state, progress=False)
    miracle_hub.save(model, folder / f"{name}.safetensors")

def steps_done():
    if not (folder / "killed.state").exists():
        return 0
    with safe_open(folder / "killed.state", "pt") as file:
        found = json.loads(file.metadata()["position"])
        return (found["group"] - 1) * options.refit_steps + (found["step"] or options.refit_steps)

run("whole")
kills, moments = [], random.Random(0)
while steps_done() < 24:
    target = steps_done() + moments.randint(1, 8)
    child = os.fork()
    if child == 0:
        run("killed")
        os._exit(0)
    while steps_done() < target and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.02))  # to any place in a step, or in the writing of its state
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills.append(steps_done())
run("killed")
print(json.dumps([kills, sorted(path.name for path in folder.iterdir())]))
"""


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_file(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = forks.run(WORKER, root, tmp_path)
    assert done.returncode == 0, done.stderr
    kills, files = json.loads(done.stdout.splitlines()[-1])
    # It was killed in the middle, at several places, and each time it was further.
    assert len(kills) > 2 and kills == sorted(set(kills)), kills
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    # What a killed process left half-written is gone.
    assert files == [f"{name}.{end}" for name in ("killed", "whole") for end in ("safetensors", "state")]


def run(
    model: nn.Module, path: Path | None, loss: Callable[[int], Tensor] | None = None, **options: Any
) -> Journal:
    torch.manual_seed(0)
    checkpoint = None if path is None else Checkpoint(path, every_seconds=0)
    return code_model(
        model, loss or loss_of(model), options=options.pop("options", OPTIONS), checkpoint=checkpoint,
        validate=lambda: float(model(IMAGES).sum().detach()), progress=False,
    )  # fmt: skip


def interrupted(model: nn.Module, step: int) -> Callable[[int], Tensor]:
    """A loss during whose step somebody presses control and C."""

    def loss(number: int) -> Tensor:
        found = loss_of(model)(number)
        if number == step:
            raise KeyboardInterrupt
        return found

    return loss


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The checkpoint of a run that was interrupted in the second group."""
    model = variational_net(**CONFIGS["network"])
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "state", interrupted(model, 4))
    return tmp_path / "state"


@pytest.mark.parametrize("config", CONFIGS)
def test_a_run_goes_on_from_every_step_to_the_same_end(config: str, tmp_path: Path) -> None:
    whole = variational_net(**CONFIGS[config])
    journal = run(whole, None)
    for step in range(9):
        model = variational_net(**CONFIGS[config])
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / f"{step}", interrupted(model, step))
        # The weights of another start: all that counts is in the file, which is there after the first step.
        model = variational_net(weights_seed=min(step, 1), **CONFIGS[config])
        again = run(model, tmp_path / f"{step}")
        assert_same_state(model.state_dict(), whole.state_dict())
        assert str(again.rows) == str(journal.rows)
        # And once more, when everything is done.
        done = variational_net(**CONFIGS[config])
        assert str(run(done, tmp_path / f"{step}").rows) == str(journal.rows)
        assert_same_state(done.state_dict(), whole.state_dict())


def test_checkpoints_are_written_when_they_are_due_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [100.0], []

    def record(self: Checkpoint, state: RunState) -> None:
        written.append((state.group, state.step))

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Checkpoint, "save", record)
    model = variational_net(**CONFIGS["network"])

    def loss(number: int) -> Tensor:
        now[0] += 20
        return loss_of(model)(number)

    code_model(
        model,
        loss,
        options=OPTIONS,
        checkpoint=Checkpoint(tmp_path / "state", every_seconds=50),
        progress=False,
    )
    assert written == [(1, 3), (2, 3), (3, 3), (4, 0)]


def another_head() -> nn.Module:
    """A model that differs in a tensor that is not coded."""
    model = variational_net(**CONFIGS["network"])
    model.register_buffer("classes", torch.zeros(7))
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], CodingOptions, str]] = {
    "coding": (
        lambda: variational_net(**CONFIGS["network"]),
        CodingOptions(groups=5, refit_steps=3),
        "use the options of that run, or another file",
    ),
    "seed": (
        lambda: variational_net(**CONFIGS["network"], seed=1),
        OPTIONS,
        "use the options of that run, or another file",
    ),
    "streams": (lambda: variational_net(**CONFIGS["tensor"]), OPTIONS, "or another file"),
    "model": (
        lambda: variational_net(**CONFIGS["network"], modules_to_save="head"),
        OPTIONS,
        "use the options of that run, or another file",
    ),
    "rest": (
        another_head,
        OPTIONS,
        "expected the checkpoint of this model, found one that differs in classes; use the model of that "
        "run, or another file",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_lost(other: str, started: Path) -> None:
    make, options, message = OTHERS[other]
    model, before = make(), started.read_bytes()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OptionError) as raised:
        run(model, started, options=options)
    assert str(raised.value).startswith(f"{started}: expected the checkpoint of ")
    assert str(raised.value).endswith(message)
    assert started.read_bytes() == before
    # The model is not even begun to be coded: it may be fitted further.
    assert_same_state(model.state_dict(), expected)
    assert all(posterior_of(stream).log_scales.requires_grad for stream in streams_of(model))
    code_model(model, options=options, progress=False)
    right = variational_net(**CONFIGS["network"])
    assert len(run(right, started).rows) == 4


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "found a file that cannot be read ("),
    "truncated": (lambda data: data[:-1], "found a file that cannot be read ("),
    "no-safetensors": (lambda data: b"PK\x03\x04" + data, "found a file that cannot be read ("),
    "tensor": (lambda data: flip(data, len(data) - 1), "; the file is damaged or not ours: "),
    "position": (
        lambda data: data.replace(b'\\"group\\": 2', b'\\"group\\": 3'),
        "; the file is damaged or not ours: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, started: Path) -> None:
    change, message = DAMAGES[damage]
    data = started.read_bytes()
    started.write_bytes(change(data))
    assert started.read_bytes() != data
    model = variational_net(**CONFIGS["network"])
    with pytest.raises(FormatError) as raised:
        run(model, started)
    assert str(raised.value).startswith(f"{started}: expected the checkpoint of a coding run")
    assert message in str(raised.value) and "delete it to start anew" in str(raised.value)
    assert all(stream.message is None for stream in streams_of(model))


def test_another_safetensors_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="expected the checkpoint of a coding run with CRC-32 None, found "):
        run(variational_net(**CONFIGS["network"]), tmp_path / "model.safetensors")


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(
    when: str, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        if when == "writing":
            Path(arguments[1]).write_bytes(b"half of a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = started.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(*((sealed, "save_file") if when == "writing" else (Path, "replace")), fail)
        with pytest.raises(OutputWriteError) as raised:
            run(variational_net(**CONFIGS["network"]), started)
    assert str(raised.value) == (
        f"{started}: the checkpoint could not be written ([Errno 28] No space left on device); the one "
        "before is still there: make room, see that no other run uses it, and run again"
    )
    assert started.read_bytes() == before
    assert list(started.parent.iterdir()) == [started]
    model, whole = variational_net(**CONFIGS["network"]), variational_net(**CONFIGS["network"])
    run(model, started)
    run(whole, None)
    assert_same_state(model.state_dict(), whole.state_dict())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="the checkpoint could not be written"):
        run(variational_net(**CONFIGS["network"]), tmp_path / "file" / "state")


def test_a_loss_that_is_not_finite_leaves_a_checkpoint_of_the_step_before(tmp_path: Path) -> None:
    model = variational_net(**CONFIGS["network"])

    def loss(number: int) -> Tensor:
        return loss_of(model)(number) * (float("nan") if number == 4 else 1)

    torch.manual_seed(0)
    with pytest.raises(TrainingError, match="^refit step 4 after group 2: "):
        checkpoint = Checkpoint(tmp_path / "state", every_seconds=1000)
        code_model(model, loss, options=OPTIONS, checkpoint=checkpoint, progress=False)
    other = variational_net(weights_seed=1, **CONFIGS["network"])
    calls: list[int] = []
    run(other, tmp_path / "state", lambda number: calls.append(number) or loss_of(other)(number))
    assert calls == [4, 5, 6, 7, 8]


def test_a_run_may_go_on_at_another_learning_rate_and_says_so(
    started: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is what the error of a loss that is not finite advises."""
    lower = CodingOptions(OPTIONS.groups, OPTIONS.refit_steps, learning_rate=1e-5)
    assert len(run(variational_net(**CONFIGS["network"]), started, options=lower).rows) == 4
    assert caplog.messages == ["refits go on at a learning rate of 1e-05, after 0.0003 until now"]


def test_a_checkpoint_may_be_moved_and_is_a_plain_safetensors_file(started: Path, tmp_path: Path) -> None:
    shutil.move(started, tmp_path / "elsewhere")
    found = sealed.read_sealed(tmp_path / "elsewhere")[0]
    assert all(isinstance(tensor, Tensor) for tensor in found.values())
    assert issubclass(FormatError, MiracleError)
    assert len(run(variational_net(**CONFIGS["network"]), tmp_path / "elsewhere").rows) == 4
