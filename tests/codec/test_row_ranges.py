"""Rows of different costs are cut where that saves most, and only where it saves."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.codec.row_ranges import row_ranges


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 400),
    most=st.integers(1, 20),
    fewest=st.integers(1, 50),
    seed=st.integers(0, 99),
    least=st.sampled_from([0.0, 0.01, 0.1]),
)
def test_ranges_are_all_rows_and_within_their_bounds(
    rows: int, most: int, fewest: int, seed: int, least: float
) -> None:
    cost = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) ** 8 + 1e-6
    found = row_ranges(cost, most, fewest, least)
    assert sum(found) == rows and 1 <= len(found) <= most
    assert min(found) >= min(fewest, rows)


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.lists(st.integers(20, 90), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_cuts_are_where_costs_change(blocks: list[int], seed: int) -> None:
    """No two neighbors have the same cost, and no range is too short."""
    steps = torch.randint(0, 2, (len(blocks),), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    levels = (2.0 ** (3 * steps.cumsum(0))).tolist()
    cost = torch.cat([torch.full((n,), level) for n, level in zip(blocks, levels, strict=True)])
    ends, own = (set(accumulate(parts)) for parts in (row_ranges(cost, 16, 20, 0.0), blocks))
    assert own <= ends | {0}


@pytest.mark.parametrize(("times", "n_found"), [(1.0, 1), (1.1, 1), (4.0, 2)])
def test_rows_of_nearly_equal_costs_stay_together(times: float, n_found: int) -> None:
    cost = torch.cat((torch.ones(300), torch.full((300,), times)))
    assert len(row_ranges(cost, 16, 10, 0.005)) == n_found


def test_rows_without_any_cost_are_no_trouble() -> None:
    assert sum(row_ranges(torch.zeros(100), 4, 10, 0.005)) == 100
    assert row_ranges(torch.cat((torch.zeros(50), torch.ones(50))), 4, 10, 0.005)[0] == 50
