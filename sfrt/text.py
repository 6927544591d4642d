"""Prompts to embeddings: the UMT5 encoder and its tokenizer.

UMT5 (Chung et al., arXiv 2304.09151) is T5 v1.1 with position biases in every layer. Parameter names are those of
``models_t5_umt5-xxl-enc-bf16.pth`` as Wan 2.1 publishes it, so that file's tensors load unchanged. Where a bundle has
the encoder quantised, its products are `sfrt.ops.quantized_linear`'s, and so is the table of tokens: UMT5-XXL takes
5.30 GiB then, not 10.58; with the table as published it would take 6.27.
"""

from __future__ import annotations

import html
import math
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfrt.bundle import Bundle
from sfrt.bundle.manifest import TOKENIZER
from sfrt.bundle.quantization import TextQuantization
from sfrt.config import Umt5Config
from sfrt.errors import BundleError, PromptError
from sfrt.ops.linear import Linear
from sfrt.ops.quantized_linear import QuantizedEmbedding, place_quantized
from sfrt.weights import assign

EOS_TOKEN = "</s>"
PAD_ID = 0
_STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of every (query, key) pair of a sequence: int64 [length, length] on the CPU (T5, arXiv 1910.10683).

    Half of the buckets serve keys after the query. Within a half, the first half holds one distance each and the rest
    grow logarithmically up to max_distance. Made on the CPU in float32 everywhere: a logarithm that rounds otherwise on
    another device would move a whole distance into the neighbouring bucket.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = torch.arange(1 - length, length)
    distance = offset.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + growth.long()).clamp(max=half - 1)
    by_offset = torch.where(distance < exact, distance, far) + half * (offset > 0)
    position = torch.arange(length)
    return by_offset[position[None, :] - position[:, None] + length - 1]


def _embedding(count: int, dim: int) -> nn.Embedding:
    """A table of vectors, left as it comes: Umt5Encoder fills it."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(count, dim), freeze=False)
    return table


class PositionBias(nn.Module):
    """A learned number per (bucket, head), added to the attention logits."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.embedding = _embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """int64 [L, L] -> float32 [1, heads, L, L]."""
        bias: Tensor = self.embedding(buckets)
        return bias.float().permute(2, 0, 1)[None].contiguous()


class RmsNorm(nn.Module):
    """Root mean square norm in float32, whatever the dtype of its weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., dim] -> the same."""
        out: Tensor = F.rms_norm(x, self.weight.shape, self.weight.float(), eps=1e-6)
        return out


class Attention(nn.Module):
    """Bidirectional attention, unscaled: T5 folds the scale into its initial weights.

    Logits so large turn the rounding of 16-bit queries and keys into errors of several per cent, so both are computed
    in float32 from float32 inputs; only the output projection runs in the weights' dtype, or what that was before they
    were quantised.
    """

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = Linear(config.dim, config.dim_attn, bias=False)
        self.k = Linear(config.dim, config.dim_attn, bias=False)
        self.v = Linear(config.dim, config.dim_attn, bias=False)
        self.o = Linear(config.dim_attn, config.dim, bias=False)

    def _heads(self, linear: Linear, x: Tensor) -> Tensor:
        y = linear.in_float32(x)
        return y.view(*y.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 [B, L, dim], float32 logits bias [B or 1, heads, L, L] -> [B, L, dim] in the weights' dtype."""
        q, k, v = self._heads(self.q, x), self._heads(self.k, x), self._heads(self.v, x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2).to(dtype))
        return out


class FeedForward(nn.Module):
    """GELU-gated linear unit. The gate is a Sequential only to carry the published name, gate.0."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.gate = nn.Sequential(Linear(config.dim, config.dim_ffn, "gelu_tanh", bias=False))
        self.fc1 = Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, dim] in the weights' dtype -> the same."""
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward around a float32 residual stream."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.norm1 = RmsNorm(config.dim)
        self.attn = Attention(config)
        self.norm2 = RmsNorm(config.dim)
        self.ffn = FeedForward(config)
        self.pos_embedding = PositionBias(config)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: its matrices' dtype, or where these are quantised, that of its norms."""
        stored = self.ffn.fc1.weight.dtype
        return stored if stored.itemsize > 1 else self.norm1.weight.dtype

    def forward(self, x: Tensor, buckets: Tensor, mask_bias: Tensor | None) -> Tensor:
        """float32 [B, L, dim], int64 [L, L], float32 [B, 1, 1, L] -> float32 [B, L, dim]."""
        bias = self.pos_embedding(buckets)
        x = x + self.attn(self.norm1(x), bias if mask_bias is None else bias + mask_bias, self.dtype)
        out: Tensor = x + self.ffn(self.norm2(x).to(self.dtype))
        return out


class Umt5Encoder(nn.Module):
    """The encoder half of UMT5. With 16-bit weights, norms, attention and the residual stream stay in float32."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding: nn.Embedding | QuantizedEmbedding = _embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.dim)
        if not self.token_embedding.weight.is_meta:  # nothing to fill there, and normal_ would import torch's compiler
            self._reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    def _reset_parameters(self) -> None:
        """T5's initialisation (arXiv 1910.10683), with attention's missing scale folded into q."""
        config = self.config
        std = {
            "token_embedding": 1.0,
            "q": (config.dim * config.dim_attn / config.num_heads) ** -0.5,
            "k": config.dim**-0.5,
            "v": config.dim**-0.5,
            "o": config.dim_attn**-0.5,
            "0": config.dim**-0.5,
            "fc1": config.dim**-0.5,
            "fc2": config.dim_ffn**-0.5,
            "embedding": (2 * config.num_buckets * config.num_heads) ** -0.5,
        }
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std[name.rpartition(".")[2]])

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids int64 [B, L], mask [B, L] (non-zero where a token is real; None: all are) -> [B, L, dim].

        The result has the weights' dtype. Padding is neither attended nor returned: its rows are zero.
        """
        config = self.config
        x: Tensor = self.token_embedding(ids).float()
        buckets = relative_buckets(ids.shape[1], config.num_buckets, config.max_distance).to(ids.device)
        mask_bias = None
        if mask is not None:
            # The lowest finite number, not -inf: a row that is all padding must not become NaN.
            padding = (mask == 0)[:, None, None, :]
            mask_bias = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, torch.finfo(x.dtype).min / 2)
        for block in self.blocks:
            x = block(x, buckets, mask_bias)
        x = self.norm(x).to(self.norm.weight.dtype)
        return x if mask is None else x * (mask != 0)[:, :, None]


def empty_encoder(config: Umt5Config, quantization: TextQuantization | None = None) -> Umt5Encoder:
    """An encoder on the meta device, to be assigned the tensors of a bundle that says this of itself."""
    with torch.device("meta"):
        encoder = Umt5Encoder(config)
        if quantization is not None:
            encoder.token_embedding = QuantizedEmbedding(config.vocab_size, config.dim, quantization.method)
    if quantization is not None:
        linears = [name for name, module in encoder.named_modules() if isinstance(module, Linear)]
        place_quantized(encoder, quantization.method, linears, weights_only=True)
    return encoder.requires_grad_(False)


def clean_prompt(prompt: str) -> str:
    """What Wan 2.1 does to a prompt before its tokenizer sees it: entities resolved twice, quotes straight, one space.

    Raises PromptError for anything that is not text or has nothing left to say.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt is a {type(prompt).__name__}, not text; pass a string")
    text = html.unescape(html.unescape(prompt)).translate(_STRAIGHT_QUOTES)
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text:
        raise PromptError("the prompt is empty; say what the video should show")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt has half a surrogate pair at character {error.start}; pass valid Unicode text"
        ) from None
    return text


class Tokenizer:
    """A Hugging Face ``tokenizers`` file, used as T5 does: the text's pieces, then ``</s>``.

    path: the tokenizer.json. text_len: most tokens per prompt, ``</s>`` included.
    Raises BundleError when the file cannot be read or has no ``</s>``.
    """

    def __init__(self, path: str | Path, text_len: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception for missing and broken alike
            raise BundleError(
                f"{path} cannot be read as a tokenizer ({error}); copy the tokenizer.json of the text encoder there"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eos = self._tokenizer.token_to_id(EOS_TOKEN)
        if eos is None:
            raise BundleError(f"{path} has no {EOS_TOKEN} token; it is not the tokenizer of a T5 model")
        self.eos_id: int = eos
        self.text_len = text_len

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one prompt, at most text_len, ``</s>`` last; an over-long prompt is cut with a UserWarning.

        Raises PromptError when the prompt is empty or not text.
        """
        ids: list[int] = self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids
        dropped = len(ids) + 1 - self.text_len
        if dropped > 0:
            warnings.warn(
                f"the prompt has {len(ids) + 1} tokens and the model reads {self.text_len}; "
                f"the last {dropped} were dropped",
                stacklevel=2,
            )
        return [*ids[: self.text_len - 1], self.eos_id]

    def batch(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Several prompts, padded to the longest: ids int64 [B, L] and mask bool [B, L]."""
        rows = [torch.tensor(self.encode(prompt)) for prompt in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]


class PromptEncoder(Protocol):
    """What turns token ids into embeddings."""

    @property
    def config(self) -> Umt5Config: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, ids: Tensor, /) -> Tensor:
        """[1, L, dim] from int64 ids [1, L] without padding."""


class TextEncoder:
    """Tokenizer and encoder together."""

    def __init__(self, tokenizer: Tokenizer, encoder: PromptEncoder) -> None:
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise BundleError(
                f"the tokenizer knows {tokenizer.vocab_size} tokens but the text encoder only "
                f"{encoder.config.vocab_size}; take both from the same model"
            )
        self.tokenizer = tokenizer
        self.encoder = encoder

    @torch.no_grad()
    def read(self, prompt: str) -> Tensor:
        """[L, dim] of the prompt's L tokens, at most text_len, in the encoder's dtype on its device.

        Raises PromptError when the prompt is empty or not text.
        """
        ids = self.tokenizer.encode(prompt)
        return self.encoder(torch.tensor([ids], device=self.encoder.device))[0]

    def encode(self, prompt: str) -> Tensor:
        """[text_len, dim]: the same with zeros behind it.

        Padding is never computed: it would be masked out of attention and zeroed, so it changes nothing.
        """
        embeds = self.read(prompt)
        return F.pad(embeds, (0, 0, 0, self.tokenizer.text_len - len(embeds)))


def load_tokenizer(bundle: Bundle, *, verify: bool = False) -> Tokenizer:
    """The tokenizer of a bundle; verify hashes its file. Raises BundleError where there is none or it is damaged."""
    if verify:
        bundle.verify(TOKENIZER)
    return Tokenizer(bundle.tokenizer_path, bundle.manifest.model.text_len)


def load_text_encoder(
    bundle: Bundle, device: torch.device, dtype: torch.dtype | None = None, *, verify: bool = False
) -> TextEncoder:
    """The text encoder and tokenizer of a bundle; dtype None keeps the weights as stored. verify hashes both files.

    Raises BundleError where the bundle has none, one is damaged, or the two do not fit each other.
    """
    weights = bundle.load("text_encoder", device, dtype, verify=verify)
    tokenizer = load_tokenizer(bundle, verify=verify)
    config = bundle.manifest.text_encoder
    assert config is not None  # the manifest lists the tensors exactly when it has their config
    encoder = empty_encoder(config, bundle.manifest.text_quantization)
    assign(encoder, weights, "the text encoder")
    return TextEncoder(tokenizer, encoder)
