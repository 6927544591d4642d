"""One stream on its way to one viewer: encoded, told about, sent, recorded; paused and taken back."""

from __future__ import annotations

import asyncio

from sfrt.chunk import Chunk, Timings
from sfrt.engine import Stream
from sfrt.errors import MediaError, ProtocolError, SnapshotError
from sfrt.machine import resident_memory
from sfrt.server.beginning import Beginning
from sfrt.server.encoding import Encoder, Picture, thumbnails
from sfrt.server.line import Line
from sfrt.server.pictures import camera_picture
from sfrt.server.protocol import PREVIEW, ChunkNews, Frame, Kept, Recording, Slot, SwitchReceipt, Times, Wanted
from sfrt.server.recordings import Recorder
from sfrt.server.service import Service, device_bytes
from sfrt.session import Session
from sfrt.switching import Receipt


class Show:
    """A stream and all that is kept for its viewer. `run` delivers; the rest is called beside it.

    Memory is bounded by the engine's queue: a chunk is taken when the one before it has been sent, and the engine makes
    no more of them than have room to wait.
    """

    def __init__(
        self,
        number: int,
        stream: Stream[Session],
        beginning: Beginning,
        encoder: Encoder,
        line: Line,
        service: Service,
    ) -> None:
        self.number = number
        self.stream = stream
        self._beginning = beginning
        self._encoder = encoder
        self._line = line
        self._service = service
        self._recorder: Recorder | None = None
        self._playing = asyncio.Event()
        self._playing.set()
        self._next: int | None = beginning.first  # the index that is to be sent next; None: whatever comes
        self._frames = 0
        self._late = 0
        self._wanted = 0  # so many of the camera's frames

    @property
    def playing(self) -> bool:
        return self._playing.is_set()

    async def run(self) -> None:
        """Deliver until the stream ends. Raises what it fails of, and what sending raises."""
        try:
            if self._beginning.camera:
                await self._want(0)
            async for chunk in self.stream:
                pictures = await asyncio.to_thread(self._encoder.encode, chunk.frames)
                await self._playing.wait()
                if self._next in (None, chunk.index):
                    await self._send(chunk, pictures)
                    await self._write(chunk)
                else:  # from before a rewind: the encoder has seen it, the viewer will not
                    self._encoder.start_over()
        finally:
            self.close()

    def close(self) -> None:
        """End the stream, and what it goes by."""
        self.stream.close()
        if self._beginning.footage is not None:
            self._beginning.footage.end()

    async def film(self, frame: Frame) -> None:
        """Go by one more of the camera's frames. Raises MediaError for one that is left out, ProtocolError."""
        footage, model = self._beginning.footage, self._service.model
        if footage is None or not self._beginning.camera or frame.stream != self.number % 2**8:
            return  # it was on its way when its stream ended
        if frame.number >= self._wanted:
            raise ProtocolError(f"the camera's frame {frame.number} was not asked for yet; wait for `wanted`")
        await self._want(frame.number + 1)
        footage.offer(await asyncio.to_thread(camera_picture, frame.data, height=model.height, width=model.width))
        if footage.ready():
            self.stream.wake()

    def watch(self, on: bool) -> None:
        """Send previews of the steps, from a chunk on that is not made yet."""
        self.stream.session.watched = on

    async def keep(self) -> Kept:
        """Keep the stream as it stands, between two chunks. Raises SnapshotError."""
        service, least = self._service, self._service.runtime.memory().parts["ring"]

        def keep(session: Session) -> str:
            return service.snapshots.keep(session, self._beginning.seed, least)

        name = await asyncio.to_thread(self.stream.call, keep)
        kept = service.snapshots.find(name)
        return Kept(name, kept.prompt, kept.chunk, service.limits.keep_s)

    def pause(self) -> None:
        """What is made already waits too."""
        self._playing.clear()
        self.stream.pause()

    def resume(self) -> None:
        self.stream.resume()
        self._playing.set()

    def refresh_picture(self) -> None:
        """Send something next that can be shown without what came before."""
        self._encoder.start_over()

    async def rewind(self, target: int, most: int) -> None:
        """Have this chunk made next, at most so many back from the next one. Raises SnapshotError."""
        sent = self._next or 0
        if not max(0, sent - most) <= target < sent:
            raise SnapshotError(
                f"the stream cannot go back to chunk {target}; choose one of the last {most} before {sent}"
            )

        def back(session: Session) -> None:
            if session.index > target:
                session.rewind(session.index - target)
            self.stream.clear()

        self._next = target
        self._encoder.start_over()
        try:
            await asyncio.to_thread(self.stream.call, back)
        except BaseException:
            self._next = None
            raise

    async def record(self) -> None:
        """Keep what is sent from now on. Raises MediaError."""
        if self._recorder is None:
            model, bounds = self._service.model, self._service.bounds
            self._recorder = self._service.recordings.begin(
                width=model.width, height=model.height, fps=model.fps, seconds=bounds.record_s
            )
        await self._line.say(Recording(on=True))

    async def finish_recording(self, reason: str | None = None) -> Recording:
        """What became of it; for one that broke off, with the reason."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return Recording(on=False)
        telemetry = self._service.telemetry.recordings
        try:
            whole = await asyncio.to_thread(recorder.finish)
        except MediaError as error:
            telemetry.labels("failed").inc()
            return Recording(on=False, reason=str(error))
        if not whole:
            return Recording(on=False, reason=reason or "nothing was shown while it was on")
        telemetry.labels("kept").inc()
        return Recording(on=False, path=f"recordings/{self._service.recordings.keep(recorder)}", reason=reason)

    async def _send(self, chunk: Chunk, pictures: list[Picture]) -> None:
        self._next = chunk.index + 1
        await self._line.say(self._news(chunk))
        previews = [] if chunk.previews is None else await asyncio.to_thread(thumbnails, chunk.previews)
        for step, preview in enumerate(previews):
            await self._line.send(Frame(PREVIEW, preview, True, self.number, chunk.index, step))
        for picture in pictures:
            await self._line.send(
                Frame(self._encoder.kind, picture.data, picture.key, self.number, chunk.index, self._frames)
            )
            self._frames += 1
        self._count(chunk, sum(len(picture.data) for picture in pictures))

    async def _want(self, seen: int) -> None:
        """Keep the camera going: a chunk's frames may be on their way, and half of them are asked for at once."""
        room = self._service.model.chunk_frames
        if self._wanted - seen <= room // 2:
            self._wanted = seen + room
            await self._line.say(Wanted(self.number, self._wanted))

    async def _write(self, chunk: Chunk) -> None:
        """Into the recording, if there is one; where that fails the stream goes on without it."""
        if self._recorder is None:
            return
        try:
            if await asyncio.to_thread(self._recorder.write, chunk.frames):
                return
        except MediaError as error:
            self._recorder = None
            self._service.telemetry.recordings.labels("failed").inc()
            await self._line.say(Recording(on=False, reason=str(error)))
            return
        longest = f"a recording may take {self._service.bounds.record_s:g} s"
        await self._line.say(await self.finish_recording(longest))

    def _news(self, chunk: Chunk) -> ChunkNews:
        stats = self.stream.stats()
        made = max((frame for frame in chunk.slots if frame is not None), default=0) - len(chunk.latents)
        sink = self._service.model.sink
        return ChunkNews(
            stream=self.number,
            index=chunk.index,
            frame=self._frames,
            frames=len(chunk.frames),
            chunk_ms=chunk.timings.chunk_ms,
            deadline_ms=1e3 * len(chunk.frames) / stats.fps,
            attained=stats.tally.attainment,
            times=_times(chunk.timings),
            slots=tuple(
                Slot(frame, slot < sink, frame is not None and frame > made) for slot, frame in enumerate(chunk.slots)
            ),
            waiting=stats.queued,
            room=stats.room,
            process_bytes=resident_memory(),
            device_bytes=device_bytes(self._service.runtime),
            receipt=None if chunk.receipt is None else _receipt(chunk.receipt),
        )

    def _count(self, chunk: Chunk, sent: int) -> None:
        telemetry = self._service.telemetry
        telemetry.chunks.inc()
        telemetry.frames.inc(len(chunk.frames))
        telemetry.bytes.inc(sent)
        telemetry.chunk_seconds.observe(chunk.timings.chunk_ms / 1e3)
        late = self.stream.stats().tally.late
        telemetry.late.inc(max(0, late - self._late))
        self._late = late
        if chunk.receipt is not None:
            telemetry.switches.labels(chunk.receipt.how).inc()


def _times(timings: Timings) -> Times:
    return Times(timings.refresh_ms, timings.switch_ms, timings.encode_ms, timings.dit_ms, timings.decode_ms)


def _receipt(receipt: Receipt) -> SwitchReceipt:
    return SwitchReceipt(receipt.prompt or "", receipt.how, receipt.over, receipt.ms)
