"""sfrt/text.py: UMT5 parity, gradients, tokenizer and prompt cleaning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sfrt.config import Umt5Config
from sfrt.errors import BundleError, PromptError
from sfrt.text import TextEncoder, Tokenizer, Umt5Encoder, clean_prompt, relative_buckets
from sfrt_export.verify import relative_error

GOLDEN = Path(__file__).parent / "golden"
WORDS = ["a", "red", "blue", "circle", "square", "moving", "left", "right", "on", "background"]
TINY = Umt5Config(vocab_size=32, dim=16, dim_attn=16, dim_ffn=24, num_heads=2, num_layers=2)


def golden_encoder(dtype: torch.dtype) -> Umt5Encoder:
    case = json.loads((GOLDEN / "umt5" / "case.json").read_text())
    config = Umt5Config(vocab_size=case.pop("vocab"), **case)
    with torch.device("meta"):
        encoder = Umt5Encoder(config)
    weights = {name: value.to(dtype) for name, value in load_file(GOLDEN / "umt5" / "weights.safetensors").items()}
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Settings such as these travel in published files; they must not cut or pad behind our back.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def text_encoder(tokenizer_file: Path) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(Tokenizer(tokenizer_file, text_len=12), Umt5Encoder(TINY))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
def test_golden_embeddings(dtype: torch.dtype, tolerance: float, device: str) -> None:
    golden = load_file(GOLDEN / "umt5" / "tensors.safetensors")
    with torch.no_grad():
        out = golden_encoder(dtype).to(device)(golden["ids"].to(device), golden["mask"].to(device)).cpu()
    assert out.dtype == dtype
    assert relative_error(out, golden["prompt_embeds"]) <= tolerance
    assert not out[golden["mask"] == 0].any()


def test_norms_may_be_wider_than_matrices() -> None:
    golden, encoder = load_file(GOLDEN / "umt5" / "tensors.safetensors"), golden_encoder(torch.bfloat16)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        out = encoder(golden["ids"], golden["mask"])
    assert out.dtype == torch.float32 and relative_error(out, golden["prompt_embeds"]) <= 2e-2


def test_padding_changes_nothing() -> None:
    golden = load_file(GOLDEN / "umt5" / "tensors.safetensors")
    encoder = golden_encoder(torch.float32)
    for ids, mask, reference in zip(golden["ids"], golden["mask"], golden["prompt_embeds"], strict=True):
        length = int(mask.sum())
        out = encoder(ids[None, :length])[0].detach()
        assert relative_error(out, reference[:length]) <= 1e-4


def test_names_and_shapes_of_the_published_file() -> None:
    published = json.loads((GOLDEN / "checkpoint_keys" / "umt5_xxl_encoder.json").read_text())["keys"]
    with torch.device("meta"):
        state = Umt5Encoder(Umt5Config()).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == published


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    encoder = Umt5Encoder(TINY)
    ids = torch.arange(3, 23).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    encoder(ids, mask).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert encoder.token_embedding.weight.grad is not None
    assert not encoder.token_embedding.weight.grad[ids[1, 6:]].any(), "a padded token got a gradient"


def test_a_fresh_encoder_keeps_activations_in_scale() -> None:
    torch.manual_seed(0)
    out = Umt5Encoder(TINY)(torch.arange(20)[None])
    assert 0.5 < float(out.detach().square().mean().sqrt()) < 2.0


def naive_bucket(offset: int) -> int:
    """T5's 32 buckets up to distance 128 by exact integers: bucket 8 + k starts at 8·2^(k/2), so at d² = 64·2^k."""
    distance = abs(offset)
    bucket = distance
    if distance >= 8:
        bucket = 8 + max(k for k in range(8) if distance**2 >= 64 * 2**k)
    return bucket + (16 if offset > 0 else 0)


def test_buckets_against_exact_integers() -> None:
    buckets = relative_buckets(300, 32, 128)
    assert buckets.dtype == torch.int64
    for query, key in [(0, 299), (299, 0), (150, 150), *((140, 140 + d) for d in range(-140, 150))]:
        assert int(buckets[query, key]) == naive_bucket(key - query), key - query


def test_prompt_cleaning() -> None:
    assert clean_prompt("  a &amp;amp; b\n\t\u201cc\u201d \u2019d\u00a0 ") == 'a & b "c" \'d'
    assert clean_prompt("e\u0301") == "\u00e9"


@given(st.text())
def test_cleaning_either_refuses_or_gives_tidy_text(prompt: str) -> None:
    try:
        text = clean_prompt(prompt)
    except PromptError:
        return
    assert text and text == " ".join(text.split())


@pytest.mark.parametrize("prompt", ["", " \n\t", "&nbsp;", "a \ud800 b", b"bytes", None])
def test_prompts_that_are_not_text(prompt: str, text_encoder: TextEncoder) -> None:
    with pytest.raises(PromptError, match=r"^the prompt "):
        text_encoder.encode(prompt)


def test_tokens_end_with_eos(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer(tokenizer_file, text_len=12)
    assert tokenizer.encode("a red circle moving left") == [3, 4, 6, 8, 9, 1]
    ids, mask = tokenizer.batch(["a red circle", "blue"])
    assert ids.tolist() == [[3, 4, 6, 1], [5, 1, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_a_long_prompt_is_cut_with_a_warning(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer(tokenizer_file, text_len=4)
    with pytest.warns(UserWarning, match="has 6 tokens and the model reads 4; the last 2 were dropped"):
        assert tokenizer.encode("a red circle moving left") == [3, 4, 6, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode("a red circle") == [3, 4, 6, 1]


def test_tokenizer_files_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing\.json cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "missing.json", 8)
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": "1.0"')
    with pytest.raises(BundleError, match=r"broken\.json cannot be read as a tokenizer"):
        Tokenizer(broken, 8)
    foreign = tmp_path / "foreign.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(foreign))
    with pytest.raises(BundleError, match="has no </s> token"):
        Tokenizer(foreign, 8)


def test_encode_pads_with_zeros_and_matches_a_padded_batch(text_encoder: TextEncoder) -> None:
    prompts = ["a red circle moving left", "blue square"]
    ids, mask = text_encoder.tokenizer.batch(prompts)
    reference = text_encoder.encoder(ids, mask)
    for row, (prompt, length) in enumerate(zip(prompts, mask.sum(1).tolist(), strict=True)):
        out = text_encoder.encode(prompt)
        assert out.shape == (12, 16) and not out.requires_grad
        assert torch.allclose(out[:length], reference[row, :length], atol=1e-5)
        assert not out[length:].any()


def test_tokenizer_larger_than_the_encoder(tokenizer_file: Path) -> None:
    small = Umt5Encoder(Umt5Config(vocab_size=5, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=1))
    with pytest.raises(BundleError, match="knows 13 tokens but the text encoder only 5"):
        TextEncoder(Tokenizer(tokenizer_file, 8), small)
