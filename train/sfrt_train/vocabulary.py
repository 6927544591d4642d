"""The small tokenizer of the built-in model, learned from the sentences the recipe can make."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sfrt.text import EOS_TOKEN
from sfrt_train.data import say, split_scenes
from sfrt_train.settings import Settings

FILE = "tokenizer.json"
_SENTENCES = 20_000


def make_tokenizer(settings: Settings, folder: Path) -> Path:
    """Learn the vocabulary and write it as a Hugging Face `tokenizers` file; a file that is there already is kept."""
    path = folder / FILE
    if path.exists():
        return path
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.text.vocab_size,
        special_tokens=["<pad>", EOS_TOKEN, "<unk>"],
        initial_alphabet=[*string.ascii_lowercase, *string.digits, *string.punctuation],
        show_progress=False,
    )
    rng = np.random.default_rng((settings.seed, 3))
    scenes, _ = split_scenes(settings.held_out, settings.seed)
    picks = rng.integers(len(scenes), size=_SENTENCES)
    tokenizer.train_from_iterator((say(scenes[pick], rng) for pick in picks), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS_TOKEN}", special_tokens=[(EOS_TOKEN, tokenizer.token_to_id(EOS_TOKEN))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path
