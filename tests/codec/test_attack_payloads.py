"""Hostile payloads: a few bytes that claim much are refused before anything is allocated."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import miracle_hub
from miracle_hub.code import Code
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.network import write_network
from miracle_hub.errors import FormatError, TruncatedPayloadError
from miracle_hub.files import container
from miracle_hub.files.container import write_file
from miracle_hub.format.payload import Header, Segment, encode_header, encode_payload
from miracle_hub.format.spec import bytes_entry
from tests.codec.attacks import DAMAGED, ONE_BIT, cheap, refused, save_payload, sealed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


BOMBS = {
    "2^40 weights": Header("F32", (2**20, 2**20), 2**20, 1, (Segment(2**20, ONE_BIT, False),)),
    "2^40 scales": Header("F32", (2**40, 1), 1, 1, (Segment(2**40, ONE_BIT, True),)),
    "64 segments of 2^34 weights": Header("F32", (2**40,), 2**34, 1, (Segment(1, ONE_BIT, False),) * 64),
    "a permuted stream in bands": Header("F32", (2**40,), 2**40, 1, (Segment(1, ONE_BIT, False),), 1, True),
    "long windows": Header("F32", (2**40,), 2**40, 1, (Segment(1, Code(24, 24, 1), False),)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_that_claim_a_trillion_weights_are_refused_at_once(name: str, folder: Path) -> None:
    header = BOMBS[name]
    assert header.n_weights == 2**40 and header.payload_bytes > 2**29
    bomb = sealed(encode_header(header) + bytes(200))
    save_payload(folder, bomb)
    with cheap():
        found = refused(folder, TruncatedPayloadError)
    n_bytes = header.payload_bytes
    assert found == f"w: the header announces a payload of {n_bytes} bytes, found {len(bomb)}{DAMAGED}"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (
            Header("F32", (2**40, 2**40), 2**40, 1, (Segment(2**40, ONE_BIT, False),)),
            "(1099511627776, 1099511627776)",
        ),
        (
            Header("F32", (2**40,) * 8, 2**40, 1, (Segment(1, ONE_BIT, False),)),
            f"({', '.join([str(2**40)] * 8)})",
        ),
    ],
)
def test_a_shape_whose_product_overflows_is_refused(header: Header, found: str, folder: Path) -> None:
    bomb = sealed(encode_header(header) + bytes(200))
    save_payload(folder, bomb)
    assert refused(folder) == (
        f"w: byte {len(encode_header(header))} of the payload header: expected {header.rows} rows × "
        f"{header.columns} columns to fill the shape, found {found}; the file is damaged or was not written "
        "by miracle-hub"
    )


def test_narrow_bands_of_a_sound_payload_cost_no_more_than_its_weights(folder: Path) -> None:
    """A million bands of one column: 555 bytes that took 11 seconds and 1.3 GB."""
    header = Header("F32", (2**20,), 2**20, 1, (Segment(1, ONE_BIT, False),), 1)
    save_payload(folder, encode_payload(header, bytes(2 + sum(header.message_bytes))))
    tracemalloc.start()
    try:
        assert load_state_dict(folder, verify=False)["w"].shape == (2**20,)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_file_of_many_tensors_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor used to open it again: 4,000 of them, 0.4 MB, took 27 seconds."""
    header = Header("F32", (1,), 1, 1, (Segment(1, Code(4, 1, 1), False),))
    payload = encode_payload(header, bytes(2 + sum(header.message_bytes)))
    entries = [bytes_entry(f"layer.{i}", len(payload)) for i in range(300)]
    write_file(folder / "model.safetensors", entries, {}, lambda entry: payload)
    real, opens = container._open, []
    monkeypatch.setattr(container, "_open", lambda path: opens.append(path) or real(path))
    assert len(inspect_folder(folder).tensors) == len(load_state_dict(folder, verify=False)) == 300
    assert len(opens) == 2


def test_a_payload_of_another_shape_than_the_modules_is_not_decoded(tmp_path: Path) -> None:
    header = Header("F32", (2**22,), 2**22, 1, (Segment(1, ONE_BIT, False),))
    payload = encode_payload(header, bytes(2 + sum(header.message_bytes)))
    write_network(tmp_path / "f", {"weight": payload}, {"bias": torch.zeros(2)})
    with cheap(), pytest.raises(FormatError) as raised:
        miracle_hub.load(tmp_path / "f", nn.Linear(2, 2))
    assert str(raised.value) == (
        f"{tmp_path / 'f'}: weight: expected shape (2, 2), found (4194304,); load it into the module that it "
        "was made from"
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.uint8, torch.bool])
def test_numbers_of_another_kind_than_the_modules_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2, dtype=dtype), "bias": torch.zeros(2)}, tmp_path / "f")
    with pytest.raises(FormatError) as raised:
        miracle_hub.load(tmp_path / "f", nn.Linear(2, 2))
    assert str(raised.value) == (
        f"{tmp_path / 'f'}: weight: expected torch.float32, found {dtype}; load it into the module that it "
        "was made from"
    )
    save_file({"weight": torch.ones(2, 2).double(), "bias": torch.zeros(2).half()}, tmp_path / "f")
    loaded = miracle_hub.load(tmp_path / "f", nn.Linear(2, 2)).state_dict()
    assert torch.equal(loaded["weight"], torch.ones(2, 2))


def test_inspection_refuses_scales_that_no_reader_takes(folder: Path) -> None:
    header = Header("F32", (4,), 4, 1, (Segment(1, ONE_BIT, False),))
    save_payload(folder, encode_payload(header, b"\xc0\x7f" + bytes(sum(header.message_bytes))))
    start = len(encode_header(header))
    assert refused(folder) == (
        f"w: scale 0 at byte {start} of the payload: expected 0 or a number from 2^-64 to 2^64, found nan; "
        "the file is damaged: download it again"
    )
