"""All matrices of a model, coded and refitted block by block; what is in no block is coded before."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from tqdm import tqdm

from miracle_hub.calibrate.block_refits import BlockInMaking, BlockOptions, Stream
from miracle_hub.calibrate.blocks import Batch, Chain
from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.kept_refits import KeptMaking
from miracle_hub.calibrate.matrix import MatrixInMaking, code_all
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.report import CALIBRATION_LOGGER
from miracle_hub.coding.backend import Backend

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)
# Held-out tokens by which the refits of a block are judged.
_JUDGED_TOKENS = 4096


@dataclass
class ByBlocks:
    """One making of a model whose blocks are known.

    Attributes:
        batches: to fit to.
        parameters: of the model, by all of their names.
        vectors: those that may be tuned.
    """

    journal: Journal
    chains: Sequence[Chain]
    batches: Sequence[Batch]
    parameters: Mapping[str, nn.Parameter]
    vectors: Mapping[str, nn.Parameter]
    options: BlockOptions
    backend: Backend
    progress: bool = False
    seed: int = 0
    kept: Kept = field(default_factory=Kept)

    def run(self, jobs: Sequence[Job]) -> list[MatrixInMaking]:
        """The matrices, all columns coded."""
        batches = [*self.batches, *self.journal.held_out.some(_JUDGED_TOKENS).batches]
        dense = [Stream.before(chain, self.journal.model, batches) for chain in self.chains]
        paths = [chain.path for chain in self.chains]
        made = self._outside(
            [job for job in jobs if not any(_is_in(job.source.name, path) for path in paths)]
        )
        for i, (chain, before) in enumerate(zip(self.chains, dense, strict=True)):
            coded = Stream.before(chain, self.journal.model, batches)
            for own in self._chain(i, before, coded, jobs):
                made += own
            self.journal.report(f"refitted {chain.path} block by block")
        return made

    def _outside(self, jobs: Sequence[Job]) -> list[MatrixInMaking]:
        """What is in no block, as words and heads."""
        made = self._matrices(jobs)
        kept = KeptMaking(self.kept, "outside", made, (), self.journal.losses)
        if made and not kept.go_on():
            code_all(((matrix, matrix.columns) for matrix in made), "code", self.progress)
            self.journal.report("coded what is in no block")
            kept.keep(1)
        return made

    def _chain(
        self, of_chain: int, dense: Stream, coded: Stream, jobs: Sequence[Job]
    ) -> Iterator[list[MatrixInMaking]]:
        chain = self.chains[of_chain]
        blocks = tqdm(chain.blocks, desc=chain.path, disable=not self.progress)
        for number, block in enumerate(blocks):
            path = f"{chain.path}.{number}"
            made = self._matrices([job for job in jobs if _is_in(job.source.name, path)])
            vectors = [vector for name, vector in self.vectors.items() if _is_in(name, path)]
            making = BlockInMaking(number, block, dense, coded, len(self.batches), self.options)
            kept = KeptMaking(self.kept, f"block-{of_chain}-{number}", made, vectors, self.journal.losses)
            if not kept.go_on():
                errors = making.make(made, vectors, self.seed)
                _LOGGER.info("%s: errors of states %s", path, " ".join(f"{e:.4f}" for e in errors))
                kept.keep(1)
            coded.states, dense.states = coded.after(number, block), making.wanted
            yield made

    def _matrices(self, jobs: Sequence[Job]) -> list[MatrixInMaking]:
        return [MatrixInMaking(job, self.parameters[job.source.name], self.backend) for job in jobs]


def _is_in(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")
