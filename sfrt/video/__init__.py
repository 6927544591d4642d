"""Videos and pictures at the edge of the runtime; PyAV and Pillow do the work and are imported where first needed."""

from __future__ import annotations

from sfrt.video.reading import read_frames, stream_frames
from sfrt.video.writing import Frames, VideoWriter, check_target, open_writer

__all__ = ["Frames", "VideoWriter", "check_target", "open_writer", "read_frames", "stream_frames"]
