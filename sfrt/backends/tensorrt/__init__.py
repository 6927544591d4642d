"""TensorRT on an NVIDIA GPU, over the plans that `sfrt export --tensorrt` built there."""

from __future__ import annotations

from sfrt.backends import Grid
from sfrt.backends.exported import ExportedRollout
from sfrt.backends.tensorrt.plans import HOW_TO_BUILD, shortest_ring
from sfrt.backends.tensorrt.running import PlanRunner
from sfrt.config import ModelConfig
from sfrt.errors import BundleError
from sfrt.graphs import GraphName
from sfrt.ring import BlockRing, ChunkSizes, Ring


class TensorrtBackend:
    """The transformer's plans on one GPU, in one dtype."""

    def __init__(self, runner: PlanRunner, config: ModelConfig) -> None:
        """Raises BundleError where there are no plans for the runner's GPU."""
        self.config = config
        self.device = runner.device
        self._runner = runner
        self._runner.plans("text_kv")

    def rollout(self, grid: Grid, ring: Ring, sizes: ChunkSizes, timesteps: tuple[float, ...]) -> ExportedRollout:
        """A fresh stream, in the smallest ring of those that there are plans for.

        Raises BundleError where no plan is for chunks of this size or rings of this length.
        """
        slots = self._slots(grid, BlockRing(ring, sizes))
        return ExportedRollout(self._runner, self.config, grid, ring, sizes, timesteps, slots)

    def _slots(self, grid: Grid, blocks: BlockRing) -> int:
        graph: GraphName = "refresh_masked" if blocks.has_holes else "refresh"
        chunks = [size * grid.tokens for size in (blocks.sizes.first, blocks.sizes.later)]
        ring = shortest_ring(self._runner.plans(graph).values(), chunks, blocks.slots * grid.tokens)
        if ring is None:
            raise BundleError(
                f"the bundle {self._runner.origin.folder} has no plan of {graph} for chunks of {chunks[-1]} tokens "
                f"in a ring of {blocks.slots} latent frames; {HOW_TO_BUILD}"
            )
        return ring // grid.tokens
