"""Prompts, and clips where there are any, as what a model's own encoders make of them: sfrt_train.shards.

A clip is a video, which may be longer than what is taken of it, beside a text of the same name that says what it shows:
waves.mp4, waves.txt. Data is a function of its sources alone, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sfrt.bundle import Bundle, hash_file
from sfrt.config import StreamConfig
from sfrt.decoders import load_decoder
from sfrt.errors import ConfigError
from sfrt.source import Source
from sfrt.text import TextEncoder, clean_prompt, load_text_encoder
from sfrt_train.shards import (
    DataError,
    Encoders,
    Index,
    Kind,
    Origin,
    Shard,
    read_index,
    shard_name,
    write_index,
    write_shard,
)

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


@dataclass(frozen=True)
class Clip:
    """A video's file and what it shows."""

    video: Path
    caption: str


@dataclass(frozen=True)
class Sources:
    """What data is made from; unprompted is what a video without a prompt is told, "" nothing at all.

    Models of the Wan family are used with a negative prompt there: the judge's guidance is away from it.
    """

    prompts: tuple[str, ...]
    clips: tuple[Clip, ...] = ()
    unprompted: str = ""

    @classmethod
    def read(cls, prompts: Path, clips: Path | None, unprompted: str) -> Sources:
        """Prompts are lines of a text file. Raises ConfigError where there are none, or a clip has no text."""
        lines = tuple(clean_prompt(line) for line in _text(prompts).splitlines() if line.strip())
        if not lines:
            raise ConfigError(f"{prompts} has no prompts; write one in each line")
        return cls(lines, tuple(_captioned(clips)) if clips else (), unprompted and clean_prompt(unprompted))

    def hash(self) -> str:
        """SHA-256 of all of it, the videos too."""
        digest = hashlib.sha256("\n".join((self.unprompted, *self.prompts)).encode())
        for clip in self.clips:
            digest.update(f"\n\n{clip.caption}\n{hash_file(clip.video)}".encode())
        return digest.hexdigest()


def prepare(
    bundle: Bundle, sources: Sources, folder: Path, device: str, *, chunks: int = 7, per_shard: int = 512
) -> None:
    """Make the folder, or go on with it. Clips are `chunks` of the model's chunks long, and of its size and rate.

    Raises DataError where the folder was begun from something else, BundleError where the bundle lacks an encoder,
    MediaError for a clip that cannot be read, and ConfigError for one that is too short.
    """
    stream = bundle.manifest.stream
    origin = Origin(
        Encoders.of(bundle.manifest),
        sources.hash(),
        prompts=len(sources.prompts),
        clips=len(sources.clips),
        per_shard=per_shard,
        frames=chunks * stream.chunk,
        height=stream.height,
        width=stream.width,
        fps=stream.fps,
    )
    index = read_index(folder) or Index(origin)
    if index.origin != origin:
        raise DataError(f"{folder} was begun from other prompts, clips or encoders; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    text = load_text_encoder(bundle, torch.device(device), verify=True)
    prompts = [sources.unprompted, *sources.prompts]
    for number in _missing(folder, "prompts", index.prompts, len(prompts), per_shard):
        told = prompts[number * per_shard : (number + 1) * per_shard]
        shard = write_shard(folder, "prompts", number, [_read(text, prompt) for prompt in told])
        index = replace(index, prompts=_with(index.prompts, number, shard))
        write_index(folder, index)
    if not sources.clips:
        return
    encoder = _ClipEncoder(bundle, device, origin.frames)
    for number in _missing(folder, "clips", index.clips, len(sources.clips), per_shard):
        some = sources.clips[number * per_shard : (number + 1) * per_shard]
        latents = torch.stack([encoder.latents(clip.video) for clip in some])
        shard = write_shard(folder, "clips", number, [_read(text, clip.caption) for clip in some], latents=latents)
        index = replace(index, clips=_with(index.clips, number, shard))
        write_index(folder, index)


class _ClipEncoder:
    """Videos to latents by the bundle's autoencoder, in float32."""

    def __init__(self, bundle: Bundle, device: str, frames: int) -> None:
        weights = bundle.load("decoder", verify=True)
        assert bundle.manifest.decoder is not None  # the manifest lists the tensors exactly when it has their config
        self._decoder = load_decoder(bundle.manifest.decoder.config, weights, torch.device(device), torch.float32)
        self._stream, self._frames = bundle.manifest.stream, frames

    @torch.no_grad()
    def latents(self, video: Path) -> Tensor:
        """The first frames of it, [T, C, h, w] in half precision. Raises ConfigError for one that has fewer."""
        stream: StreamConfig = self._stream
        source, parts = Source(video, stream, self._decoder, self._decoder.device), []
        for start in range(0, self._frames, stream.chunk):
            if not source.pull(stream.chunk):
                raise ConfigError(
                    f"{video} has {start} latent frames at {stream.fps} frames a second and {self._frames} are taken; "
                    "leave it out, or prepare with fewer --chunks"
                )
            parts.append(source.latents())
            source.advance()
        return torch.cat(parts).half().cpu()


def _read(text: TextEncoder, prompt: str) -> Tensor:
    """[L, D] on the CPU; no rows for no prompt."""
    if not prompt:
        return text.read("nothing").cpu()[:0]
    return text.read(prompt).cpu()


def _missing(folder: Path, kind: Kind, done: tuple[Shard, ...], count: int, per_shard: int) -> Iterator[int]:
    """The shards that are not made, or were and are gone, while a bar tells of them."""
    shards = range(-(-count // per_shard))
    missing = [i for i in shards if i >= len(done) or not (folder / shard_name(kind, i)).is_file()]
    yield from tqdm(missing, desc=kind, unit="shard", initial=len(shards) - len(missing), total=len(shards))


def _with(shards: tuple[Shard, ...], number: int, shard: Shard) -> tuple[Shard, ...]:
    return (*shards[:number], shard, *shards[number + 1 :])


def _captioned(folder: Path) -> list[Clip]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; --clips takes one of videos, each beside a text of the same name")
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    if not videos:
        raise ConfigError(f"{folder} has no videos ({', '.join(VIDEOS)})")
    return [Clip(video, clean_prompt(_text(video.with_suffix(".txt")))) for video in videos]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); it is to hold prompts in UTF-8") from None
