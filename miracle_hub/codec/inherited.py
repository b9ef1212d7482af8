"""A quantization_config that came along with a copied config: the weights beside it were never compressed."""

from collections.abc import Iterable
from pathlib import Path

from miracle_hub.codec.guard import GUARD, GUARD_ALONE
from miracle_hub.codec.naming import WEIGHTS_ENDING
from miracle_hub.codec.source import NARROWED, list_tensors, weight_files
from miracle_hub.errors import MiracleError
from miracle_hub.files.container import files_kept_open, opened

# In the metadata of what this package writes: a file with one of them belongs to a repository.
_OURS = (GUARD, GUARD_ALONE, NARROWED)
# What to tell who loads such a folder; a path and a colon come before it.
INHERITED = (
    "expected the compressed tensors that its quantization_config promises, found plain weights of a model "
    "that was made from a compressed model's config: they are taken as they are; to be rid of this message "
    "del model.config.quantization_config before save_pretrained, or remove it from config.json"
)


def is_inherited(folder: Path) -> bool:
    """Whether a quantization_config of miracle is that of other weights than the plain ones in its folder."""
    try:
        return are_plain(weight_files(folder))
    except MiracleError:  # no weights, or unsound ones: for others to say
        return False


@files_kept_open()
def are_plain(files: Iterable[Path]) -> bool:
    """Whether files never were compressed: they hold neither payloads, nor bytes that may have been some, nor
    anything that this package notes in files.

    A repository that lost its payloads, or some of them, has such notes, and is damaged instead.

    Raises:
        FormatError: a file is unsound.
    """
    return all(map(_is_plain, files))


def _is_plain(path: Path) -> bool:
    if path.suffix != WEIGHTS_ENDING:  # pickle, which transformers reads and nothing here writes
        return True
    with opened(path) as file:
        metadata = file.metadata() or {}
    return not any(key in metadata for key in _OURS) and not any(t.is_bytes for t in list_tensors([path]))
