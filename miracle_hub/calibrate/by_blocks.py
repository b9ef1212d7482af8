"""All matrices of a model, coded and refitted block by block; what is in no block is coded before."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from tqdm import tqdm

from miracle_hub.calibrate.block_refits import BlockInMaking, BlockOptions, Stream
from miracle_hub.calibrate.blocks import Batch, Chain
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.report import CALIBRATION_LOGGER
from miracle_hub.coding.backend import Backend

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)


@dataclass
class ByBlocks:
    """One making of a model whose blocks are known.

    Attributes:
        batches: to fit to.
        held_out: whose batches judge every refit of a block.
        losses: what was done, and the divergence on held-out rows after it.
    """

    model: nn.Module
    chains: Sequence[Chain]
    batches: Sequence[Batch]
    held_out: Teacher
    parameters: Mapping[str, nn.Parameter]
    vectors: Mapping[str, nn.Parameter]
    options: BlockOptions
    backend: Backend
    progress: bool = False
    seed: int = 0
    losses: list[tuple[str, float]] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> list[MatrixInMaking]:
        """The matrices, all columns coded."""
        batches = [*self.batches, *self.held_out.batches]
        dense = [Stream.before(chain, self.model, batches) for chain in self.chains]
        outside = [job for job in jobs if not any(_is_in(job.source.name, chain.path) for chain in self.chains)]
        made = self._matrices(outside)
        for matrix in made:
            matrix.code(matrix.columns)
        self._report("coded what is in no block")
        for chain, before in zip(self.chains, dense, strict=True):
            made += self._chain(chain, before, Stream.before(chain, self.model, batches), jobs)
        return made

    def _chain(self, chain: Chain, dense: Stream, coded: Stream, jobs: Sequence[Job]) -> list[MatrixInMaking]:
        made = list[MatrixInMaking]()
        blocks = tqdm(chain.blocks, desc=chain.path, disable=not self.progress)
        for number, block in enumerate(blocks):
            path = f"{chain.path}.{number}"
            own = self._matrices([job for job in jobs if _is_in(job.source.name, path)])
            vectors = [vector for name, vector in self.vectors.items() if _is_in(name, path)]
            making = BlockInMaking(number, block, dense, coded, len(self.batches), self.options)
            errors = making.make(own, vectors, self.seed)
            _LOGGER.info("%s: relative error of states %s", path, " ".join(f"{e:.4f}" for e in errors))
            coded.states, dense.states = coded.after(number, block), making.wanted
            made += own
        self._report(f"refitted {chain.path} block by block")
        return made

    def _matrices(self, jobs: Sequence[Job]) -> list[MatrixInMaking]:
        return [MatrixInMaking(job, self.parameters[job.source.name], self.backend) for job in jobs]

    def _report(self, what: str) -> None:
        self.losses.append((what, self.held_out.mean_divergence(self.model)))
        _LOGGER.info("%s: %.4f on held-out rows", *self.losses[-1])


def _is_in(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")
