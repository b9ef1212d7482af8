"""One pass forth and back over the inputs: what an error of each weight costs the model's answers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from miracle_hub.calibrate.finite import require_finite
from miracle_hub.calibrate.outputs import answers, device_of, parts, sampled_gradient
from miracle_hub.calibrate.precision import fast_products
from miracle_hub.codec.curvature import Curvature
from miracle_hub.coding.matrix import matrix_columns

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
# Positions of a convolution's output that are looked at, per batch: a choice.
_MOST_POSITIONS = 4096


@dataclass
class _Sums:
    """Of one use of a weight, in its own matrix view.

    Attributes:
        rows: squared gradients, `[rows]`.
        columns: second moments weighted by squared gradients, `[columns, columns]`; None for the unit matrix.
            Once everything is added, divided by the weight.
        weight: the sum of those gradients.
    """

    rows: Tensor
    columns: Tensor | None
    weight: float = 0.0


@dataclass
class Sensitivity:
    """What was measured of every weight of a model; see `measure`.

    Attributes:
        aliases: of every name of a weight, the one under which `sums` has it: tied weights have several, of
            which a file has any one.
    """

    n_tokens: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)
    sums: dict[str, dict[str, _Sums]] = field(default_factory=dict)

    def add(self, name: str, use: str, x: Tensor, gradient: Tensor, shape: torch.Size) -> None:
        """Inputs `[n, in]` and gradients of outputs `[n, out]` of a matrix `[out, in]`."""
        new = partial(torch.zeros, dtype=torch.float32, device=x.device)
        found = self._of(name, use, lambda: _Sums(new(shape[0]), new(shape[1], shape[1])))
        assert found.columns is not None
        for some in parts(gradient):
            power, own = gradient[some].float().square(), x[some].float()
            per_token = power.sum(1)
            found.rows += power.sum(0)
            # In bfloat16 they took half the time, and those of one matrix of SmolLM2 had no Cholesky factor.
            found.columns.addmm_((own * per_token[:, None]).T, own)
            found.weight += float(per_token.sum())

    def add_rows(self, name: str, use: str, rows: Tensor) -> None:
        """Squared gradients of the rows of a matrix, `[rows]`, means over their columns."""
        found = self._of(name, use, lambda: _Sums(torch.zeros_like(rows), None))
        found.rows += rows
        found.weight += float(rows.sum())

    def add_looked_up(self, name: str, use: str, ids: Tensor, gradient: Tensor, n_rows: int) -> None:
        """Rows of a matrix that were looked up, `[n]`, and their gradients, `[n, columns]`.

        An error e of a row costs (e · gradient)², so that gradients are here what inputs are elsewhere.
        """
        rows = gradient.new_zeros(n_rows).index_add_(0, ids, gradient.square().mean(1))
        moments = gradient.T @ gradient
        found = self._of(name, use, lambda: _Sums(torch.zeros_like(rows), torch.zeros_like(moments)))
        assert found.columns is not None
        found.rows += rows
        found.columns += moments
        found.weight += float(rows.sum())

    def finish(self) -> None:
        """Make means of sums, on the CPU, when everything is added."""
        for use in self._uses():
            use.rows = use.rows.cpu()
            if use.columns is not None and use.weight > 0:
                use.columns = use.columns.div_(use.weight).cpu()

    def _of(self, name: str, use: str, new: Callable[[], _Sums]) -> _Sums:
        known = self.sums.setdefault(name, {})
        return known[use] if use in known else known.setdefault(use, new())

    def tensors(self) -> dict[str, Tensor]:
        """All sums, for a file; see `of_tensors`."""
        found = dict[str, Tensor]()
        for i, use in enumerate(self._uses()):
            found[f"rows.{i}"] = use.rows
            if use.columns is not None:
                found[f"columns.{i}"] = use.columns
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What there is beside tensors, as JSON has it."""
        names = [[name, use] for name, uses in self.sums.items() for use in uses]
        weights = [use.weight for use in self._uses()]
        return {"n_tokens": self.n_tokens, "aliases": self.aliases, "names": names, "weights": weights}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "Sensitivity":
        """What `tensors` and `facts` are of."""
        found = cls(facts["n_tokens"], facts["aliases"])
        for i, ((name, use), weight) in enumerate(zip(facts["names"], facts["weights"], strict=True)):
            own = _Sums(tensors[f"rows.{i}"], tensors.get(f"columns.{i}"), weight)
            found.sums.setdefault(name, {})[use] = own
        return found

    def _uses(self) -> Iterator[_Sums]:
        return (use for uses in self.sums.values() for use in uses.values())

    def curvature(self, name: str, shape: Sequence[int]) -> Curvature | None:
        """Of a tensor in the rows and columns of its payload; None if nothing was seen of it."""
        uses = [use for use in self.sums.get(self.aliases.get(name, name), {}).values() if use.weight > 0]
        if not uses:
            return None
        columns = matrix_columns(tuple(shape))
        rows = torch.stack([_by_row(use.rows, tuple(shape), columns) for use in uses]).sum(0) / self.n_tokens
        total = sum(float(use.rows.sum()) for use in uses)
        moments = [(float(use.rows.sum()) / total, _moments(use, columns)) for use in uses]
        if all(found is None for _, found in moments):
            return Curvature(rows)
        if len(moments) == 1:  # the same memory: they are as large as the model
            return Curvature(rows, moments[0][1])
        unit = torch.eye(columns)
        return Curvature(
            rows, torch.stack([share * (unit if m is None else m) for share, m in moments]).sum(0)
        )


def _by_row(found: Tensor, shape: tuple[int, ...], columns: int) -> Tensor:
    """Of the first dimension, for every row of the matrix view."""
    n_rows = torch.Size(shape).numel() // columns
    return (
        found.repeat_interleave(n_rows // len(found))
        if n_rows % len(found) == 0
        else found.mean().expand(n_rows)
    )


def _moments(use: _Sums, columns: int) -> Tensor | None:
    """Of the columns of the matrix view: where rows are cut, the mean of all pieces."""
    if use.columns is None or len(use.columns) % columns:
        return None
    if len(use.columns) == columns:
        return use.columns
    pieces = use.columns.unfold(0, columns, columns).unfold(1, columns, columns)
    return pieces.diagonal(dim1=0, dim2=1).mean(-1)


def measure(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    names: set[str],
    seed: int,
    progress: bool = False,
) -> Sensitivity:
    """The sensitivity of the model's answers to errors of some of its weights.

    Args:
        names: of parameters, as the state dict has them.

    Raises:
        CalibrationError: an answer or a layer's output is not finite.
    """
    found, generator = Sensitivity(), torch.Generator(device_of(model)).manual_seed(seed)
    some = [part for batch in batches for part in _halves(batch)]
    with _watched(model, names, found) as loose:
        for batch in tqdm(some, desc="sensitivity", disable=not progress):
            with torch.enable_grad(), fast_products(device_of(model)):
                kind, answer = answers(model, batch)
            require_finite(model, batch, answer)
            found.n_tokens += answer[..., 0].numel()
            answer.backward(sampled_gradient(kind, answer.detach(), generator))
            _add_loose(found, loose)
    found.finish()
    return found


def _halves(batch: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Of the rows of a batch: what lies between layers is kept for the way back, and takes most memory."""
    n_rows = max(len(values) for values in batch.values())
    size = -(-n_rows // 2)
    for start in range(0, n_rows, size):
        yield {name: values[start : start + size] for name, values in batch.items()}


def _add_loose(found: Sensitivity, loose: Mapping[str, nn.Parameter]) -> None:
    """Weights that layers use which are not known: by their own gradients, of all uses."""
    for name, parameter in loose.items():
        if parameter.grad is not None:
            columns = matrix_columns(tuple(parameter.shape))
            found.add_rows(name, "own", parameter.grad.reshape(-1, columns).square().mean(1))
            parameter.grad = None


@contextlib.contextmanager
def _watched(model: nn.Module, names: set[str], found: Sensitivity) -> Iterator[Mapping[str, nn.Parameter]]:
    """Hooks on all known layers that use the weights; yields the weights that none does, or others too."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: p.requires_grad for name, p in parameters.items()}
    by_id = {id(parameters[name]): name for name in sorted(names) if name in parameters}
    found.aliases = {name: by_id[id(parameters[name])] for name in names if name in parameters}
    handles, seen, unknown = [], set[int](), set[int]()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if id(weight) in by_id and _is_known(module):
            seen.add(id(weight))
            watch = _Watch(found, by_id[id(weight)], path)
            handles.append(module.register_forward_hook(watch, with_kwargs=True))
        elif id(weight) in by_id:
            unknown.add(id(weight))
    loose = [name for key, name in by_id.items() if key in unknown or key not in seen]
    kept = {name: parameters[name] for name in loose}
    model.requires_grad_(False)
    for parameter in kept.values():
        parameter.requires_grad_(True)
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def _is_known(module: nn.Module) -> bool:
    """Whether its output is what its kind makes of its input. Embeddings with a forward of their own may be
    given other ids than they look up, as tables of positions are, or multiply what they found.
    """
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward
    is_grouped = isinstance(module, _CONVOLUTIONS) and (module.groups > 1 or isinstance(module.padding, str))
    return isinstance(module, (nn.Linear, Conv1D, *_CONVOLUTIONS)) and not is_grouped


class _Watch:
    """A hook that adds up what one layer sees, and what gradients its outputs get."""

    def __init__(self, found: Sensitivity, name: str, path: str) -> None:
        self.found, self.name, self.path = found, name, path

    def __call__(self, module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        at_bottom = not output.requires_grad
        output = output.requires_grad_(True).clone() if at_bottom else output
        x = (inputs[0] if inputs else next(iter(named.values()))).detach()
        output.register_hook(lambda gradient: self.add(module, x, gradient))
        return output if at_bottom else None

    @torch.no_grad()
    def add(self, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        """What one pass says."""
        if isinstance(module, nn.Embedding):
            flat = gradient.reshape(x.numel(), -1).float()
            self.found.add_looked_up(self.name, self.path, x.flatten(), flat, module.num_embeddings)
            return
        if isinstance(module, _CONVOLUTIONS):
            x, gradient = _unfolded(module, x, gradient)
        x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if isinstance(module, Conv1D):  # whose weight is [in, out]
            x, gradient = gradient, x
        shape = torch.Size((gradient.shape[1], x.shape[1]))
        self.found.add(self.name, self.path, x, gradient, shape)


def _unfolded(module: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What some positions of a convolution see, `[n, in · taps]`, and their gradients, `[n, out]`."""
    assert isinstance(module, _CONVOLUTIONS) and not isinstance(module.padding, str)
    one = len(module.kernel_size) == 1
    x, gradient = (x[..., None, :], gradient[..., None, :]) if one else (x, gradient)
    pairs = ((1, *each) if one else each for each in (module.kernel_size, module.dilation, module.stride))
    kernel, dilation, stride = pairs
    padding = (0, *module.padding) if one else module.padding
    seen = nn.functional.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
    gradient = gradient.flatten(2).transpose(1, 2)
    step = max(1, seen.shape[0] * seen.shape[1] // _MOST_POSITIONS)
    scale = step**0.5  # of those left out
    return seen.flatten(0, 1)[::step], gradient.flatten(0, 1)[::step] * scale
