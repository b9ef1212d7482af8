"""The Hub on 127.0.0.1 that other tests rely on answers the real client as the real one does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

from .loopback import LoopbackHub
from .loopback_parts import TOKEN


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    hub.repositories.clear()
    return HfApi(hub.url, token=TOKEN)


@pytest.fixture
def stranger(hub: LoopbackHub) -> HfApi:
    return HfApi(hub.url, token=False)


def upload(api: HfApi, text: str, branch: str = "main") -> str:
    done = api.upload_file(
        path_or_fileobj=text.encode(), path_in_repo="notes/a.txt", repo_id="user/a", revision=branch
    )
    return done.oid


def download(api: HfApi, cache: Path, revision: str, file: str = "notes/a.txt") -> str:
    path = hf_hub_download(
        "user/a", file, revision=revision, endpoint=api.endpoint, cache_dir=cache, token=TOKEN
    )
    return Path(path).read_text()


def test_branches_tags_and_commits_name_what_was_uploaded(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("user/a")
    first = upload(api, "first")
    api.create_tag("user/a", tag="v1")
    api.create_branch("user/a", branch="side/1")
    upload(api, "second")
    upload(api, "third", "side/1")
    revisions = {"main": "second", "side/1": "third", "v1": "first", first: "first"}
    assert {revision: download(api, tmp_path, revision) for revision in revisions} == revisions
    refs = api.list_repo_refs("user/a")
    assert {branch.name for branch in refs.branches} == {"main", "side/1"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]


def test_unchanged_upload_makes_no_commit(api: HfApi) -> None:
    api.create_repo("user/a")
    api.create_repo("user/a", exist_ok=True)
    assert upload(api, "same") == upload(api, "same") == api.model_info("user/a").sha


def test_deleted_file_is_gone_from_the_branch_and_not_from_its_history(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("user/a")
    before = upload(api, "text")
    api.delete_file("notes/a.txt", repo_id="user/a")
    assert api.list_repo_files("user/a") == []
    assert download(api, tmp_path, before) == "text"


def test_ranges_are_answered(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(300, 400)}, tmp_path / "model.safetensors")
    hub.add("user/a", tmp_path)
    found = api.get_safetensors_metadata("user/a").files_metadata["model.safetensors"].tensors
    assert found["weight"].shape == [300, 400]
    assert hub.requests[-1][2] == 206


def test_absences_raise_what_the_real_hub_makes_the_client_raise(api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/a")
    api.create_repo("user/a")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/a", revision="side")
    with pytest.raises(EntryNotFoundError):
        download(api, tmp_path, "main")


def test_strangers_see_no_private_repository_and_write_none(api: HfApi, stranger: HfApi) -> None:
    api.create_repo("user/a", private=True)
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("user/a")
    api.create_repo("user/b")
    assert stranger.model_info("user/b").id == "user/b"
    with pytest.raises(HfHubHTTPError, match="token"):
        stranger.create_branch("user/b", branch="side")
