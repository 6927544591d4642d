"""`sfrt export --quantize-text`: a text encoder in eight bits, if it still says what it said.

Quantised are all matrices: those of the blocks, and the table of tokens, of which a prompt reads a few rows. Weights
are symmetric with a scale per output channel, or per token of the table; activations stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sfrt.bundle.quantization import TextMethod, TextQuantization
from sfrt.bundle.writer import LazyTensor
from sfrt.config import Umt5Config
from sfrt.device import memory_told, resolve_device
from sfrt.errors import ConfigError
from sfrt.ops.quantized_linear import QuantizedEmbedding, QuantizedLinear
from sfrt.text import Tokenizer, Umt5Encoder, empty_encoder
from sfrt.weights import assign
from sfrt_export.gate import PROMPTS
from sfrt_export.progress import Progress
from sfrt_export.quantize import quantized_tensors
from sfrt_export.verify import relative_error

MOST_EMBEDS_ERROR = 0.2
"""What a quantised encoder must keep to.

A weight in float8 is off by 2.6 %, one in int8 by 0.8 % where its row has no outliers; through a random encoder as deep
as UMT5-XXL that adds up to 13 % and 4 %.
"""


def quantized_text(
    config: Umt5Config,
    weights: Mapping[str, LazyTensor],
    tokenizer: Tokenizer,
    method: TextMethod,
    force: bool,
    progress: Progress,
) -> tuple[dict[str, LazyTensor], TextQuantization]:
    """The text encoder's tensors quantised, each made when asked for, and what the manifest says of them.

    Both encoders read the gate's prompts for that, each with no more than a block of its weights in memory. Raises
    ConfigError where the embeddings stray beyond the bound above, unless forced to let them pass.
    """
    encoder = empty_encoder(config, TextQuantization(method, embeds_error=0.0))
    layers = [
        name for name, module in encoder.named_modules() if isinstance(module, QuantizedLinear | QuantizedEmbedding)
    ]
    tensors = quantized_tensors(weights, method, layers, input_peaks={})
    device, total = resolve_device("auto"), 2 * len(_parts(encoder))
    done = iter(range(1, total + 1))

    def tick() -> None:
        progress("text gate", next(done), total)

    with memory_told("the gate of quantisation", device):
        expected = _embeds(empty_encoder(config), weights, tokenizer, device, tick)
        error = relative_error(_embeds(encoder, tensors, tokenizer, device, tick), expected)
    if not math.isfinite(error):
        raise ConfigError(
            f"the text encoder, or what becomes of it as {method}, makes values that are no numbers; "
            "export it plainly and see"
        )
    if error > MOST_EMBEDS_ERROR and not force:
        raise ConfigError(
            f"quantised to {method} the text encoder strays too far: its embeddings by {error:.1%} where "
            f"{MOST_EMBEDS_ERROR:.0%} are allowed; choose another method, or take it as it is with --force"
        )
    return tensors, TextQuantization(method, error)


@torch.inference_mode()
def _embeds(
    encoder: Umt5Encoder,
    tensors: Mapping[str, LazyTensor],
    tokenizer: Tokenizer,
    device: torch.device,
    tick: Callable[[], None],
) -> Tensor:
    """The gate's prompts [B, L, dim], read by an empty encoder whose parts are filled when they run, and emptied."""

    def filling(name: str) -> Callable[[nn.Module, object], None]:
        def fill(part: nn.Module, inputs: object) -> None:
            assign(part, {key: tensors[f"{name}.{key}"].make().to(device) for key in part.state_dict()}, name)

        return fill

    def empty(part: nn.Module, inputs: object, outputs: object) -> None:
        part.to("meta")
        tick()

    for name, part in _parts(encoder).items():
        part.register_forward_pre_hook(filling(name))
        part.register_forward_hook(empty)
    ids, mask = tokenizer.batch(PROMPTS)
    embeds: Tensor = encoder(ids.to(device), mask.to(device))
    return embeds


def _parts(encoder: Umt5Encoder) -> dict[str, nn.Module]:
    """The modules that an encoder runs one after another."""
    blocks = {f"blocks.{number}": block for number, block in enumerate(encoder.blocks)}
    return {"token_embedding": encoder.token_embedding, **blocks, "norm": encoder.norm}
