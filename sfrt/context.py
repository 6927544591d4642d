"""What a stream sees of its past: the ring, kept in step with the frames that are finished and the text they go by."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Event

import torch
from torch import Tensor

from sfrt.errors import Cancelled
from sfrt.metrics import Stopwatch
from sfrt.ops.layout import tokens_from_latents
from sfrt.ring import ChunkPlan, chunk_sizes
from sfrt.snapshot import CleanFrame, Moment
from sfrt.stage import Stage
from sfrt.switching import Switch, Text


class Brake:
    """Stops a stream between two passes; any thread may pull it."""

    def __init__(self) -> None:
        self._pulled = Event()

    def pull(self) -> None:
        self._pulled.set()

    def check(self) -> None:
        """To be called before every pass. Raises Cancelled, once for each time that it was pulled."""
        if self._pulled.is_set():
            self._pulled.clear()
            raise Cancelled("the chunk was cancelled; ask for the next one to go on where the stream stands")


class Context:
    """One stream's ring and text.

    What a finished chunk leaves to do is owed until it is asked for: the refresh pass, or filling the ring anew. Where
    that fails or is interrupted, it stays owed.
    """

    def __init__(self, stage: Stage, brake: Brake) -> None:
        self.left_out = 0
        """Frames of the video that the ring was not filled with when it was last filled anew."""
        self._stage = stage
        self._brake = brake
        self._heard: Tensor | None = None
        self._unrefreshed: Tensor | None = None
        self._refreshed: Tensor | None = None
        self._stale = False
        self._plan: ChunkPlan | None = None

    @property
    def owes(self) -> bool:
        """Whether the ring is not yet what the next chunk is to see."""
        return self._stale or self._unrefreshed is not None

    def load_state(self, ring: Mapping[str, Tensor], left_out: int) -> None:
        """Take over another stream's ring, which owes nothing."""
        self._stage.rollout.load_state(ring)
        self.left_out = left_out

    def place(self, frames: range) -> None:
        """Move on to these frames of the video."""
        plan = self._stage.ring.plan(frames.start - self.left_out, len(frames), frames)
        self._stage.rollout.place(plan)
        self._plan = plan

    def slots(self) -> tuple[int | None, ...]:
        """The number in the video of the latent frame in each slot, the frames placed last with them; None: empty."""
        assert self._plan is not None
        ring = self._stage.ring
        seen = {ring.slot(frame): frame for frame in ring.visible_frames(self._plan)}
        # Sinks keep their numbers when the ring is filled anew.
        numbers = {slot: frame if frame < ring.sink else frame + self.left_out for slot, frame in seen.items()}
        return tuple(numbers.get(slot) for slot in range(ring.slots))

    def refresh_ahead(self, tokens: Tensor, watch: Stopwatch) -> None:
        """Queue the refresh pass of these, the clean tokens of the frames placed last, before they are kept.

        It writes where the passes of the frames wrote, so that they can still be made anew.
        """
        if self._stage.stream.refresh == "rolling":
            watch.mark("refresh")
            self._stage.rollout.refresh(tokens, self._stage.stream.context_noise)
            watch.mark("refreshed")
            self._refreshed = tokens

    def keep(self, tokens: Tensor) -> None:
        """Owe what these, the clean tokens of the frames placed last, ask for."""
        rolling, ahead = self._stage.stream.refresh == "rolling", self._refreshed is tokens
        self._unrefreshed, self._stale = (None if ahead else tokens, False) if rolling else (None, True)
        self._refreshed = None

    def forget(self) -> None:
        """Owe a ring filled anew: the stream stands elsewhere."""
        self._unrefreshed, self._stale = None, True

    def settle(self, at: Moment, watch: Stopwatch) -> None:
        """Do what is owed, under the text of the moment."""
        if not self.owes:
            return
        self.hear(at.text)
        watch.mark("refresh")
        if self._stale:
            self._replay(at)
        elif self._unrefreshed is not None:
            self._brake.check()
            self._stage.rollout.refresh(self._unrefreshed, self._stage.stream.context_noise)
        watch.mark("refreshed")
        self._unrefreshed, self._stale = None, False

    def hear(self, text: Text) -> None:
        """Go by this text, if the ring does not."""
        if self._heard is not text.embeds:
            self._heard = None
            self._stage.rollout.set_text(text.embeds)
            self._heard = text.embeds

    def turn_to(self, switch: Switch | None, at: Moment, watch: Stopwatch) -> Text:
        """Be ready for the chunk after this moment, and go by its text, which is returned."""
        if switch is None or switch.how != "recache":
            self.settle(at, watch)
        if switch is None:
            text = at.text.onward()
            self.hear(text)
            return text
        watch.mark("switch")
        text = switch.onto(at.text)
        self.hear(text)
        if switch.how == "recache":
            self.forget()  # until the chunk is made: only then has the new text come to stay
            self._replay(at)
        watch.mark("switched")
        return text

    def _replay(self, at: Moment) -> None:
        """Fill the ring anew with the clean frames in view, a chunk at a time: each sees those before it and itself.

        They are those that the next chunk sees, in order, sinks first, so that the stream goes on behind them.
        """
        stage, frames = self._stage, list(at.past)
        tokens = [at.past[frame].tokens for frame in frames]
        if stage.stream.refresh == "reencode" and frames and frames[0] > 0:
            tokens[0] = _encoded_anew(stage, at.past[frames[0]])
        for piece in chunk_sizes(stage.stream, len(frames)).pieces(len(frames)):
            these = slice(piece.start, piece.stop)
            self._brake.check()
            stage.rollout.place(stage.ring.plan(piece.start, len(piece), frames[these]))
            stage.rollout.refresh(torch.cat(tokens[these]), stage.stream.context_noise)
        self.left_out = at.next_frame - len(frames)


def _encoded_anew(stage: Stage, frame: CleanFrame) -> Tensor:
    """The tokens of a frame as the first one of a video, which stands for one pixel frame: the last of its four."""
    assert stage.decoder is not None and frame.picture is not None
    pixels = torch.from_numpy(frame.picture).permute(2, 0, 1).float().div(255)
    latents, _ = stage.decoder.encode(pixels[None, None])
    return tokens_from_latents(latents.squeeze(0), stage.model).to(stage.device)
