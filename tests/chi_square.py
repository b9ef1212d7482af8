"""Pearson's chi-square test of counts against a law."""

import numpy as np
from scipy.stats import chi2

LEAST_EXPECTED = 5  # below this the approximation is poor, and cells are merged


def p_value(counts: np.ndarray, expected: np.ndarray, least_cells: int) -> float:
    """Rare cells are merged into one, with the least of the others if need be.

    Args:
        least_cells: how many must be left, or the test would see nothing.
    """
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    merged = int(np.searchsorted(np.cumsum(expected), LEAST_EXPECTED)) + 1
    merged = max(merged, int((expected < LEAST_EXPECTED).sum()))
    counts = np.append(counts[merged:], counts[:merged].sum())
    expected = np.append(expected[merged:], expected[:merged].sum())
    assert expected.min() >= LEAST_EXPECTED and expected.size >= least_cells
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), expected.size - 1))
