"""Videos written for real and read back, and every way to fail that a disk, a pipe or a user offers."""

from __future__ import annotations

import itertools
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sfrt.errors import MediaError
from sfrt.video import check_target, open_writer, read_frames, reading, stream_frames

HEIGHT, WIDTH, FPS = 48, 64, 16
BLUE, RED = (30, 60, 200), (225, 45, 35)
BT709 = 1


def clip(frames: int, first: int = 0) -> NDArray[np.uint8]:
    """A red square on blue, one pixel further right in each frame."""
    video = np.full((frames, HEIGHT, WIDTH, 3), BLUE, np.uint8)
    for index in range(frames):
        left = (first + index) % (WIDTH - 16)
        video[index, 16:32, left : left + 16] = RED
    return video


def decode(source: Path | str) -> tuple[NDArray[np.uint8], Fraction | None]:
    with av.open(str(source)) as container:
        tagged = container.streams.video[0].codec_context.colorspace == BT709
        # PyAV before 17 converts only between colour spaces that are named and differ.
        spaces = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"} if tagged else {}
        frames = [frame.to_ndarray(format="rgb24", **spaces) for frame in container.decode(video=0)]
        return np.stack(frames), container.streams.video[0].average_rate


def assert_close(frames: NDArray[np.uint8], expected: NDArray[np.uint8], mean: float) -> None:
    """Close on average, and not off by one frame: the square's place shows in the worst frame."""
    assert frames.shape == expected.shape
    error = np.abs(frames.astype(int) - expected.astype(int)).mean(axis=(1, 2, 3))
    assert error.max() <= mean


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that is full once a file has this size, as far as this process can tell."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
