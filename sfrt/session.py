"""The only chunk loop there is: denoise, deliver, refresh the cache, go on (arXiv 2506.08009, Algorithm 2)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfrt.chunk import Chunk, Underway, deliver, preview
from sfrt.context import Brake, Context
from sfrt.decoders.taehv import TIME
from sfrt.denoising import Denoised, denoise_chunk
from sfrt.device import memory_told
from sfrt.errors import ConfigError, SnapshotError
from sfrt.metrics import Stopwatch
from sfrt.ops.layout import tokens_from_latents
from sfrt.ring import chunk_sizes
from sfrt.snapshot import CleanFrame, Moment, Saved, Settings, write_snapshot
from sfrt.stage import Stage
from sfrt.switching import How, Switch, Text, check_switch
from sfrt.timesteps import Step, steps_of


class Session:
    """An iterator of chunks. Use it as a context manager, or close it; a closed session yields no more.

    Frames leave before the refresh pass. On a GPU that is queued behind the chunk and runs beside its decode; on a CPU
    it runs when the next chunk is asked for, and a stream that stops never pays for its last. A chunk that fails, is
    interrupted or cancelled leaves the stream where it was. A stream with a source ends with it. One that is not asked
    for chunks is paused: nothing runs, and its memory stays; to let that go too, take a snapshot and close it.

    `switch` and `cancel` may be called from any thread while a chunk is made, all else between two chunks.

    Attributes: watched (whether chunks carry previews; it may be set between two chunks).
    """

    def __init__(
        self,
        stage: Stage,
        text: Text | Tensor,
        *,
        initial: Tensor | None = None,
        limit: int | None = None,
        history: int = 0,
        first_frame: Callable[[npt.NDArray[np.uint8]], object] | None = None,
        ahead: bool = False,
    ) -> None:
        """What to go by, a prompt or its embeddings [text_len, text_dim], and from where.

        initial are latents [T, C, h, w] to go on from; limit is the number of chunks, history how many of them the
        stream can be taken back by; first_frame is called with a stream's first pixel frame, uint8 [1, H, W, 3], as
        soon as it is there. ahead has each chunk begun before the frames of the one before it are waited for, where
        they are decoded beside it. Raises ConfigError where the settings need a decoder and there is none.
        """
        if stage.stream.refresh == "reencode" and stage.decoder is None:
            raise ConfigError(
                "refresh is 'reencode', and this model has no decoder to encode frames with; "
                "export it again with --vae or --taehv, or choose refresh 'rebuild'"
            )
        self._stage: Stage | None = stage
        self.watched = False
        self._limit = limit
        self._first_frame = first_frame
        self._ahead = ahead and stage.source is None  # whose next frames may be long in coming
        self._underway: deque[Underway] = deque()
        self._first_steps = steps_of(stage.stream, first_chunk=True, strength=stage.strength)
        self._steps = steps_of(stage.stream, strength=stage.strength)
        self._sizes = chunk_sizes(stage.stream, 0 if initial is None else initial.shape[0])
        self._at = Moment(Text.of(text, text) if isinstance(text, Tensor) else text)
        self._history: deque[Moment] = deque(maxlen=history)
        self._queue: deque[Switch] = deque(maxlen=1)  # the last one wins
        self._brake = Brake()
        self._context = Context(stage, self._brake)
        self._context.hear(self._at.text)
        self._watch = Stopwatch(stage.device)
        self.initial_frames: npt.NDArray[np.uint8] | None = None
        """The given start as the decoder renders it, uint8 [F, H, W, 3]; the first chunk goes on from here."""
        if initial is not None:
            self.initial_frames = self._start_from(stage, initial)

    @classmethod
    def resumed(cls, stage: Stage, saved: Saved, *, history: int = 0) -> Session:
        """A stream that goes on from where another one stood, on a stage of the same settings."""
        session = cls(stage, saved.at.text, limit=saved.settings.limit, history=history)
        session._sizes, session._at = saved.settings.sizes, saved.at
        session._context.load_state(saved.ring, saved.left_out)
        if saved.queued is not None:
            session._queue.append(saved.queued)
        return session

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Session:
        return self

    def close(self) -> None:
        """End the stream and let its memory go, the ring's too. Closing twice is fine."""
        if self._stage is not None:
            stage, self._stage = self._stage, None
            del self._context
            if stage.origin is not None:
                stage.origin.give_back(stage.rollout)
            self._at = Moment(self._at.text, self._at.index)
            self._history.clear()
            self._underway.clear()

    @property
    def prompt(self) -> str | Tensor:
        """What the stream was last asked to show, in effect or not yet. To set it is to `switch` to it."""
        switch = self._waiting
        return self._at.text.prompt if switch is None else switch.prompt

    @prompt.setter
    def prompt(self, prompt: str | Tensor) -> None:
        self.switch(prompt)

    @property
    def index(self) -> int:
        """That of the next chunk."""
        return self._at.index - len(self._underway)

    def switch(self, prompt: str | Tensor, how: How = "recache", over: int = 1) -> None:
        """Go by another prompt from the next chunk that is begun on; that chunk's receipt says what it cost.

        prompt is text, or embeddings [text_len, text_dim]; `sfrt.switching` explains how. over is the number of chunks
        that a blend takes. A switch that has not taken effect yet gives way to a later one. Raises PromptError,
        ConfigError or BundleError, and then nothing has changed.
        """
        origin = self._running().require_origin()
        check_switch(how, over)
        began = time.perf_counter()
        embeds = origin.embeddings(prompt)
        self._queue.append(Switch(prompt, embeds, how, over, (time.perf_counter() - began) * 1e3))

    def cancel(self) -> None:
        """Give up the chunk that is being made, or else the next one, before its next pass: it raises Cancelled.

        The stream stands where it stood, and goes on from there when it is asked again.
        """
        self._brake.pull()

    def rewind(self, chunks: int) -> None:
        """Go back to where the stream stood so many chunks ago, with its prompt of then and no switch waiting.

        Frames, noise and the decoder's state are those of then. The ring is filled anew from the clean frames that were
        in view: as long as none had left it and no prompt was switched, the same video comes again, up to rounding;
        later, one that the same frames could have led to. Raises SnapshotError beyond the history.
        """
        self._running().require_no_source("rewound")
        if not 1 <= chunks <= len(self._history):
            raise SnapshotError(
                f"the stream cannot go back by {chunks} chunks: it keeps {len(self._history)}; "
                "make the session with a longer history"
            )
        self._take_back()
        for _ in range(chunks):
            self._at = self._history.pop()
        self._queue.clear()
        self._context.forget()

    def snapshot(self, path: str | Path) -> None:
        """Keep all that the stream goes on from, but its history, in one file for `Runtime.restore`.

        The refresh pass that the last chunk owes runs first. Raises SnapshotError where the file cannot be written, or
        the stream goes by a source.
        """
        write_snapshot(path, self._saved())

    def fork(self) -> Session:
        """A second stream that goes on from here, with a ring of its own; neither knows of the other.

        Raises SnapshotError where the stream goes by a source, DeviceError where memory is short.
        """
        stage, saved = self._running(), self._saved()
        with memory_told("the fork", stage.device):
            other = replace(stage, rollout=stage.require_origin().rollout())
            session = Session.resumed(other, saved, history=self._history.maxlen or 0)
        session._history.extend(self._history)
        return session

    @torch.no_grad()
    def refresh(self) -> None:
        """Run the refresh pass that the last chunk still owes, if any, rather than when the next one is asked for.

        A recache that is waiting will do more than that; then nothing is done.
        """
        switch = self._waiting
        if self._stage is not None and (switch is None or switch.how != "recache"):
            self._context.settle(self._at, self._watch)

    def __next__(self) -> Chunk:
        ahead = self._stage is not None and self._ahead and self._stage.outlet.beside
        wanted = 2 if ahead else 1
        while len(self._underway) < wanted and self._begin():
            pass
        if not self._underway:
            raise StopIteration
        chunk = self._underway[0].delivered()
        made = self._underway.popleft()
        self._history.append(made.before)
        return chunk

    @torch.no_grad()
    def _begin(self) -> bool:
        """Give the device the work of the next chunk; False where there is none."""
        stage, at, switch = self._stage, self._at, self._waiting
        if stage is None or at.index == self._limit:
            return False
        with memory_told("the stream", stage.device):
            first, watch = at.next_frame == 0, self._watch
            text = self._context.turn_to(switch, at, watch)
            frames = _coming(at, self._sizes.first if first else self._sizes.later)
            if stage.source is not None and not stage.source.pull(len(frames)):
                return False
            made = self._denoise(stage, frames, self._first_steps if first else self._steps)
            early = self._first_frame if first and stage.decoder is not None else None
            parts = made.latents.tensor_split([] if early is None or len(frames) == 1 else [1])
            deliveries = deliver(stage, parts, at.decoder, watch)
            previews = preview(stage, made.predictions)
            slots = self._context.slots()
            underway = Underway(at, switch, made.latents, deliveries, previews, slots, watch)
            coming = Stopwatch(stage.device)
            if stage.outlet.beside and at.index + 1 != self._limit:
                self._context.refresh_ahead(made.tokens, coming)
            if early is not None:
                early(underway.first_frame())
            shown = underway.frames() if stage.stream.refresh == "reencode" else None
        after = replace(at, text=text, index=at.index + 1, decoder=deliveries[-1].state)
        self._go_on(stage, after, made.tokens, shown)
        self._underway.append(underway)
        self._watch = coming
        if switch is not None:
            with suppress(ValueError):  # a later one came in its place
                self._queue.remove(switch)
        if stage.source is not None:
            stage.source.advance()
        return True

    def _denoise(self, stage: Stage, frames: range, steps: tuple[Step, ...]) -> Denoised:
        """These frames of the video, from noise or from their source's frames."""
        self._watch.mark("start")
        given = None if stage.source is None else tokens_from_latents(stage.source.latents(), stage.model)
        self._watch.mark("encoded")
        self._context.place(frames)
        made = denoise_chunk(stage, frames, steps, given, self._brake.check, watched=self.watched)
        self._watch.mark("denoised")
        self._brake.check()
        return made

    def _take_back(self) -> None:
        """Give up the chunks that nobody has seen."""
        if self._underway:
            self._at = self._underway[0].before
            switches = [underway.switch for underway in self._underway if underway.switch is not None]
            if switches and self._waiting is None:
                self._queue.append(switches[-1])
            # A chunk by itself has written only to slots that are its own, and are written to when it is made again.
            if len(self._underway) > 1 or switches:
                self._context.forget()
            self._underway.clear()

    def _go_on(self, stage: Stage, at: Moment, tokens: Tensor, shown: npt.NDArray[np.uint8] | None) -> None:
        """Leave the finished frames behind this moment, and keep what the next ones will see.

        shown are their pixels, where those may have to be encoded anew.
        """
        parts = tokens.split(stage.grid.tokens)
        frames = _coming(at, len(parts))
        # A latent frame's last pixel frame, from the chunk's end on; a copy, as the chunk is its owner's to change.
        pictures = [None] * len(parts) if shown is None else [one.copy() for one in shown[::-TIME]]
        past = {**at.past, **dict(zip(frames, map(CleanFrame, parts, reversed(pictures)), strict=True))}
        in_view = {frame: past[frame] for frame in stage.ring.context(frames.stop, self._sizes.later)}
        self._at = replace(at, next_frame=frames.stop, past=in_view)
        self._context.keep(tokens)

    @torch.no_grad()
    def _start_from(self, stage: Stage, latents: Tensor) -> npt.NDArray[np.uint8]:
        """Put given latents in the cache and in the decoder's state, at most a chunk at a time."""
        pieces = []
        for piece in self._sizes.pieces(len(latents)):
            if stage.stream.refresh == "rolling":
                self._context.settle(self._at, self._watch)
            given = latents[piece.start : piece.stop].float()
            self._context.place(_coming(self._at, len(piece)))
            (delivery,) = deliver(stage, (given,), self._at.decoder, self._watch)
            pieces.append(delivery.wait())
            shown = pieces[-1] if stage.stream.refresh == "reencode" else None
            after = replace(self._at, decoder=delivery.state)
            self._go_on(stage, after, tokens_from_latents(given, stage.model), shown)
        return np.concatenate(pieces)

    @torch.no_grad()
    def _saved(self) -> Saved:
        """All that the stream goes on from; the ring's memory is its own."""
        stage = self._running()
        origin = stage.require_origin()
        stage.require_no_source("kept or forked")
        self._take_back()
        self._context.settle(self._at, self._watch)
        settings = Settings(origin.model, origin.seed, stage.stream, stage.ring, self._sizes, self._limit)
        return Saved(settings, self._at, self._context.left_out, self._waiting, stage.rollout.state())

    @property
    def _waiting(self) -> Switch | None:
        """The switch that the next chunk is to begin with."""
        return next(iter(tuple(self._queue)), None)

    def _running(self) -> Stage:
        if self._stage is None:
            raise ConfigError("the session is closed; make another one")
        return self._stage


def _coming(at: Moment, count: int) -> range:
    """The numbers in the video of the next `count` latent frames."""
    return range(at.next_frame, at.next_frame + count)
