"""The numba decoder equals the definition bit for bit, from any position, with any number of threads."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.code import Code
from miracle_hub.coding import cpu, numba_backend, reference
from miracle_hub.coding.digest import digest
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.order import banded_order
from miracle_hub.coding.rotation import hadamard
from tests.limits import HANG_SECONDS

SETTINGS = settings(max_examples=120, deadline=None, derandomize=True, database=None)

# One code for each of the three inner loops: one weight per step, table, Philox on the fly.
LOOPS = {"scalar": Code(10, 3, 1, 5, 1), "table": Code(9, 4, 11, 6, 2), "philox": Code(20, 7, 9, 2**40, 3)}


@st.composite
def streams(draw: st.DrawFn) -> tuple[torch.Tensor, Code, int]:
    """A random message of a random code, and its number of weights."""
    window_bits = draw(st.integers(1, 24))
    code = Code(
        window_bits,
        draw(st.integers(1, window_bits)),
        draw(st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 256))),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(0, 2**32 - 1)),
    )
    n = draw(st.integers(0, 200))
    message = draw(st.binary(min_size=code.message_bytes(n), max_size=code.message_bytes(n)))
    return torch.tensor(list(message), dtype=torch.uint8), code, n


def random_message(code: Code, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (code.message_bytes(n),), dtype=torch.uint8, generator=generator)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@SETTINGS
@given(streams())
def test_numba_decoder_equals_the_reference(stream: tuple[torch.Tensor, Code, int]) -> None:
    assert_same_bits(cpu.decode_stream(*stream), reference.decode_stream(*stream))


@SETTINGS
@given(streams(), st.data())
def test_decode_range_from_any_start_equals_the_slice(
    stream: tuple[torch.Tensor, Code, int], data: st.DataObject
) -> None:
    message, code, n = stream
    first = data.draw(st.integers(0, n))
    out = np.full(data.draw(st.integers(0, n - first)), np.nan, np.float32)
    cpu.decode_range(cpu.pad_message(message.numpy()), code, first, out)
    whole = reference.decode_stream(message, code, n)
    assert_same_bits(torch.from_numpy(out), whole[first : first + out.size])


@SETTINGS
@given(streams(), st.data())
def test_rows_of_bands_equal_those_of_the_definition(
    stream: tuple[torch.Tensor, Code, int], data: st.DataObject
) -> None:
    message, code, n = stream
    columns = data.draw(st.integers(1, max(1, n)))
    rows, width = n // columns, data.draw(st.integers(1, columns))
    whole = torch.empty(rows * columns)
    whole[banded_order(rows, columns, width)] = reference.decode_stream(message, code, rows * columns)
    first = data.draw(st.integers(0, rows))
    out = np.full((data.draw(st.integers(0, rows - first)), columns), np.nan, np.float32)
    cpu.decode_banded(cpu.pad_message(message.numpy()), code, rows, first, width, out)
    assert_same_bits(torch.from_numpy(out), whole.view(rows, columns)[first : first + len(out)])


@pytest.mark.parametrize("rotation", [1, 4])
@pytest.mark.parametrize("width", [1, 4, 5, 11, 12, 13])
@pytest.mark.parametrize("name", LOOPS)
def test_a_matrix_of_several_parts_in_bands_equals_the_definition(
    name: str, width: int, rotation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of every kind: single columns, whole, ragged, one, and wider than the matrix."""
    code, layout = LOOPS[name], MatrixLayout(12, rotation, width)
    parts = [
        CodedRows(rows, code, torch.rand(n_scales).bfloat16(), random_message(code, rows * 12))
        for rows, n_scales in ((7, 7), (1, 1), (19, 1))
    ]
    expected = []
    for part in parts:
        z = torch.empty(part.rows * 12)
        z[banded_order(part.rows, 12, width)] = reference.decode_stream(part.message, code, z.numel())
        expected.append(hadamard(z.view(-1, 12) * part.scales.float()[:, None], rotation))
    monkeypatch.setattr(numba_backend, "_TASK_WEIGHTS", 37)
    found, number = numba_backend.NumbaBackend().decode_matrix(parts, layout, torch.float32)
    assert_same_bits(found, torch.cat(expected))
    assert number == digest(torch.cat(expected).flatten())
    for part, rows in zip(parts, expected, strict=True):
        for first in (0, part.rows // 2):
            out = torch.empty(part.rows - first, 12)
            numba_backend.NumbaBackend().decode_rows(out, part, layout, first)
            assert_same_bits(out, rows[first:])


@pytest.mark.parametrize("name", LOOPS)
def test_each_inner_loop_equals_the_reference_on_a_long_stream(name: str) -> None:
    code, n = LOOPS[name], 5000
    message = random_message(code, n)
    by_table = code.step_weights << code.window_bits <= cpu._TABLE_LIMIT
    assert by_table == (name != "philox")
    assert_same_bits(cpu.decode_stream(message, code, n), reference.decode_stream(message, code, n))


def test_table_and_philox_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    code, n = LOOPS["table"], 1000
    message = random_message(code, n)
    by_table = cpu.decode_stream(message, code, n)
    monkeypatch.setattr(cpu, "_TABLE_LIMIT", 0)
    monkeypatch.setattr(cpu, "candidate_table", None)
    assert_same_bits(cpu.decode_stream(message, code, n), by_table)


def test_a_short_message_makes_no_table_of_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "candidate_table", None)
    code, n = Code(20, 1, 1, 3), 50
    message = random_message(code, n)
    assert_same_bits(cpu.decode_stream(message, code, n), reference.decode_stream(message, code, n))


@pytest.mark.parametrize("name", LOOPS)
def test_decoding_does_not_depend_on_the_number_of_threads(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, n = LOOPS[name], 1000
    message = random_message(code, n)
    monkeypatch.setattr(cpu, "_ROWS_PER_TASK_WEIGHTS", 37)
    assert_same_bits(cpu.decode_stream(message, code, n), reference.decode_stream(message, code, n))


def test_bits_behind_the_message_change_nothing() -> None:
    code, n = Code(7, 3, 2, 1), 9
    message = random_message(code, n)
    unused = 8 * message.numel() - code.message_bits(n)
    assert unused == 5
    flipped = message.clone()
    flipped[-1] ^= 2**unused - 1
    for decoder in (reference, cpu):
        assert_same_bits(decoder.decode_stream(flipped, code, n), decoder.decode_stream(message, code, n))
        flipped[-1] ^= 2**unused
        assert not torch.equal(
            decoder.decode_stream(flipped, code, n), decoder.decode_stream(message, code, n)
        )
        flipped[-1] ^= 2**unused


def test_windows_are_read_most_significant_bit_first() -> None:
    message = torch.tensor([0b10110010, 0b01110000], dtype=torch.uint8)
    states = reference.windows(message, Code(5, 2, 1), 4)
    assert states.tolist() == [0b10110, 0b11001, 0b00100, 0b10011]


@pytest.mark.parametrize("changed", [Code(8, 3, 4, 2), Code(8, 3, 4, 2**32), Code(8, 3, 4, 1, 1)])
def test_seed_and_stream_id_choose_other_candidates(changed: Code) -> None:
    code, n = Code(8, 3, 4, 1), 400
    message = random_message(code, n)
    same = (cpu.decode_stream(message, code, n) == cpu.decode_stream(message, changed, n)).float().mean()
    assert same < 0.05


def test_neighboring_eights_of_a_step_use_different_counters() -> None:
    values = reference.candidates(torch.arange(50), Code(8, 8, 24))
    groups = values.view(50, 3, 8)
    assert not (groups[:, 0] == groups[:, 1]).all(1).any()
    assert not (groups[:, 1] == groups[:, 2]).all(1).any()


def test_candidate_table_is_shared_by_step_sizes_and_read_only() -> None:
    table = cpu.candidate_table(Code(6, 2, 3, 9, 4))
    assert table is cpu.candidate_table(Code(6, 6, 3, 9, 4))
    assert torch.equal(
        torch.from_numpy(table.copy()), reference.candidates(torch.arange(64), Code(6, 6, 3, 9, 4))
    )
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 0


def test_candidate_range_starts_at_any_state() -> None:
    code = Code(22, 22, 9, 2**50, 6)
    found = cpu.candidate_range(code, 2**22 - 5, 5)
    assert np.array_equal(found, reference.candidates(torch.arange(2**22 - 5, 2**22), code).numpy())


def test_in_threads_runs_as_many_tasks_at_once_as_there_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "n_threads", lambda: 3)
    meeting = threading.Barrier(3, timeout=HANG_SECONDS)
    met: list[int] = []

    def work(number: int) -> None:
        meeting.wait()
        met.append(number)

    cpu.in_threads(work, ((number,) for number in range(3)))
    assert sorted(met) == [0, 1, 2]


def test_in_threads_raises_the_exception_of_a_task(threads: int) -> None:
    def work(number: int) -> None:
        if number == 2:
            raise KeyError(number)

    with pytest.raises(KeyError, match="2"):
        cpu.in_threads(work, [(number,) for number in range(4)])


def test_one_thread_works_in_the_thread_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "n_threads", lambda: 1)
    names: list[str] = []
    cpu.in_threads(lambda number: names.append(threading.current_thread().name), [(0,), (1,)])
    assert names == [threading.current_thread().name] * 2
