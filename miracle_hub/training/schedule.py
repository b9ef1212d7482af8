"""Which steps of which streams are coded next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miracle_hub.training.noise import generator
from miracle_hub.training.stream import Stream

ORDERS = ("random", "largest-kl")


@dataclass(frozen=True)
class Run:
    """Steps of one stream that are coded together, in ascending order."""

    stream: Stream
    steps: Tensor

    @property
    def n_values(self) -> int:
        """That these steps stand for, as if none were the last of its code."""
        return int(self.stream.begin_coding().widths()[self.steps].sum())


class Schedule:
    """Groups of runs that get smaller: after g of G groups a share of (1 - g/G)² of all values is left."""

    def __init__(self, streams: Sequence[Stream], groups: int, order: str, seed: int) -> None:
        """
        Args:
            order: "random" or "largest-kl"; see `coding_options.CodingOptions`.
            seed: of the random order of blocks.
        """
        self.streams, self.groups, self.order, self.seed = list(streams), groups, order, seed
        self.n_values = sum(stream.n_values for stream in self.streams)

    def n_coded(self) -> int:
        """How many values of all streams are coded by now."""
        return sum(stream.n_coded() for stream in self.streams)

    def group_by_now(self) -> int:
        """The number of the group that a model is in which was coded in part."""
        share_left = 1 - self.n_coded() / self.n_values
        return math.floor(self.groups * (1 - math.sqrt(share_left)))

    def next_runs(self, group: int) -> list[Run]:
        """A group, by its number from 0 on: a part of every stream, or all of the streams of largest KL."""
        share_left = max(0.0, 1 - (group + 1) / self.groups) ** 2
        left = [stream for stream in self.streams if stream.n_coded() < stream.n_values]
        if self.order == "random":
            return [self._run(s, math.ceil(s.n_values - s.n_coded() - share_left * s.n_values)) for s in left]
        wanted, runs = math.ceil(self.n_values - self.n_coded() - share_left * self.n_values), []
        for stream in sorted(left, key=lambda s: (not s.n_coded(), -float(s.kl_nats().detach().sum()))):
            runs.append(self._run(stream, wanted))
            wanted -= runs[-1].n_values
            if wanted <= 0:
                break
        return runs

    def _run(self, stream: Stream, wanted: int) -> Run:
        """About so many values of a stream, in whole blocks: the rest of one would have all of its KL."""
        left, message = self._steps_left(stream), stream.begin_coding()
        ends = message.widths()[left].cumsum(0)
        last = int((ends < wanted).sum().clamp(max=len(left) - 1))
        blocks = stream.budget.block_of(message.firsts()[left])
        n_steps = last + int((blocks[last:] == blocks[last]).sum())
        return Run(stream, left[:n_steps].sort().values)

    def _steps_left(self, stream: Stream) -> Tensor:
        """Blocks in random order or by KL; windows that overlap one after the other."""
        left = stream.begin_coding().steps_left()
        if any(segment.code.overlap_bits for segment in stream.begin_coding().segments):
            return left
        if self.order == "largest-kl":
            # A block of a block code is a step.
            return left[stream.kl_nats().detach().cpu()[left].argsort(descending=True, stable=True)]
        source = generator(self.seed, stream.number)
        order = torch.randperm(stream.code.steps(stream.n_values), generator=source)
        return order[torch.isin(order, left)]
