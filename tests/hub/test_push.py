"""A push that cannot lie: what is not sound stays here, what the Hub holds is compared, again is cheap."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import HfApi, ModelCard

import miracle_hub
from miracle_hub.errors import (
    ChecksumError,
    DataError,
    RemoteMismatchError,
    SourceError,
    UploadError,
)

from .client import Client, stopped_url
from .here import UPLOADS_WARN, use_here
from .loopback import LoopbackHub
from .loopback_parts import TOKEN, Answer, Blob

if TYPE_CHECKING:
    from .conftest import Repository

pytestmark = UPLOADS_WARN
SOURCE_CARD = (
    "---\nlicense: cc-by-4.0\nlanguage: de\ntags: [law, onnx]\npipeline_tag: fill-mask\n---\n# Dense\n"
)


class TamperingHub(LoopbackHub):
    """A Hub that keeps other bytes than it was sent, of files whose path is a key of `tampered`."""

    def __init__(self) -> None:
        super().__init__()
        self.tampered: dict[str, Callable[[bytes], bytes]] = {}
        self.refuses_commits = False

    def answer(self, method: str, url: str, headers: Message, body: bytes) -> Answer:
        if self.refuses_commits and "/commit/" in url:
            return Answer(status=400)
        answer = super().answer(method, url, headers, body)
        if "/commit/" in url:
            for repository in self.repositories.values():
                for files in repository.commits.values():
                    for path, change in self.tampered.items():
                        if path in files:
                            files[path] = Blob(change(files[path].data), files[path].is_lfs)
        return answer


def write(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(path.name.encode())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[TamperingHub]:
    with TamperingHub() as running:
        use_here(running, monkeypatch)
        # What plots show is for test_plots.py; drawing takes a second.
        monkeypatch.setattr("miracle_hub.hub.plots._save", lambda path, *_: write(path))
        yield running


@pytest.fixture(scope="module")
def made(repositories: Callable[..., "Repository"], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder, sharded, whose source had a card."""
    root = tmp_path_factory.mktemp("push")
    source = shutil.copytree(repositories("bert-masked-lm").source, root / "source")
    (source / "README.md").write_text(SOURCE_CARD)
    options: dict[str, Any] = {"bits_per_weight": 7, "window_bits": 8, "progress": False}
    miracle_hub.compress(source, root / "out", max_shard_size="12kB", **options)
    return root


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def push(folder: Path, repo_id: str = "user/small", **options: Any) -> Any:
    return miracle_hub.push(folder, repo_id, token=TOKEN, **options)


def uploads(hub: LoopbackHub) -> int:
    return sum(method == "PUT" for method, _, _ in hub.requests)


def card(hub: LoopbackHub, repo_id: str = "user/small") -> ModelCard:
    return ModelCard(hub.repositories[repo_id].files()["README.md"].data.decode())


def test_a_push_uploads_every_visible_file_with_a_card_and_plots(hub: TamperingHub, out: Path) -> None:
    (out / ".env").write_text("a secret")
    done = push(out, base="org/dense")
    stored = hub.repositories["user/small"].files()
    plots = {f"plots/{n}.png" for n in ("bits_per_tensor", "squared_error_per_tensor", "rate_distortion")}
    assert plots < set(stored) and ".env" not in stored
    assert {path: blob.data for path, blob in stored.items()} == {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".env"
    }
    assert done.n_files == len(stored) and done.n_bytes == sum(len(blob.data) for blob in stored.values())
    assert done.digest == miracle_hub.inspect(out).digest and done.commit in done.url


def test_the_card_says_how_to_load_the_repository_and_what_carries_over(hub: TamperingHub, out: Path) -> None:
    push(out, base="org/dense")
    found = card(hub)
    data, inspection = found.data.to_dict(), miracle_hub.inspect(out)
    assert data["base_model"] == "org/dense" and data["base_model_relation"] == "quantized"
    assert data["license"] == "cc-by-4.0" and data["language"] == "de" and data["pipeline_tag"] == "fill-mask"
    assert data["library_name"] == "transformers" and data["tags"] == ["compressed", "law", "miracle"]
    assert 'AutoModelForMaskedLM.from_pretrained("user/small")' in found.text
    assert "pip install miracle-hub" in found.text and "miracle verify user/small" in found.text
    assert f"| bytes | {inspection.file_bytes:,} |" in found.text and inspection.digest in found.text
    assert "![rate distortion](plots/rate_distortion.png)" in found.text and "kl_per_group" not in found.text


def test_what_is_not_sound_is_not_pushed(hub: TamperingHub, out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError):
        push(out)
    assert hub.requests == [] and hub.repositories == {}


def test_a_plain_tensor_that_was_damaged_after_compression_is_not_pushed(
    hub: TamperingHub, out: Path
) -> None:
    """It has no digest of its own; the file's guard covers it."""
    path = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # plain tensors come first
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"safetensors: expected what guard"):
        push(out)
    assert hub.repositories == {}


def test_a_folder_that_another_model_was_compressed_to_is_not_pushed(
    hub: TamperingHub, out: Path, made: Path, repositories: Callable[..., "Repository"]
) -> None:
    with pytest.raises(ChecksumError, match="give the model that was compressed"):
        push(out, dense=repositories("bert-classifier").source)
    assert hub.repositories == {}
    push(out, dense=made / "source")
    dense_bytes = (made / "source" / "model.safetensors").stat().st_size
    assert f"{dense_bytes:,} (" in card(hub).text


def test_a_link_that_leaves_the_folder_is_not_pushed(hub: TamperingHub, out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of this machine")
    (out / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="found a link that leaves it"):
        push(out)
    assert hub.repositories == {}


def test_what_is_no_compressed_folder_is_not_pushed(hub: TamperingHub, made: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="found one without any payload"):
        push(made / "source")
    with pytest.raises(SourceError, match="expected a compressed folder, found none"):
        push(tmp_path / "nothing")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("model-00002-of-", lambda data: data[:-1] + b"\0", "expected content of hash"),
        ("model-00001-of-", lambda data: data + b"\0", "bytes on the Hub, found"),
        ("config.json", lambda data: b" " + data[1:], "expected content of hash"),
    ],
)
def test_a_hub_that_holds_other_bytes_is_an_error_that_names_the_file(
    path: str, change: Callable[[bytes], bytes], message: str, hub: TamperingHub, out: Path
) -> None:
    (name,) = (found.name for found in out.iterdir() if found.name.startswith(path))
    hub.tampered[name] = change
    with pytest.raises(RemoteMismatchError, match=rf"user/small, commit \w+: {name}: expected .* after"):
        push(out)


def test_a_file_that_the_hub_lost_is_an_error(
    hub: TamperingHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *a, **k: iter(()))
    with pytest.raises(RemoteMismatchError, match="expected the file on the Hub, found none after the upl"):
        push(out)


def test_an_interrupted_push_goes_on_where_it_was(hub: TamperingHub, out: Path) -> None:
    hub.refuses_commits = True
    with pytest.raises(UploadError, match="user/small: expected the Hub to take .* push again: what has arr"):
        push(out)
    n_files = len(list(out.glob("*.safetensors")))
    assert uploads(hub) == n_files > 1 and hub.repositories["user/small"].files() == {}
    hub.refuses_commits = False
    push(out)
    assert uploads(hub) == n_files  # the weights had arrived
    first = hub.repositories["user/small"].branches["main"]
    again = push(out)
    assert uploads(hub) == n_files and again.commit == first  # nothing to do, and still compared


def test_weights_of_an_earlier_push_cannot_shadow_those_of_the_next(
    hub: TamperingHub, made: Path, out: Path, tmp_path: Path
) -> None:
    single, options = tmp_path / "single", {"bits_per_weight": 6, "window_bits": 8, "progress": False}
    miracle_hub.compress(made / "source", single, **options)
    push(single)
    repository = hub.repositories["user/small"]
    repository.commit("main", {**repository.files(), "model.fp16.safetensors": Blob(b"another's", True)})
    push(out)
    stored = set(repository.files())
    assert "model.safetensors" not in stored and "model.safetensors.index.json" in stored
    assert "model.fp16.safetensors" in stored  # a variant shadows nothing
    push(single)
    assert {n for n in repository.files() if "safetensors" in n} == {
        "model.safetensors",
        "model.fp16.safetensors",
    }


def test_a_private_push_never_goes_to_a_public_repository(hub: TamperingHub, out: Path) -> None:
    push(out, "user/hidden", private=True)
    assert hub.repositories["user/hidden"].private
    push(out, "user/open")
    with pytest.raises(
        UploadError, match="expected a private repository, found a public one; nothing was up"
    ):
        push(out, "user/open", private=True)


def test_a_revision_is_made_if_it_is_new_and_kept_if_not(hub: TamperingHub, out: Path) -> None:
    push(out, revision="small")
    repository = hub.repositories["user/small"]
    assert repository.files("main") == {} and "config.json" in repository.files("small")
    before = repository.branches["small"]
    push(out, revision="small")
    assert repository.branches["small"] == before


def test_without_the_right_to_write_the_error_says_to_log_in(hub: TamperingHub, out: Path) -> None:
    with pytest.raises(UploadError, match="log in with `hf auth login`"):
        miracle_hub.push(out, "user/small", token="hf_another")


def test_a_hub_that_is_away_is_an_upload_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = functools.partial(HfApi, endpoint=stopped_url())
    monkeypatch.setattr("miracle_hub.hub.push.HfApi", api)
    with pytest.raises(UploadError, match="user/small: expected the Hub to take the files, found"):
        push(out)


# Facts that others measured.


def test_given_facts_are_in_the_card_and_stay_there_for_the_same_files(
    hub: TamperingHub, out: Path, tmp_path: Path
) -> None:
    evaluation = {"what": "masked accuracy", "before": 61.5, "after": 61.25, "command": "python evaluate.py"}
    given = {"hardware": "an abacus", "evaluations": [evaluation], "limits": ["Short texts only."]}
    (tmp_path / "facts.json").write_text(json.dumps(given))
    push(out, facts=tmp_path / "facts.json", base="org/dense")
    lines = (
        "- masked accuracy: 61.5 before, 61.25 after (repeated by `python evaluate.py`)",
        "| hardware | an abacus |",
        "- Short texts only.",
    )
    assert all(line in card(hub).text for line in lines)
    push(out, "user/again")  # without them, but of the same files
    assert all(line in card(hub, "user/again").text for line in lines)
    assert 'from_pretrained("user/again")' in card(hub, "user/again").text
    assert card(hub, "user/again").data.to_dict()["base_model"] == "org/dense"


def test_facts_of_other_files_are_refused(hub: TamperingHub, out: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps({"sha256": "0" * 64, "hardware": "an abacus"}))
    with pytest.raises(DataError, match="expected facts of the weight files of SHA-256"):
        push(out, facts=tmp_path / "facts.json")
    for wrong in ('{"speed": 3}', "[]", "{", '{"hardware": 3}', '{"evaluations": [{"what": "x"}]}'):
        (tmp_path / "facts.json").write_text(wrong)
        with pytest.raises(DataError, match="facts.json: expected"):
            push(out, facts=tmp_path / "facts.json")
    assert hub.repositories == {}


def test_hand_written_text_and_metadata_survive_a_push(hub: TamperingHub, out: Path) -> None:
    written = ModelCard.load(out / "README.md")
    text = str(written).replace("# out", "# My model").replace("license:", "datasets: [mine]\nlicense:")
    (out / "README.md").write_text(f"{text}\nThanks to everybody.\n")
    push(out)
    found = card(hub)
    assert "Thanks to everybody." in found.text and found.text.count("miracle-hub: measured") == 1
    assert found.data.to_dict()["datasets"] == ["mine"]
    (out / "README.md").write_text("---\nlicense: mit\n---\nMy own card.\n")
    push(out)
    assert "My own card." in card(hub).text and "| bytes |" in card(hub).text
    assert card(hub).data.to_dict()["license"] == "mit"


def test_the_journal_of_the_fit_that_wrote_a_folder_is_plotted(hub: TamperingHub, out: Path) -> None:
    rows = [{"coded_values": 10 * i, "kl_bits": 30.0 / i} for i in (1, 2, 3)]
    log = out.with_name("out-fit")
    log.mkdir()
    (log / "coding.json").write_text(json.dumps(rows))
    push(out)
    assert "plots/kl_per_group.png" in hub.repositories["user/small"].files()
    assert "![kl per group](plots/kl_per_group.png)" in card(hub).text


# The command line, with a client that nobody has touched.

LOAD = """
import json, sys
sys.argv[1:] = ["verify", "user/small"]
from miracle_hub import cli
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained("user/small")
print(json.dumps(float(model.bert.encoder.layer[0].output.dense.weight.double().sum())))
sys.stdout, out = sys.stderr, sys.stdout
try:
    cli.main()
except SystemExit as end:
    print(json.dumps(end.code or 0), file=out)
"""


def test_the_command_line_pushes_and_verifies_and_transformers_loads(out: Path, tmp_path: Path) -> None:
    with LoopbackHub() as running:
        client = Client(running.url, tmp_path / "home")
        done = client.miracle("push", out, "user/small", "--base", "org/dense", "--token", TOKEN)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith(f"{running.url}/user/small/commit/") and " files, " in lines[1]
        assert lines[2] == f"digest {miracle_hub.inspect(out).digest}"
        done = client.run(LOAD)
    expected = miracle_hub.load_state_dict(out)["bert.encoder.layer.0.output.dense.weight"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [float(expected.double().sum()), 0]
    assert f"user/small: every byte agrees\n{lines[2]}" in done.stderr
