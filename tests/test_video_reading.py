"""Pictures and clips read as pixels, upright, at another size and rate, and files that are none."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sfrt.errors import MediaError
from sfrt.video import open_writer, read_frames, reading, stream_frames
from tests.clips import FPS, HEIGHT, RED, WIDTH, assert_close, clip


def test_read_picture_cuts_around_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = RED
    Image.fromarray(wide).save(tmp_path / "a.png")
    frames = read_frames(tmp_path / "a.png", height=20, width=20)
    assert frames.shape == (1, 3, 20, 20) and frames.dtype == torch.float32 and frames.is_contiguous()
    expected = (torch.tensor(RED).view(1, 3, 1, 1) / 255).expand_as(frames)
    torch.testing.assert_close(frames[..., 4:-4], expected[..., 4:-4], rtol=0, atol=1e-6)
    torch.testing.assert_close(frames, expected, rtol=0, atol=0.1)


def test_read_picture_without_aliasing(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    frames = read_frames(tmp_path / "a.png", height=32, width=32)
    assert (frames - 0.5).abs().max() < 0.03


def test_read_picture_upright_and_without_transparency(tmp_path: Path) -> None:
    lying = np.zeros((30, 20, 4), np.uint8)
    lying[:15] = (255, 255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to show
    Image.fromarray(lying).save(tmp_path / "a.png", exif=exif)
    frames = read_frames(tmp_path / "a.png", height=20, width=30)
    assert frames[..., :14].max() == 0 and frames[..., 16:].min() == 1


def test_read_clip(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    with open_writer(str(target), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(21))
    frames = read_frames(target, height=HEIGHT, width=WIDTH, max_frames=9)
    assert frames.shape == (9, 3, HEIGHT, WIDTH) and frames.min() >= 0 and frames.max() <= 1
    assert_close((frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy(), clip(9), 3.0)


def test_read_clip_at_another_rate_and_size(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    with open_writer(str(target), width=WIDTH, height=HEIGHT, fps=32) as writer:
        writer.write(clip(32))
    frames = read_frames(target, height=32, width=32, fps=16)
    assert frames.shape == (16, 3, 32, 32)
    # Every second frame, scaled by 32/48 about the centre: the left edge is where it belongs.
    red = (frames[8, 0, 16] > 0.5).nonzero().flatten()
    assert abs(int(red[0]) - (16 - WIDTH / 2) * 32 / 48 - 16) <= 1


def test_read_animated_gif_as_a_clip(tmp_path: Path) -> None:
    with open_writer(str(tmp_path / "a.gif"), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(16))
    frames = read_frames(tmp_path / "a.gif", height=HEIGHT, width=WIDTH)
    assert abs(len(frames) - 16) <= 1


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_read_a_picture_that_moves(tmp_path: Path, name: str) -> None:
    pictures = [Image.fromarray(frame) for frame in clip(2)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=250, lossless=True)
    frames = read_frames(tmp_path / name, height=HEIGHT, width=WIDTH, fps=8)
    shown = (frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(shown, clip(2)[[0, 0, 1, 1]])
    assert len(read_frames(tmp_path / name, height=HEIGHT, width=WIDTH, fps=8, max_frames=3)) == 3


def test_of_pages_the_first_is_read(tmp_path: Path) -> None:
    pages = [Image.fromarray(frame) for frame in clip(3)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    frames = read_frames(tmp_path / "a.tiff", height=HEIGHT, width=WIDTH)
    assert np.array_equal((frames[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy(), clip(1)[0])
    assert len(frames) == 1


@pytest.mark.parametrize(("degrees", "bright"), [(90, "left"), (270, "right"), (180, "bottom")])
def test_read_clip_upright(tmp_path: Path, degrees: int, bright: str) -> None:
    """A phone's clip: the file says how to turn its frames. Its upper half is bright."""
    video = np.zeros((4, 64, 64, 3), np.uint8)
    video[:, :32] = 255
    target = tmp_path / "a.mp4"
    with open_writer(str(target), width=64, height=64, fps=FPS) as writer:
        writer.write(video)
    turn_track(target, degrees)
    frame = read_frames(target, height=64, width=64)[0].mean(dim=0)
    halves = {"left": frame[:, :28], "right": frame[:, 36:], "top": frame[:28], "bottom": frame[36:]}
    assert halves[bright].min() > 0.9
    opposite = {"left": "right", "right": "left", "bottom": "top"}[bright]
    assert halves[opposite].max() < 0.1


def test_a_clip_is_decoded_as_its_frames_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, decoded, fitted = tmp_path / "a.mp4", itertools.count(), reading._fitted
    with open_writer(str(target), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(21))
    monkeypatch.setattr(reading, "_fitted", lambda *given: (frame for frame in fitted(*given) if next(decoded) >= 0))
    frames = stream_frames(target, height=HEIGHT, width=WIDTH)
    assert_close(np.stack(list(itertools.islice(frames, 3))), clip(3), 3.0)
    assert next(decoded) == 3
    assert len(list(frames)) == 18


def test_a_clip_that_is_cut_off_fails_where_it_is(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8)
    pictures = [Image.fromarray(frame) for frame in noise]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    frames = stream_frames(tmp_path / "a.png", height=64, width=64, fps=10)
    assert np.array_equal(next(frames), noise[0])
    with pytest.raises(MediaError, match=r"cannot read the picture .*a\.png"):
        list(frames)


def turn_track(path: Path, counterclockwise: int) -> None:
    """Write a rotation into every track header of an MP4, as a phone does."""
    a, b = {90: (0, -1), 180: (-1, 0), 270: (0, 1)}[counterclockwise]
    matrix = np.array([a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd")
    while at >= 0:
        start = at + 4 + 40  # version 0: the matrix follows 40 bytes of times, id, layer and volume
        data[start : start + 36] = matrix
        at = data.find(b"tkhd", at + 4)
    path.write_bytes(data)


def test_unreadable_files(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("cut.png", "text.mp4", "empty.png", "folder.png", "missing.png"):
        with pytest.raises(MediaError, match=name):
            read_frames(tmp_path / name, height=16, width=16)


def test_sound_is_no_clip(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(MediaError, match="no picture in it"):
        read_frames(tmp_path / "a.wav", height=16, width=16)


def test_without_pyav_pictures_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with open_writer(str(tmp_path / "a"), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(1))
    assert read_frames(tmp_path / "a/000000.png", height=HEIGHT, width=WIDTH).shape == (1, 3, HEIGHT, WIDTH)
    with pytest.raises(MediaError, match="pip install av"):
        open_writer(str(tmp_path / "a.mp4"), width=WIDTH, height=HEIGHT, fps=FPS)
