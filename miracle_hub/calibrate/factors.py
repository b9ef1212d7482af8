"""Fits of the factors of differences of low rank to the dense model's answers, and their coding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from miracle_hub.calibrate.fitting import BETAS, asking, backward, group, order, risen_and_fallen
from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.kept_steps import kept_steps
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.dtypes import as_bytes
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.thin import ThinRecipe, encode_factor, encode_sum, thin_factors
from miracle_hub.codec.trellis import TrellisPayload
from miracle_hub.coding.backend import Backend

# Of factors, over their root mean square. Tried by hand on MiniLM tuned on SST-2, rank 8, without its words:
# 100 steps at 0.01 leave 0.0338 of 0.0404 nats, 50 at 0.05 0.0387 of 0.0393. No other model was tried.
_RATE = 0.01


class Factors:
    """Those of one matrix, which is a base's and their product.

    Attributes:
        left, right: `[rank, rows]` and `[rank, columns]`; what is coded asks for no gradients.
    """

    def __init__(self, job: Job, parameter: nn.Parameter, backend: Backend) -> None:
        assert job.based is not None
        base = job.based.load_base()
        assert base is not None
        self.job, self.parameter, self.backend = job, parameter, backend
        self.recipe: ThinRecipe = job.choice.option.recipe
        self.base = base.to(parameter)
        difference = (parameter.detach() - self.base).reshape(len(parameter), -1)
        left, right = thin_factors(difference, self.recipe.rank)
        self.left, self.right, self.payloads = nn.Parameter(left), nn.Parameter(right), list[bytes]()
        self.set()

    @torch.no_grad()
    def set(self) -> None:
        """Make the model's matrix the base's and the product."""
        self.parameter.copy_(self.base + (self.left.T @ self.right).view_as(self.base))

    def take(self, weights: Tensor) -> None:
        """Turn the gradient of the matrix into those of its factors."""
        assert weights.grad is not None
        gradient = weights.grad.view(len(weights), -1)
        self.left.grad, self.right.grad = self.right.detach() @ gradient.T, self.left.detach() @ gradient
        weights.grad = None

    @property
    def free(self) -> list[nn.Parameter]:
        """Factors that are not coded."""
        return [self.left, self.right][len(self.payloads) :]

    @torch.no_grad()
    def code(self) -> None:
        """Code the next factor, and have what readers get of it."""
        factor, name = self.free[0], self.job.source.name
        self.payloads.append(encode_factor(factor.detach(), self.recipe, name, self.backend))
        factor.copy_(TrellisPayload(as_bytes(self.payloads[-1]), name).decode(self.backend, verify=False))
        self.set()

    def payload(self) -> bytes:
        """The payload of the difference whose factors are coded."""
        left, right = self.payloads
        source, base = self.job.source, self.base
        return encode_sum(source.load(), base, (left, right), None, source.name, self.backend)


@dataclass
class FactorFits:
    """Of all differences of low rank of a model.

    Attributes:
        vectors: plain tensors that are tuned with them.
        steps: before the first factor is coded, and again before the second one is.
    """

    teacher: Teacher
    journal: Journal
    factors: Sequence[Factors]
    vectors: Sequence[nn.Parameter]
    steps: int
    seed: int
    kept: Kept
    progress: bool = False

    def run(self) -> None:
        """Fit and code both."""
        for number, what in enumerate(("left", "right")):
            self._fit(number)
            for one in tqdm(self.factors, desc=f"code {what} factors", disable=not self.progress):
                one.code()
            self.journal.report(f"{what} factors coded")

    def _fit(self, number: int) -> None:
        """Fit what is not coded yet; what does not help on held-out rows is undone."""
        fitted = [p for one in self.factors for p in one.free] + list(self.vectors)
        before = [p.detach().clone() for p in fitted]
        self.journal.report("the first singular vectors" if number == 0 else "one factor coded")
        self._steps(fitted, number)

        def undo() -> None:
            for parameter, values in zip(fitted, before, strict=True):
                parameter.data.copy_(values)
            self._set()

        self.journal.report_or_undo("factors fitted", undo)

    def _steps(self, fitted: Sequence[nn.Parameter], number: int) -> None:
        numbers = order(len(self.teacher), self.steps, self.seed, number)
        optimizer = Adam([group(p, _RATE) for p in fitted], betas=BETAS)
        schedule = LambdaLR(optimizer, lambda i: risen_and_fallen(i / len(numbers)))
        loss = partial(self.teacher.divergence, self.journal.model)
        asked = [*(one.parameter for one in self.factors), *self.vectors]
        with asking(asked), self._gradients():
            step = f"factors-{number}"
            left = kept_steps(self.kept, step, numbers, optimizer, schedule, fitted, self._set)
            for i in tqdm(left, desc="fit factors", total=len(numbers), disable=not self.progress):
                backward(loss, i, asked[0].device)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                self._set()

    def _set(self) -> None:
        for one in self.factors:
            one.set()

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Within it factors have gradients as soon as matrices do."""
        handles = [one.parameter.register_post_accumulate_grad_hook(one.take) for one in self.factors]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
