"""A network's file: its stream beside plain tensors, named errors for what is wrong, whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.dtypes import DTYPE_NAMES
from miracle_hub.codec.network import decode_stream_entry, read_network, spec_of, write_network
from miracle_hub.coding.sharing import Sharing
from miracle_hub.errors import FormatError, OutputWriteError
from miracle_hub.format.network import NetworkHeader, encode_network
from tests.codec.network_streams import CODES, made_up, small


def plain_tensors() -> dict[str, Tensor]:
    """What a state dict can hold: every dtype that there is a name for, no dimension, nothing, strides."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{dtype}": torch.randn(3, 5, generator=generator).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {f"{d}": torch.arange(7).to(d) for d in (torch.int64, torch.int32, torch.int16, torch.int8)}
    strides = torch.randn(4, 6, generator=generator).T[::2]
    return tensors | {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(2**40),
        "nothing": torch.zeros(0, 3),
        "strides": strides,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_a_file_gives_back_its_stream_and_every_other_tensor(tmp_path: Path) -> None:
    data, tensors, _ = made_up(CODES[0], 1)
    path, plain = tmp_path / "net.safetensors", plain_tensors()
    write_network(path, {"miracle": data}, plain)
    stream, others = read_network(path)
    assert stream is not None and stream == data and others.keys() == plain.keys()
    for name, tensor in plain.items():
        assert others[name].dtype == tensor.dtype and others[name].shape == tensor.shape
        assert torch.equal(others[name], tensor)
    assert decode_stream_entry(stream, tensors, "net").keys() == {t.name for t in tensors}
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]
    assert load_file(path).keys() == {*plain, "miracle"}  # a file that safetensors itself reads


def test_a_file_without_a_stream_says_so(tmp_path: Path) -> None:
    write_network(tmp_path / "f", {"fc.weight": b"MRCL payload"}, {"bias": torch.ones(3)})
    stream, tensors = read_network(tmp_path / "f")
    assert stream is None and torch.equal(tensors["bias"], torch.ones(3))
    assert tensors["fc.weight"].numpy().tobytes() == b"MRCL payload"


LENET_5 = ((20, 1, 5, 5), (20,), (50, 20, 5, 5), (50,), (500, 800), (500,), (10, 500), (10,))


@pytest.mark.parametrize("code", [Code(14, 1, 50), Code(12, 12, 256), Code(20, 1, 256, seed=2**20)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_of_lenet_5_is_message_and_scales_and_120_bytes(
    code: Code, shared: bool, tmp_path: Path
) -> None:
    names = [f"{layer}.{part}" for layer in ("conv1", "conv2", "fc1", "fc2") for part in ("weight", "bias")]
    tensors = [
        spec_of(
            name,
            torch.empty(shape, device="meta"),
            Sharing("hash", 6250, 400_000) if shared and name == "fc1.weight" else None,
        )
        for name, shape in zip(names, LENET_5, strict=True)
    ]
    header = NetworkHeader(code, tuple(tensors))
    message = bytes(code.message_bytes(header.n_values))
    data = encode_network(header, bytes(2 * 8), message)
    write_network(tmp_path / "lenet", {"miracle": data}, {})
    assert (tmp_path / "lenet").stat().st_size <= len(message) + 2 * 8 + 120


def test_a_dtype_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as raised:
        write_network(tmp_path / "f", {}, {"phase": torch.zeros(3, dtype=torch.complex64)})
    assert str(raised.value).startswith("phase: expected one of F64, F32, F16, BF16, I64, ")
    assert str(raised.value).endswith(
        "found torch.complex64; cast it, or make it a buffer that is not persistent"
    )
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_the_streams_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as raised:
        write_network(tmp_path / "f", {"miracle": small()}, {"miracle": torch.zeros(3)})
    assert str(raised.value) == (
        "miracle: this name is that of the stream; give the module's tensor another one"
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "f", tmp_path / "folder"):
        with pytest.raises(OutputWriteError, match=f"{path.name}.*: cannot be written: "):
            write_network(path, {"miracle": small()}, {"b": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_network(path, {"miracle": small()}, {})
    before = path.read_bytes()
    with pytest.raises(FormatError):
        write_network(path, {"miracle": small()}, {"phase": torch.zeros(3, dtype=torch.complex64)})
    assert path.read_bytes() == before
    write_network(path, {}, {"b": torch.ones(3)})
    assert read_network(path)[0] is None


def test_no_truncated_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_network(path, {"miracle": small()}, {"b": torch.ones(3)})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match=f"f: expected a safetensors file, found {length} bytes"):
            read_network(path)


@pytest.mark.parametrize("stream", [torch.zeros(30), torch.tensor(7, dtype=torch.uint8), torch.zeros(0)])
def test_anything_else_under_the_streams_name_is_no_stream(stream: Tensor, tmp_path: Path) -> None:
    save_file({"miracle": stream}, tmp_path / "f")
    with pytest.raises(FormatError) as raised:
        read_network(tmp_path / "f")
    assert str(raised.value) == (
        f"{tmp_path / 'f'}: miracle: expected a stream, a vector of bytes, found {stream.dtype} of shape "
        f"{tuple(stream.shape)}; the file is damaged or was not written by miracle-hub"
    )
