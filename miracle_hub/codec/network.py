"""A whole network's stream ⇄ its tensors, and the one file that holds it with whatever is stored plainly."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miracle_hub.codec.body import check_scale_words
from miracle_hub.codec.dtypes import DTYPE_NAMES, TORCH_DTYPES, dtype_name, is_bytes, raw_bytes
from miracle_hub.codec.guard import GUARD_ALONE, is_stream_alone, read_contents
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.repository import OutputFile
from miracle_hub.codec.source import list_tensors, narrowed_names, narrowing_metadata
from miracle_hub.coding.cpu import decode_stream
from miracle_hub.coding.digest import digest
from miracle_hub.coding.order import permutation
from miracle_hub.coding.sharing import KINDS, Sharing
from miracle_hub.errors import ChecksumError, FormatError
from miracle_hub.files.container import files_kept_open
from miracle_hub.files.whole import temporary_beside, writing
from miracle_hub.format.network import NetworkHeader, SharedSpec, decode_network, encode_network
from miracle_hub.format.payload import DTYPES
from miracle_hub.format.spec import TensorSpec, bytes_entry


def encode_stream_entry(
    header: NetworkHeader, scales: Tensor, message: Tensor
) -> tuple[bytes, dict[str, Tensor]]:
    """The bytes of a network's stream with the digest of its weights, and those weights, float32.

    Args:
        scales: `[tensors]`, as the format allows them.
        message: uint8 `[bytes]`.
    """
    weights = _weights(header, scales.bfloat16(), message)
    header = NetworkHeader(header.code, header.tensors, _digest(weights))
    return encode_network(header, raw_bytes(scales.bfloat16()), raw_bytes(message)), weights


def decode_stream_entry(data: bytes, tensors: tuple[SharedSpec, ...], where: str) -> dict[str, Tensor]:
    """The weights of a network's stream by name, in the tensors' dtypes.

    Raises:
        FormatError: and its subclasses, for every way in which the bytes can be wrong.
    """
    header, raw_scales, raw_message = decode_network(data, tensors, where)
    start = len(data) - len(raw_message) - len(raw_scales)
    check_scale_words(np.frombuffer(raw_scales, "<u2"), start, where)
    _check_padding(header, raw_message, len(data) - len(raw_message), where)
    scales = torch.frombuffer(bytearray(raw_scales), dtype=torch.bfloat16)
    weights = _weights(header, scales, torch.frombuffer(bytearray(raw_message), dtype=torch.uint8))
    if (found := _digest(weights)) != header.digest:
        raise ChecksumError(
            f"{where}: the decoded weights have digest {found:016x}, the header promises {header.digest:016x}"
            "; the file is damaged: download it again"
        )
    return {t.name: weights[t.name].to(TORCH_DTYPES[t.dtype]) for t in header.tensors}


def _check_padding(header: NetworkHeader, message: bytes, start: int, where: str) -> None:
    """
    Raises:
        FormatError: the last byte of a message is not filled with zero bits.
    """
    end = 0
    for n_values, code in header.code.segments(header.n_values):
        end += code.message_bytes(n_values)
        unused = -code.message_bits(n_values) % 8
        if message[end - 1] & ((1 << unused) - 1):
            raise FormatError(
                f"{where}: byte {start + end - 1}: expected the last {unused} bits of the message to be 0, "
                f"found {message[end - 1]:08b}; the file is damaged: download it again"
            )


def _weights(header: NetworkHeader, scales: Tensor, message: Tensor) -> dict[str, Tensor]:
    """Every tensor's float32 weights: candidates, permuted, times scale, shared."""
    z = torch.cat(list(_candidates(header, message)))
    values = torch.empty_like(z).index_copy_(0, permutation(header.n_values, header.code), z)
    weights, first = {}, 0
    for number, (tensor, scale) in enumerate(zip(header.tensors, scales.float(), strict=True)):
        own = values[first : first + tensor.n_values] * scale
        first += tensor.n_values
        if tensor.sharing:
            sharing = Sharing(KINDS[tensor.sharing], tensor.n_values, tensor.n_weights)
            places, signs = sharing.places(header.code.seed, number)
            own = own[places] * signs
        weights[tensor.name] = own.view(tensor.shape)
    return weights


def _candidates(header: NetworkHeader, message: Tensor) -> Iterator[Tensor]:
    """What the message of each code stands for."""
    start = 0
    for n_values, code in header.code.segments(header.n_values):
        end = start + code.message_bytes(n_values)
        yield decode_stream(message[start:end], code, n_values)
        start = end


def _digest(weights: Mapping[str, Tensor]) -> int:
    """The digest of all tensors, one after the other, as of one vector."""
    return digest(torch.cat([weight.flatten() for weight in weights.values()]))


def spec_of(name: str, tensor: Tensor, sharing: Sharing | None = None) -> SharedSpec:
    """How the format describes a tensor of a module.

    Raises:
        FormatError: its dtype is none of the format's.
    """
    found = DTYPE_NAMES.get(tensor.dtype)
    if found not in DTYPES:
        raise FormatError(
            f"{name}: expected one of {', '.join(DTYPES)}, found {tensor.dtype}; cast the module "
            "to one of them"
        )
    kind, n_values = (KINDS.index(sharing.kind), sharing.n_values) if sharing else (0, tensor.numel())
    return SharedSpec(name, found, tuple(tensor.shape), kind, n_values)


def write_network(
    path: Path,
    coded: Mapping[str, bytes],
    plain: Mapping[str, Tensor],
    check: Callable[[Path], None] = lambda written: None,
    half: Collection[str] = (),
) -> int:
    """One safetensors file of coded entries and plain tensors; returns its bytes.

    Args:
        half: names of float32 tensors among them to store in 16 bits.
        check: called on what was written before it gets its name, which it does not if this raises.

    Raises:
        FormatError: a plain tensor has the stream's name, or a dtype that safetensors has not.
        OutputWriteError: the file cannot be written; none is left half-written under its name.
    """
    if STREAM in plain:
        raise FormatError(f"{STREAM}: this name is that of the stream; give the module's tensor another one")
    plain = {name: t.detach().half() if name in half else t.detach() for name, t in plain.items()}
    raw = {name: raw_bytes(tensor.cpu()) for name, tensor in plain.items()}
    entries = network_entries(plain, {name: len(data) for name, data in coded.items()})
    file = network_file(path.name, entries, half)
    everything = {**raw, **coded}
    with temporary_beside(path) as temporary:
        written = temporary / file.name
        file.write(temporary, lambda entry: everything[entry.name])
        check(written)
        n_bytes = written.stat().st_size
        with writing(path):
            written.replace(path)
    return n_bytes


def network_file(name: str, entries: list[TensorSpec], half: Collection[str] = ()) -> OutputFile:
    """A network's file, with a guard unless a stream, which checks itself, is all that it holds.

    Args:
        half: names of entries in 16 bits that stand for 32.
    """
    metadata = narrowing_metadata(entries, set(half))
    return OutputFile(name, entries, metadata, "" if is_stream_alone(entries) else GUARD_ALONE)


def network_entries(plain: Mapping[str, Tensor], coded: Mapping[str, int]) -> list[TensorSpec]:
    """The entries of plain tensors and of coded ones, whose bytes are given, in the order of a file.

    Raises:
        FormatError: a plain tensor has a dtype that safetensors has not.
    """
    entries = [
        TensorSpec(name, dtype_name(name, tensor), tuple(tensor.shape)) for name, tensor in plain.items()
    ]
    # Widest first, so that every tensor is aligned.
    entries.sort(key=lambda entry: (-plain[entry.name].element_size(), entry.name))
    return entries + [bytes_entry(name, n_bytes) for name, n_bytes in coded.items()]


def read_network(path: Path) -> tuple[bytes | None, dict[str, Tensor]]:
    """The bytes of the stream, if the file has one, and every other tensor; its guard is compared first.

    Raises:
        FormatError: and its subclasses: the file is not sound, or its stream is no vector of bytes.
        SourceError: a tensor's dtype is unknown to torch.
    """
    with files_kept_open():
        read_contents(path).check()
        narrow = narrowed_names(path)
        tensors = {tensor.name: tensor.load() for tensor in list_tensors([path])}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and (narrow is None or name in narrow):
            tensors[name] = tensor.float()
    stream = tensors.pop(STREAM, None)
    if stream is not None and not is_bytes(stream):
        raise FormatError(
            f"{path}: {STREAM}: expected a stream, a vector of bytes, found {stream.dtype} of shape "
            f"{tuple(stream.shape)}; the file is damaged or was not written by miracle-hub"
        )
    return None if stream is None else raw_bytes(stream), tensors
