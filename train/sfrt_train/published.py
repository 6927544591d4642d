"""Networks to fine-tune, built from bundles: trained ones in float32, a frozen judge with products in 16 bits.

Gradient checkpointing (arXiv 1604.06174) by block: a pass keeps what goes into each block, and makes what happens in it
once more for the gradient. So activations take the memory of one block, and a pass with its gradient a third more time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfrt.bundle import Bundle
from sfrt.config import ModelConfig
from sfrt.device import DTYPES
from sfrt.errors import ConfigError
from sfrt.ops.choice import torch_ops
from sfrt.ops.linear import Linear
from sfrt.transformer import Attend, Block, Residual, TextKV, Transformer
from sfrt.weights import assign
from sfrt_train.model import PromptedTransformer, plain_attention, untrained
from sfrt_train.settings import Precision


class CheckpointedBlock(Block):
    """A block that keeps no more for its gradient than what came in."""

    def forward(
        self, residual: Residual, layer: int, modulation: Tensor, rotary: Tensor, text: TextKV, attend: Attend
    ) -> Residual:
        if not torch.is_grad_enabled():
            return super().forward(residual, layer, modulation, rotary, text, attend)
        trained = self.modulation.requires_grad

        def run() -> Residual:
            """As it is now, whatever has changed around it when the gradient asks for it again."""
            with plain_attention(modulation.device), nullcontext() if trained else untrained(self):
                return super(CheckpointedBlock, self).forward(residual, layer, modulation, rotary, text, attend)

        out: Residual = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        return out


def empty_network(config: ModelConfig, *, checkpointing: bool) -> PromptedTransformer:
    """On the meta device, to be assigned weights."""
    with torch.device("meta"):
        transformer = Transformer(config)
        if checkpointing:
            transformer.blocks = torch.nn.ModuleList(
                CheckpointedBlock(config, torch_ops()) for _ in range(config.num_layers)
            )
    return PromptedTransformer(transformer)


def trainable(bundle: Bundle, device: str, *, checkpointing: bool) -> PromptedTransformer:
    """The bundle's transformer in float32, to be trained. Raises ConfigError where its weights are quantised."""
    network = empty_network(bundle.manifest.model, checkpointing=checkpointing)
    # Copies: what is mapped from the file is not to be written to.
    weights = {name: weight.to(device, torch.float32, copy=True) for name, weight in _stored(bundle).items()}
    assign(network.transformer, weights, "the transformer")
    return network.requires_grad_(True)


def frozen(bundle: Bundle, device: str, precision: Precision, *, checkpointing: bool) -> PromptedTransformer:
    """The same, frozen, in the precision that its products run in."""
    network = empty_network(bundle.manifest.model, checkpointing=checkpointing).requires_grad_(False)
    assign(network.transformer, _stored(bundle), "the transformer")
    return in_precision(network, precision).to(device)


def in_precision(network: PromptedTransformer, precision: Precision) -> PromptedTransformer:
    """Its products' weights in this precision, and in float32 those of norms and modulations, which are few."""
    products = {id(p) for part in network.modules() if isinstance(part, Linear) for p in part.parameters()}
    for parameter in network.parameters():
        parameter.data = parameter.data.to(DTYPES[precision] if id(parameter) in products else torch.float32)
    return network


def _stored(bundle: Bundle) -> Mapping[str, Tensor]:
    if bundle.manifest.quantization is not None:
        raise ConfigError(
            f"the transformer of {bundle.path} is quantised, which can neither be trained nor judge; "
            "export the checkpoint again without --quantize"
        )
    return bundle.load("transformer", verify=True)
