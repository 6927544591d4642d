"""Videos written for real, and every way to fail that a disk, a pipe or a user offers."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sfrt.errors import MediaError
from sfrt.video import check_target, open_writer, read_frames
from tests.clips import BLUE, BT709, FPS, HEIGHT, WIDTH, assert_close, clip, decode
from tests.full_disk import file_size_limit


@contextmanager
def standard_output(fd: int) -> Iterator[None]:
    """Descriptor 1 leads to fd for a while, below anything that Python knows."""
    before = os.dup(1)
    os.dup2(fd, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


@pytest.mark.parametrize(("name", "mean"), [("a.mp4", 3.0), ("a.GIF", 1.0)])
def test_video_file_comes_back(tmp_path: Path, name: str, mean: float) -> None:
    target = tmp_path / name
    with open_writer(str(target), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        assert writer.write(clip(9))
        assert writer.write(torch.from_numpy(clip(12, first=9)))
    frames, rate = decode(target)
    assert rate == FPS or name == "a.GIF"  # a GIF counts hundredths of a second: see below
    assert_close(frames, clip(21), mean)


def test_mp4_is_complete_and_tagged(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    with open_writer(str(target), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(20))
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.frames == 20, "a finished file has an index of all its frames"
        assert stream.codec_context.colorspace == BT709
        luma = next(container.decode(stream)).to_ndarray()[0, 0]
    red, green, blue = BLUE  # of the background; the weights are those of BT.709
    assert luma == pytest.approx(16 + 219 * (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255, abs=2)


def test_gif_loops_forever(tmp_path: Path) -> None:
    target = tmp_path / "a.gif"
    with open_writer(str(target), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(16))
    with Image.open(target) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
        assert image.info["loop"] == 0
        assert sum(durations) == pytest.approx(1000, abs=20)


@pytest.mark.parametrize("name", ["frames", "v1.2/"])
def test_folder_of_pictures(tmp_path: Path, name: str) -> None:
    with open_writer(f"{tmp_path}/{name}", width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(2))
        writer.write(clip(1, first=2))
    files = sorted((tmp_path / name).iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert np.array_equal(np.stack([np.array(Image.open(file)) for file in files]), clip(3))


def test_pipe(tmp_path: Path) -> None:
    target = tmp_path / "a.y4m"
    with (
        target.open("wb") as file,
        standard_output(file.fileno()),
        open_writer("-", width=WIDTH, height=HEIGHT, fps=FPS) as writer,
    ):
        assert writer.write(clip(3))
        assert writer.write(clip(2, first=3))
    assert target.read_bytes().startswith(b"YUV4MPEG2 W64 H48 F16:1 ")
    frames, rate = decode(target)
    assert rate == FPS
    assert_close(frames, clip(5), 3.0)


def test_frames_leave_the_pipe_as_they_come() -> None:
    reader, end = os.pipe()
    with standard_output(end), open_writer("-", width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(1))
        received = os.read(reader, 1 << 16)
    os.close(reader)
    os.close(end)
    assert len(received) > WIDTH * HEIGHT * 3 / 2


def test_reader_of_the_pipe_leaves() -> None:
    reader, end = os.pipe()
    with standard_output(end), open_writer("-", width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        os.close(reader)
        assert not writer.write(clip(1))
        assert not writer.write(clip(1))
    os.close(end)


def test_pipe_without_a_reader() -> None:
    reader, end = os.pipe()
    os.close(reader)
    with standard_output(end), open_writer("-", width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        assert not writer.write(clip(1))
    os.close(end)


def test_mp4_survives_a_crash(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    script = f"""if True:
        import os, numpy
        from sfrt.video import open_writer
        writer = open_writer({str(target)!r}, width={WIDTH}, height={HEIGHT}, fps={FPS})
        for frame in numpy.load({str(tmp_path / "clip.npy")!r}):
            writer.write(frame[None])
        os._exit(7)
    """
    np.save(tmp_path / "clip.npy", clip(60))
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 7
    frames, _ = decode(target)
    assert len(frames) >= 60 - FPS
    assert_close(frames, clip(len(frames)), 3.0)


def test_interrupted_mp4_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt), open_writer(str(target), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(21))
        raise KeyboardInterrupt
    assert_close(decode(target)[0], clip(21), 3.0)


def write_noise(target: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, HEIGHT, WIDTH, 3), np.uint8)
    with open_writer(str(target), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        for start in range(0, 60, 6):
            writer.write(noise[start : start + 6])


@pytest.mark.parametrize(
    ("name", "limit"), [("a.mp4", 300), ("a.mp4", 2000), ("a.gif", 0), ("a.gif", 2000), ("a", 2000)]
)
def test_nothing_half_written_is_left(tmp_path: Path, name: str, limit: int) -> None:
    target = tmp_path / name
    with pytest.raises(MediaError, match="largest size") as caught, file_size_limit(limit):
        write_noise(target)
    assert str(caught.value).startswith(f"cannot write {target}")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_what_can_be_shown_stays(tmp_path: Path, name: str) -> None:
    """The disk fills up after some frames, or while the video is finished: what is left decodes to its end."""
    write_noise(tmp_path / name)
    size = (tmp_path / name).stat().st_size
    for limit in (size * 3 // 4, size - 1):
        with pytest.raises(MediaError, match="largest size"), file_size_limit(limit):
            write_noise(tmp_path / name)
        assert 20 < len(decode(tmp_path / name)[0]) < 60


def test_pictures_before_the_full_disk_stay(tmp_path: Path) -> None:
    frames = clip(2)
    frames[1] = np.random.default_rng(0).integers(0, 255, frames[1].shape)
    with (
        pytest.raises(MediaError, match=r"000001\.png"),
        file_size_limit(4000),
        open_writer(str(tmp_path / "a"), width=WIDTH, height=HEIGHT, fps=FPS) as writer,
    ):
        writer.write(frames)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["000000.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_behind_standard_output() -> None:
    message = "^cannot write standard output: the disk is full; free some space or write elsewhere$"
    with (
        open("/dev/full", "wb") as full,
        standard_output(full.fileno()),
        pytest.raises(MediaError, match=message),
        open_writer("-", width=WIDTH, height=HEIGHT, fps=FPS) as writer,
    ):
        writer.write(clip(1))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_nothing_written_leaves_nothing(tmp_path: Path, name: str) -> None:
    with open_writer(str(tmp_path / name), width=WIDTH, height=HEIGHT, fps=FPS):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_until_the_first_frame_an_old_file_stays(tmp_path: Path, name: str) -> None:
    """Ctrl-C while the model loads or the first chunk is made."""
    (tmp_path / name).write_text("mine")
    with (
        pytest.raises(KeyboardInterrupt),
        open_writer(str(tmp_path / name), width=WIDTH, height=HEIGHT, fps=FPS) as writer,
    ):
        writer.write(clip(0))
        raise KeyboardInterrupt
    assert (tmp_path / name).read_text() == "mine"


def test_an_interrupted_picture_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def interrupted(image: Image.Image, path: Path, **options: object) -> None:
        if path.name == "000001.png":
            path.write_bytes(b"half a picture")
            raise KeyboardInterrupt
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        open_writer(str(tmp_path / "a"), width=WIDTH, height=HEIGHT, fps=FPS) as writer,
    ):
        writer.write(clip(2))
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["000000.png"]


@pytest.mark.parametrize("name", ["12:30.mp4", "file:a.gif"])
def test_a_name_that_looks_like_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with open_writer(name, width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip(5))
    assert os.listdir(tmp_path) == [name]
    assert len(read_frames(name, height=HEIGHT, width=WIDTH)) in (5, 6)  # a GIF counts hundredths of a second


def test_a_terminal_wants_no_raw_video() -> None:
    terminal, inside = pty.openpty()
    with standard_output(inside), pytest.raises(MediaError, match="terminal"):
        check_target("-")
    os.close(terminal)
    os.close(inside)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("a.avi", r"unknown ending \.avi; use \.mp4, \.gif, a folder"),
        ("missing/a.mp4", "its folder does not exist"),
        ("missing/a.gif", "its folder does not exist"),
        ("folder.mp4", "that is a folder"),
        ("full", "not empty"),
        ("file", "in the way"),
        ("file/a", "in the way"),
        ("a" * 300 + ".mp4", "too long"),
    ],
)
def test_bad_targets(tmp_path: Path, target: str, named: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for refuse in (check_target, partial(open_writer, width=WIDTH, height=HEIGHT, fps=FPS)):
        with pytest.raises(MediaError, match=named):
            refuse(str(tmp_path / target))
    assert sorted(tmp_path.rglob("*")) == before


def test_odd_sizes_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("mine")
    with pytest.raises(MediaError, match="even sizes"):
        open_writer(str(tmp_path / "a.mp4"), width=63, height=HEIGHT, fps=FPS)
    assert (tmp_path / "a.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    "frames", [clip(1)[:, :, :-2], clip(1).astype(np.float32), clip(1)[0]], ids=["narrow", "float", "one"]
)
def test_other_frames_are_refused(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    with (
        open_writer(str(tmp_path / "a.mp4"), width=WIDTH, height=HEIGHT, fps=FPS) as writer,
        pytest.raises(MediaError, match=r"uint8 \[F, 48, 64, 3\]"),
    ):
        writer.write(frames)


def test_closed_writer_takes_no_more(tmp_path: Path) -> None:
    writer = open_writer(str(tmp_path / "a.gif"), width=WIDTH, height=HEIGHT, fps=FPS)
    writer.write(clip(1))
    writer.close()
    writer.close()
    with pytest.raises(MediaError, match="closed"):
        writer.write(clip(1))
    assert len(decode(tmp_path / "a.gif")[0]) == 1
