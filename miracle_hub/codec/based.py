"""The tensors of a repository with those of its base, which are compared before anything is made of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from miracle_hub.codec.base import Base, has_base, read_base
from miracle_hub.codec.config import read_facts
from miracle_hub.codec.naming import CONFIG
from miracle_hub.codec.source import weight_files
from miracle_hub.codec.stored import StoredTensor, stored_in
from miracle_hub.errors import BaseModelError, MiracleError

# The tensors of a compressed folder.
Read = Callable[[Path], Sequence[StoredTensor]]


def with_base(
    tensors: Iterable[StoredTensor],
    facts: Mapping[str, Any],
    where: Path,
    read: Read,
    given: Path | None = None,
) -> list[StoredTensor]:
    """The tensors of a repository with those of its base, which are compared when they are loaded.

    Args:
        tensors: of the repository's own files.
        facts: its quantization_config.
        where: the repository.
        read: opens a base that is compressed.
        given: the reader's own copy of the base.

    Raises:
        BaseModelError: the base is missing, or has other tensors.
        FormatError: what is stated of it does not fit the files.
    """
    own = {tensor.name: tensor for tensor in tensors}
    base = read_base(facts, where / CONFIG)
    for tensor in own.values():
        _check_kind(tensor, base, where)
    if base is None:
        return list(own.values())
    folder = base.folder(given, where)
    found = tensors_of_base(folder, read)
    based = {name: _based(name, own.get(name), base, found, folder) for name in base.digests}
    return [
        *(based.get(name, tensor) for name, tensor in own.items()),
        *(based[n] for n in based if n not in own),
    ]


def _check_kind(tensor: StoredTensor, base: Base | None, where: Path) -> None:
    """
    Raises:
        BaseModelError: it is a difference, and no base is stated for it; or it is none, and one is.
    """
    is_difference = any(facts.is_difference for facts in tensor.facts)
    if is_difference is (base is not None and tensor.name in base.digests):
        return
    if is_difference:
        raise BaseModelError(
            f"{where}: {tensor.name}: expected a base in config.json, found none: these are differences to a "
            "base, which alone mean nothing; read the folder that they are in, or download it again"
        )
    raise BaseModelError(
        f"{where}: {tensor.name}: expected a difference to the base that config.json states, found weights; "
        "files are from elsewhere: download the folder again"
    )


def _based(
    name: str, own: StoredTensor | None, base: Base, found: Mapping[str, StoredTensor], folder: Path
) -> StoredTensor:
    """
    Raises:
        BaseModelError: the base has no such tensor.
    """
    theirs = found.get(their_name := base.name_in_base(name))
    if theirs is None or (own is not None and own.shape != theirs.shape):
        wanted = "" if own is None else f" of shape {list(own.shape)}"
        there = "none" if theirs is None else f"shape {list(theirs.shape)}"
        raise BaseModelError(
            f"{folder}: {their_name}: expected this tensor{wanted} in the base, {base.said}, found {there}; "
            "this is another model, or half of it"
        )
    digest = base.digests[name]
    if own is not None:
        return replace(own, base=theirs, base_digest=digest)
    dtype = base.dtypes.get(name, theirs.dtype)
    return StoredTensor(name, dtype, theirs.shape, (), base=theirs, base_digest=digest)


def compared(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Tensors whose bases are those that are stated, for who must know before any is loaded; those of a base
    that is compressed are compared when they are decoded.

    Raises:
        BaseModelError: one is another.
    """
    dense = [t for t in tensors if t.base is not None and not t.base.is_coded]
    with ThreadPoolExecutor() as pool:  # hashing needs no lock of the interpreter
        for _ in pool.map(StoredTensor.load_base, dense):
            pass
    names = {tensor.name for tensor in dense}
    return [replace(t, base_digest="") if t.name in names else t for t in tensors]


def tensors_of_base(folder: Path, read: Read) -> dict[str, StoredTensor]:
    """Every tensor of a base, dense or compressed; of a dense one by the headers alone.

    Args:
        read: opens a compressed one.

    Raises:
        BaseModelError: it cannot be read, or needs a base itself.
    """
    try:
        if not read_facts(folder):
            return {tensor.name: tensor for tensor in stored_in(weight_files(folder))}
        if has_base(folder):
            raise BaseModelError(
                f"{folder}: expected a base that is a model by itself, found one that has a base of its own; "
                "use that one, or decompress this one first (miracle decompress)"
            )
        return {tensor.name: tensor for tensor in read(folder)}
    except BaseModelError:
        raise
    except MiracleError as error:
        raise BaseModelError(
            f"{folder}: expected a base, found files that cannot be read: {error}"
        ) from error
