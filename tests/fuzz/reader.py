"""What the fuzzer calls with any bytes: every reader, none of which may raise anything but a MiracleError.

The first byte chooses what the others are. Some kinds get right checksums and fitting lengths, or mutations
would end there; what is read then has to be what the decoders of tests/golden read.
"""

import atexit
import json
import runpy
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from miracle_hub.api import verify
from miracle_hub.code import Code, SplitCode, StreamCode
from miracle_hub.codec import payloads
from miracle_hub.codec.bits import BitsPayload, bits_payload
from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.exact import bits_digest
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.modules import read_state
from miracle_hub.codec.network import decode_stream_entry, encode_stream_entry
from miracle_hub.codec.packed import PackedMatrix, is_packable
from miracle_hub.codec.trellis import check_payload, decode_payload
from miracle_hub.coding.backend import choose
from miracle_hub.coding.digest import digest
from miracle_hub.errors import MiracleError
from miracle_hub.format.bits import encode_bits
from miracle_hub.format.network import SharedSpec, decode_network, structure
from miracle_hub.format.payload import _Reader
from miracle_hub.format.varint import read_varint
from miracle_hub.options import DecompressOptions
from miracle_hub.plugin.config import MiracleConfig

GOLDEN = Path(__file__).parents[1] / "golden"
PAYLOADS, NETWORKS, EXACT, LOSSLESS = (
    runpy.run_path(str(GOLDEN / f"{name}_decoder.py")) for name in ("payload", "network", "exact", "lossless")
)
EXACT_CASES = json.loads((GOLDEN / "exact.json").read_text(encoding="utf-8"))
CASES = json.loads((GOLDEN / "network.json").read_text(encoding="utf-8"))
REGRESSIONS = Path(__file__).with_name("regressions")
REPOSITORIES = sorted(GOLDEN.glob("repository_[0-9]*"))
MODULE = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))
MOST_COMPARED, MOST_FITTED, MOST_BY_BITS = 1 << 14, 1 << 16, 1 << 8  # weights
WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))
atexit.register(shutil.rmtree, WORK, ignore_errors=True)


def one_input(data: bytes) -> None:
    """
    Raises:
        Exception: a reader raised something else than a MiracleError, or read what is not there.
    """
    if data:
        KINDS[data[0] % len(KINDS)](data[1:])


def allowed(read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a reader gives; None if it refuses."""
    try:
        return read(*args, **options)
    except MiracleError as error:
        assert str(error), "an error says what is wrong"
        return None


def read_file(data: bytes) -> None:
    path = WORK / "file.safetensors"
    path.write_bytes(data)
    for compares in (True, False):
        allowed(load_state_dict, path, verify=compares)
    allowed(inspect_folder, path)
    allowed(read_state, path, MODULE)
    allowed(verify, path, backend="cpu")


def read_sealed_file(data: bytes) -> None:
    """With right checksums in its payloads and its stream."""
    sealed = bytearray(data)
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for first, last in [entry["data_offsets"] for entry in header.values()]:
            sealed[start + first : start + last] = seal(data[start + first : start + last])
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        pass
    read_file(bytes(sealed))


def seal(data: bytes) -> bytes:
    if data[:4] not in (b"MRCL", b"MRCN", b"MRCX", b"MRCB") or len(data) < 9:
        return data
    return data[:5] + zlib.crc32(data[9:]).to_bytes(4, "little") + data[9:]


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def read_payload(data: bytes) -> None:
    decoded = allowed(decode_payload, as_tensor(data), "w", verify=False)
    if decoded is None:
        return
    weights, header = decoded
    start = check_payload(data, "w")[1]
    right = digest(weights.flatten()).to_bytes(8, "little")
    whole = seal(data[: start - 8] + right + data[start:])
    assert torch.equal(decode_payload(as_tensor(whole), "w")[0], weights)
    if is_packable(header):
        packed = PackedMatrix(as_tensor(whole), "w", torch.float32)
        packed.source_dtype = torch.float32
        assert torch.equal(torch.cat([band.clone() for _, band in packed._bands()]), weights)
    if header.n_weights <= MOST_COMPARED:
        assert PAYLOADS["decode"](whole)[1].tobytes() == weights.numpy().tobytes()


def read_sealed_payload(data: bytes) -> None:
    read_payload(seal(data))


def read_fitted_payload(data: bytes) -> None:
    """With scales and messages of the lengths that the header asks for."""
    reader = _Reader(data, "w")
    header = allowed(reader.header)
    if header is not None and header.n_weights <= MOST_FITTED:
        bits = [s.code.message_bits(s.rows * header.columns) for s in header.segments]
        body = fitted(data[reader.position :], header.n_scales, bits)
        read_sealed_payload(b"MRCL\1" + data[5 : reader.position] + body)


def fitted(data: bytes, n_scales: int, message_bits: list[int]) -> bytes:
    """As many scales and messages, sound ones, as like `data` as possible."""
    n_bytes = 2 * n_scales + sum(-(-bits // 8) for bits in message_bits)
    body = np.frombuffer((data or b"a") * (n_bytes // max(1, len(data)) + 1), np.uint8)[:n_bytes].copy()
    scales = body[: 2 * n_scales].view("<u2")
    wrong = (scales < 0x1F80) | (scales > 0x5F80)
    scales[wrong] = 0x3F80 + scales[wrong] % 0x80
    end = 2 * n_scales
    for bits in message_bits:
        end += -(-bits // 8)
        body[end - 1] &= 0xFF << (-bits % 8) & 0xFF
    return body.tobytes()


def read_exact(data: bytes) -> None:
    """With a right checksum and digest."""
    data = seal(b"MRCX\1" + data[5:])
    found = allowed(payloads.read, as_tensor(data), "w")
    tensor = found and allowed(found.decode, choose("cpu"), verify=False)
    if tensor is not None:
        at = found.start
        right = bits_digest(raw_bytes(tensor)).to_bytes(8, "little")
        whole = seal(data[: at - 8] + right + data[at:])
        again = payloads.read(as_tensor(whole), "w")
        assert again and raw_bytes(again.decode(choose("cpu"))) == EXACT["decode"](whole)[2]


def read_bits(data: bytes) -> None:
    """With a right checksum and digest, beside a base of ones."""
    found = allowed(payloads.read, as_tensor(seal(b"MRCB\1" + data[5:])), "w")
    if not isinstance(found, BitsPayload) or found.header.n_weights > MOST_BY_BITS:
        return
    base = torch.ones(found.header.shape)
    tensor = allowed(found.onto, base, choose("cpu"), verify=False)
    if tensor is not None:
        header = replace(found.header, digest=bits_digest(raw_bytes(tensor)))
        whole = encode_bits(header, found.pieces)
        again = payloads.read(as_tensor(whole), "w")
        assert isinstance(again, BitsPayload)
        assert raw_bytes(again.onto(base, choose("cpu"))) == raw_bytes(tensor)
        assert LOSSLESS["decode"](whole, "F32", raw_bytes(base))[2] == raw_bytes(tensor)


def read_network(data: bytes) -> None:
    """For the module that the first byte chooses."""
    case = CASES[data[0] % len(CASES)] if data else CASES[0]
    allowed(decode_stream_entry, data[1:], specs_of(case), "n")


def read_sealed_network(data: bytes) -> None:
    """With right checksums, that of the module among them, and a message of the right length."""
    case, data = (CASES[data[0] % len(CASES)], data[1:]) if data else (CASES[0], data)
    specs, position, version = specs_of(case), 9, 2 if data[4:5] == b"\2" else 1
    numbers, n_values = list[int](), 0
    try:
        for _ in range(5 if version == 1 else 8):
            number, position = read_varint(data, position, "", (0, 2**64), "")
            numbers.append(number)
        for spec in specs:
            kind, position = read_varint(data, position, "", (0, 2), "")
            own = spec.n_values
            if kind:
                own, position = read_varint(data, position, "", (0, 2**64), "")
            n_values += own
        code: StreamCode = Code(*numbers[:4])
        if version == 2:
            code = SplitCode(code, numbers[4], Code(numbers[0], numbers[5], numbers[6], numbers[3]))
        if min(n for n, _ in code.segments(n_values)) < 1:
            return
        bits = [own.message_bits(n) for n, own in code.segments(n_values)]
    except MiracleError:
        return
    if n_values <= MOST_FITTED:
        body = fitted(data[position + 12 :], len(specs), bits)
        crc = structure(specs).to_bytes(4, "little")
        start = b"MRCN" + bytes([version]) + data[5:position]
        compare_network(seal(start + crc + bytes(8) + body), case)


def compare_network(data: bytes, case: dict[str, Any]) -> None:
    """With the digest of what it decodes to."""
    specs = specs_of(case)
    found = allowed(decode_network, data, specs, "n")
    if found is not None:
        header, scales, message = found
        words = as_tensor(scales).view(torch.bfloat16)
        whole, weights = encode_stream_entry(header, words, as_tensor(message))
        decode_stream_entry(whole, specs, "n")
        again = NETWORKS["decode"](whole, case["tensors"])
        assert all(again[name].tobytes() == w.numpy().tobytes() for name, w in weights.items())


def specs_of(case: dict[str, Any]) -> tuple[SharedSpec, ...]:
    shapes = [(name, dtype, tuple(shape)) for name, dtype, shape in case["tensors"]]
    return tuple(
        SharedSpec(name, dtype, shape, 0, torch.Size(shape).numel()) for name, dtype, shape in shapes
    )


def read_config(data: bytes) -> None:
    read_repository("config.json", data)
    try:
        facts = json.loads(data[1:])["quantization_config"]
    except (KeyError, RecursionError, TypeError, ValueError):
        return
    if isinstance(facts, dict):
        config = allowed(MiracleConfig, **facts)
        assert config is None or config.to_dict()


def read_index(data: bytes) -> None:
    read_repository("model.safetensors.index.json", data)


def read_repository(name: str, data: bytes) -> None:
    """A sound repository, which the first byte chooses, but for one of its files."""
    source = REPOSITORIES[data[0] % len(REPOSITORIES)] if data else REPOSITORIES[0]
    folder = WORK / source.name
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data[1:])
    loaded = allowed(load_state_dict, folder)
    verification = allowed(verify, folder, backend="cpu")
    assert loaded is not None or verification is None or verification.defects, "what is sound loads"
    allowed(inspect_folder, folder)
    allowed(decompress_folder, folder, WORK / "dense", DecompressOptions(overwrite=True, progress=False))


# The position is the first byte of an input, regressions among them: append only.
KINDS = (
    read_file,
    read_sealed_file,
    read_payload,
    read_sealed_payload,
    read_fitted_payload,
    read_network,
    read_sealed_network,
    read_config,
    read_index,
    read_exact,
    read_bits,
)


def seeds() -> list[bytes]:
    """Sound inputs of every kind, from the files of tests/golden, and what was found before."""
    files = [path.read_bytes() for path in sorted(GOLDEN.rglob("*.safetensors"))]
    sound = [path.read_bytes() for path in sorted(GOLDEN.glob("payload_*.bin"))]
    streams = [bytes([i]) + bytes.fromhex(case["stream"]) for i, case in enumerate(CASES)]
    names = ("config.json", "model.safetensors.index.json")
    texts = [[bytes([i]) + (r / name).read_bytes() for i, r in enumerate(REPOSITORIES)] for name in names]
    exact = [bytes.fromhex(payload) for payload, _ in EXACT_CASES.values()]
    ones = [torch.ones(40, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    bits = [bits_payload(one * torch.arange(40).to(one), one) or b"" for one in ones]
    of_kind = [files, files, sound, sound, sound, streams, streams, *texts, exact, bits]
    regressions = [path.read_bytes() for path in sorted(REGRESSIONS.glob("*.bin"))]
    return [bytes([kind]) + seed for kind, found in enumerate(of_kind) for seed in found] + regressions
