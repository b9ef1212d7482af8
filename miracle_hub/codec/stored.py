"""A tensor of a repository: the sum of its parts.

The float32 weights of the parts are added in order (one correctly rounded addition each), then cast to the
dtype of the source. That order is part of the format. A part is an entry of a file: a payload, or all of a
tensor that is stored plainly. Before them all may come the tensor of a base, which lies elsewhere; of a
payload of bits beyond it there is no sum, but the tensor itself.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from miracle_hub.codec import payloads
from miracle_hub.codec.dtypes import EXACT_DTYPES, TORCH_DTYPES, raw_bytes
from miracle_hub.codec.naming import refined_name, stage_of
from miracle_hub.codec.payloads import OntoBase, Payload, PayloadFacts
from miracle_hub.codec.source import SourceTensor, list_tensors, narrowed_names
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.errors import BaseModelError, FormatError
from miracle_hub.files.container import files_kept_open
from miracle_hub.format.spec import TensorSpec

BASE_DIGITS = 32  # of SHA-256: 128 bits find every damage
_DTYPE_NAMES = {dtype: name for name, dtype in EXACT_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """One tensor, in dtype and shape of its source.

    Attributes:
        parts: entries of files, in the order in which they are added.
        facts: what each of them says, if they are payloads; none for a plain tensor.
        base: what they are added to, of another repository; without parts it is all there is.
        base_digest: of the base's tensor, as readers get it; empty if it was compared before.
    """

    parts: tuple[SourceTensor, ...]
    facts: tuple[PayloadFacts, ...] = ()
    base: "StoredTensor | None" = None
    base_digest: str = ""

    @property
    def path(self) -> Path:
        """The file of its first part, or of the base's."""
        if self.parts:
            return self.parts[0].path
        assert self.base is not None
        return self.base.path

    @property
    def is_coded(self) -> bool:
        """Whether it is stored as payloads."""
        return bool(self.facts)

    @property
    def is_exact(self) -> bool:
        """Whether its payload keeps every bit of it."""
        return any(facts.is_exact for facts in self.facts)

    @property
    def is_narrowed(self) -> bool:
        """Whether it is stored plainly, in fewer bits than its source had."""
        return not self.is_coded and bool(self.parts) and self.parts[0].dtype != self.dtype

    @property
    def stored_bytes(self) -> int:
        """Of all parts."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def relative_error(self) -> float:
        """Of the sum, as its encoders measured it; 0 for a plain tensor and where nobody did.

        With a base it is over the squared difference to that.
        """
        return math.prod(facts.relative_error for facts in self.facts) if self.facts else 0.0

    def load(self, *, verify: bool = True, backend: Backend | str = "auto") -> Tensor:
        """The tensor, on the backend's device if it is coded.

        Raises:
            FormatError: and its subclasses, when a payload is not sound, or the base is another.
        """
        entries = [part.load() for part in self.parts]
        base = self.load_base(backend)
        if self.is_coded:
            return decode_sum(entries, self.name, verify=verify, backend=backend, base=base)
        if base is not None:
            return base.to(TORCH_DTYPES[self.dtype])
        return entries[0].to(TORCH_DTYPES[self.dtype]) if self.is_narrowed else entries[0]

    def load_base(self, backend: Backend | str = "auto") -> Tensor | None:
        """The base's tensor, compared with its digest, in its own dtype; None where there is no base.

        Raises:
            BaseModelError: it is another.
        """
        if self.base is None:
            return None
        found = self.base.load(backend=backend).cpu()
        if self.base_digest and self.base_digest != (digest := base_digest_of(found)):
            raise BaseModelError(
                f"{self.base.path.parent}: {self.base.name}: expected the base's tensor of digest "
                f"{self.base_digest}, found {digest}; this is another model or revision, or a damaged one: "
                "give the base that "
                "config.json names, or delete it from the cache and load again"
            )
        return found

    def sum(self, backend: Backend) -> Tensor:
        """A coded tensor before the cast: float32, on the backend's device.

        Raises:
            FormatError: and its subclasses, when a payload is not sound.
        """
        parts = [payload_at(part.load(), self.name) for part in self.parts]
        return _sum(parts, backend, self.load_base(backend))


def base_digest_of(tensor: Tensor) -> str:
    """Of a tensor of a base as readers get it: its dtype, shape and bits."""
    checksum = hashlib.sha256(f"{_DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    checksum.update(raw_bytes(tensor))
    return checksum.hexdigest()[:BASE_DIGITS]


def decode_sum(
    entries: Sequence[Tensor],
    name: str,
    *,
    verify: bool = True,
    backend: Backend | str = "auto",
    base: Tensor | None = None,
) -> Tensor:
    """The weights that payloads of one tensor add up to, in the dtype of the first one's source.

    Args:
        name: of the tensor, for messages.
        backend: a name means that backend on the device of the first.
        base: what they are added to, of any dtype, on any device.

    Raises:
        FormatError: and its subclasses, when a payload is not sound.
        BaseModelError: they are a difference, and there is no base.
        BackendError: the backend cannot run there.
    """
    chosen = choose(backend, entries[0].device) if isinstance(backend, str) else backend
    parts = [payload_at(entry, name) for entry in entries]
    if base is None and parts[0].facts.is_difference:
        raise BaseModelError(
            f"{name}: expected weights, found a difference to those of a base, which alone means nothing; "
            "read the folder that it is in"
        )
    if len(parts) == 1 and base is None:
        return parts[0].decode(chosen, verify=verify, rounded=True)
    if len(parts) == 1 and base is not None and isinstance(parts[0], OntoBase):
        return parts[0].onto(base, chosen, verify=verify)
    return _sum(parts, chosen, base, verify=verify).to(TORCH_DTYPES[parts[0].facts.dtype])


def _sum(parts: Sequence[Payload], backend: Backend, base: Tensor | None, *, verify: bool = True) -> Tensor:
    first, *later = parts
    weights = first.decode(backend, verify=verify)
    if base is not None:
        weights = base.to(backend.device).float() + weights
    for payload in later:
        weights = weights + payload.decode(backend, verify=verify)
    return weights


def payload_at(entry: Tensor, name: str) -> Payload:
    """The payload that an entry is.

    Raises:
        FormatError: it is none, or not sound.
    """
    found = payloads.read(entry, name)
    if found is None:
        raise FormatError(
            f"{name}: expected a compressed tensor, found {entry.dtype} {list(entry.shape)} that begin like "
            "none; the file is damaged: download it again"
        )
    return found


@files_kept_open()
def stored_in(files: Iterable[Path]) -> list[StoredTensor]:
    """The tensors of files that belong together.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
    """
    files = list(files)
    narrowed = {file: narrowed_names(file) for file in files}
    return joined([described(entry, _payload(entry), narrowed[entry.path]) for entry in list_tensors(files)])


def _payload(entry: SourceTensor) -> Payload | None:
    return payloads.read(entry.load(), entry.name) if entry.is_bytes else None


def described(entry: SourceTensor, payload: Payload | None, narrowed: set[str] | None) -> StoredTensor:
    """What one entry of a file stands for.

    Args:
        payload: that the entry is; None if it is plain.
        narrowed: see `source.narrowed_names`.
    """
    if payload is not None:
        facts = payload.facts
        return StoredTensor(entry.name, facts.dtype, facts.shape, (entry,), (facts,))
    was_float32 = entry.dtype == "F16" and (narrowed is None or entry.name in narrowed)
    return StoredTensor(entry.name, "F32" if was_float32 else entry.dtype, entry.shape, (entry,))


def joined(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """Refinements, which are entries of their own, with the tensors that they refine.

    Raises:
        FormatError: a refinement is that of no tensor, or is not sound.
    """
    by_name = {tensor.name: tensor for tensor in tensors if _stage(tensor) == 1}
    for later in sorted((t for t in tensors if _stage(t) > 1), key=_stage):
        stage = _stage(later)
        base = by_name.get(name := refined_name(later.name, stage))
        is_next = base is not None and base.is_coded and later.is_coded and len(base.parts) == stage - 1
        if base is None or not is_next or base.shape != later.shape:
            raise FormatError(
                f"{later.parts[0].path}: {later.name}: expected a payload that refines what stages 1 to "
                f"{stage - 1} hold, of the same shape, found one of shape {list(later.shape)} for "
                f"{base and list(base.shape)}; a file is missing or from elsewhere: download it again"
            )
        by_name[name] = replace(base, parts=base.parts + later.parts, facts=base.facts + later.facts)
    return list(by_name.values())


def _stage(tensor: StoredTensor) -> int:
    return stage_of(tensor.parts[0].path)
