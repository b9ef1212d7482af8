"""A codec is one file and one line: a toy codec goes through every verb, none of which knows it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

import miracle_hub
from miracle_hub.codec import payloads
from miracle_hub.codec.payloads import Packed, PayloadFacts, Request
from miracle_hub.codec.rates import Choice, Option
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.digest import digest
from miracle_hub.errors import ChecksumError, FormatError, OptionError
from miracle_hub.format.frame import SIZE, Frame
from miracle_hub.format.spec import TensorSpec

# Codes matrices that hold one number: that number, and the shape.
FRAME = Frame(b"TOY1", (1,), "toy payload", 13)
WORD = "embeddings.position_embeddings.weight"


class ConstantPayload:
    """See `payloads.Payload`."""

    def __init__(self, data: Tensor, where: str) -> None:
        raw = data.cpu().numpy().tobytes()
        FRAME.check(raw, where)
        self.where, rest = where, raw[SIZE:]
        self.value = torch.frombuffer(bytearray(rest[:4]), dtype=torch.float32)
        self.digest = int.from_bytes(rest[4:12], "little")
        self.shape = tuple(int.from_bytes(rest[i : i + 4], "little") for i in range(13, len(rest), 4))
        if rest[12] != len(self.shape):
            raise FormatError(
                f"{where}: expected {rest[12]} dimensions, found {len(self.shape)}; a toy broke"
            )

    @property
    def facts(self) -> PayloadFacts:
        """One number for all."""
        return PayloadFacts(CONSTANT.name, "F32", self.shape, self.digest)

    def decode(self, backend: Backend, *, verify: bool = True, rounded: bool = False) -> Tensor:
        """The number, everywhere."""
        weights = self.value.expand(self.shape).contiguous()
        if verify and digest(weights.flatten()) != self.digest:
            raise ChecksumError(f"{self.where}: expected digest {self.digest}, found another; a toy broke")
        return weights.to(backend.device)

    def packed(self, dtype: torch.dtype | None, backend: str) -> Packed:
        """Never."""
        raise OptionError(f"{self.where}: expected rows, found one number; load this tensor dense")


class Constant:
    """See `payloads.Codec`."""

    name, magic = "constant", FRAME.magic

    def read(self, data: Tensor, where: str) -> ConstantPayload:
        """A toy payload."""
        return ConstantPayload(data, where)

    def survey(self, spec: TensorSpec, weights: Tensor, request: Request, is_difference: bool = False) -> Any:
        """The only number of a tensor, if it has one only."""
        return spec if spec.dtype == "F32" and bool((weights == weights.flatten()[0]).all()) else None

    def offers(self, surveys: Sequence[Any], request: Request) -> list[list[Option]]:
        """No error, for a few bytes."""
        return [[Option(None, self._bytes(spec), 0.0, self.name, splits=False)] for spec in surveys]

    def payload_bytes(self, spec: TensorSpec, choice: Choice) -> int:
        """Frame, number, digest and shape."""
        return self._bytes(spec)

    def _bytes(self, spec: TensorSpec) -> int:
        return SIZE + 13 + 4 * len(spec.shape)

    def encode(self, weights: Tensor, choice: Choice, where: str, backend: Backend) -> bytes:
        """The number, the digest, the shape."""
        numbers = b"".join(n.to_bytes(4, "little") for n in weights.shape)
        value = weights.flatten()[:1].numpy().tobytes()
        mark = digest(weights.flatten()).to_bytes(8, "little")
        return FRAME.seal(value + mark + bytes([weights.ndim]) + numbers)


CONSTANT = Constant()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the registry."""
    monkeypatch.setitem(payloads.CODECS, FRAME.magic, f"{__name__}:CONSTANT")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config.vocab_size, config.max_position_embeddings = 100, 64
    torch.manual_seed(0)
    model = BertModel(config)
    model.get_parameter(WORD).data.fill_(0.37)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file by its own name, as a codec's file is by that of its module."""
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(CONSTANT=CONSTANT))  # type: ignore[arg-type]


@pytest.mark.usefixtures("registered", "importable")
def test_a_codec_of_one_file_and_one_line_goes_through_every_verb(source: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    miracle_hub.compress(source, out, bits_per_weight=4, window_bits=8, progress=False)
    reports = {tensor.name: tensor for tensor in miracle_hub.inspect(out).tensors}
    assert reports[WORD].codec == "constant" and reports[WORD].n_bytes == SIZE + 13 + 8
    assert {t.codec for t in reports.values() if not t.reason} == {"constant", "trellis"}
    expected = torch.full((64, 64), 0.37)
    assert torch.equal(miracle_hub.load_state_dict(out)[WORD], expected)
    assert torch.equal(BertModel.from_pretrained(out).get_parameter(WORD), expected)
    config = miracle_hub.MiracleConfig(keep_compressed=True)
    assert torch.equal(
        BertModel.from_pretrained(out, quantization_config=config).get_parameter(WORD), expected
    )
    found = miracle_hub.verify(out, dense=source)
    assert found.defects == () and found.n_coded == sum(1 for t in reports.values() if not t.reason)
    miracle_hub.decompress(out, dense, progress=False)
    assert torch.equal(BertModel.from_pretrained(dense).get_parameter(WORD), expected)


@pytest.mark.usefixtures("registered", "importable")
def test_its_defects_are_found_like_any_other(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    miracle_hub.compress(source, out, bits_per_weight=4, window_bits=8, progress=False)
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(FRAME.magic) + SIZE] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"^{WORD}: bytes 9 to \d+ of the toy payload: expected CRC-32"):
        miracle_hub.load_state_dict(out)
    assert WORD in miracle_hub.verify(out).defects[0]


def test_without_its_line_it_is_no_payload(
    source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    miracle_hub.compress(source, out, bits_per_weight=4, window_bits=8, progress=False)
    assert {t.codec for t in miracle_hub.inspect(out).tensors if not t.reason} == {"trellis"}


def test_every_codec_has_a_name_and_a_magic_of_its_own() -> None:
    codecs: list[Callable] = [type(codec) for codec in payloads.codecs()]
    assert len({codec.name for codec in payloads.codecs()}) == len(codecs) == len(payloads.CODECS)
    for codec in payloads.codecs():
        assert payloads.codec_of(codec.magic) is codec is payloads.codec_named(codec.name)
