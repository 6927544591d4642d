"""sfrt/bundle/upload: the way of weights to a GPU, on a double whose copies happen as late as they may."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sfrt.bundle import Bundle
from sfrt.bundle.upload import BLOCK, upload
from sfrt.bundle.writer import BundleWriter
from sfrt.errors import BundleError
from tests.bundles import MANIFEST, tensors, write


@dataclass
class LateQueue:
    """A device that copies nothing before somebody waits for it: what is overwritten too early arrives wrong."""

    log: list[str] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    copies_until_interrupt: int = -1
    _queued: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _done: int = 0

    def staging(self, size: int) -> Tensor:
        self.blocks.append(torch.full((size,), 255, dtype=torch.uint8))
        return self.blocks[-1]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert "copy" not in self.log, "all targets are made before the first copy"
        return torch.empty(shape, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if self.copies_until_interrupt == self.log.count("copy"):
            raise KeyboardInterrupt
        assert target.shape == source.shape
        self.log.append("copy")
        self._queued.append((target, source))

    def mark(self) -> Callable[[], object]:
        self.log.append("mark")
        until = len(self._queued)

        def wait() -> None:
            self.log.append("wait")
            while self._done < until:
                target, source = self._queued[self._done]
                target.copy_(source)
                self._done += 1

        return wait

    @property
    def idle(self) -> bool:
        return self._done == len(self._queued)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].is_contiguous()
        bytes_found, bytes_expected = found[name].reshape(-1), tensor.reshape(-1)
        assert torch.equal(bytes_found.view(torch.uint8), bytes_expected.view(torch.uint8)), name


DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.float8_e4m3fn)
SHAPES = st.lists(st.integers(0, 9), max_size=3)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=8),
    block=st.sampled_from([8, 16, 24, 64, 1 << 20]),
)
def test_every_byte_arrives(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[list[int], torch.dtype]], block: int
) -> None:
    """Whatever the tensors and the blocks: the same bytes, and the hash of the file as it is."""
    generator = torch.Generator().manual_seed(0)
    expected = {
        str(number): torch.randn(shape, generator=generator).to(dtype) for number, (shape, dtype) in enumerate(sizes)
    }
    path = tmp_path_factory.mktemp("upload") / "x.safetensors"
    save_file(expected, path)
    queue, digest = LateQueue(), hashlib.sha256()
    same(upload(path, queue, None, digest.update, block), expected)
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(queue.blocks) <= 2 and all(len(held) <= block for held in queue.blocks)


def test_a_block_is_filled_again_when_it_is_done_with(tmp_path: Path) -> None:
    """Two blocks take turns; the third is read when the first was copied, and hashed however slowly."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(24, dtype=torch.float32)}, path)
    queue, digest = LateQueue(), hashlib.sha256()

    def slowly(held: memoryview) -> None:
        time.sleep(0.01)
        digest.update(held)

    upload(path, queue, None, slowly, block=32)
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert queue.log[:8] == ["copy", "mark", "copy", "mark", "wait", "copy", "mark", "mark"]
    assert queue.idle


def test_conversion_on_the_way(tmp_path: Path) -> None:
    """To the dtype asked for, but for quantised weights and scales."""
    stored = {**tensors(), "a.weight": torch.ones(4, dtype=torch.int8), "a.weight_scale": torch.ones(4)}
    path = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    kept = {"a.weight", "a.weight_scale"}
    expected = {name: tensor if name in kept else tensor.half() for name, tensor in stored.items()}
    same(upload(path, LateQueue(), torch.float16, block=24), expected)


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> list[LateQueue]:
    """The queues that bundles take to "cuda"."""
    taken: list[LateQueue] = []

    def queue(device: torch.device) -> LateQueue:
        taken.append(LateQueue())
        return taken[-1]

    monkeypatch.setattr("sfrt.bundle.upload.CudaCopyQueue", queue)
    return taken


def test_a_bundle_takes_it(tmp_path: Path, queues: list[LateQueue], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model")
    bundle = Bundle.open(tmp_path / "model", verify=False)
    monkeypatch.setattr("sfrt.bundle.hash_file", lambda *_: pytest.fail("the file is read a second time"))
    same(bundle.load("transformer", "cuda", verify=True), tensors())
    bundle.verify("transformer.safetensors")  # known to be right
    assert [queue.idle for queue in queues] == [True]


def test_a_wrong_hash_is_told_before_anything_is_used(tmp_path: Path, queues: list[LateQueue]) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / "transformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    bundle = Bundle.open(tmp_path / "model", verify=False)
    for _ in range(2):  # it is not taken for right afterwards
        with pytest.raises(BundleError, match=r"transformer\.safetensors is damaged: its sha256 is .* copy or export"):
            bundle.load("transformer", "cuda", verify=True)
    bundle.load("transformer", "cuda")
    assert [queue.idle for queue in queues] == [True, True, True]


def test_a_file_that_is_cut_short_meanwhile(
    tmp_path: Path, queues: list[LateQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write(tmp_path / "model")
    path = tmp_path / "model" / "transformer.safetensors"

    def cut(queue: LateQueue, size: int) -> Tensor:
        os.truncate(path, path.stat().st_size - 4)
        return torch.empty(size, dtype=torch.uint8)

    with monkeypatch.context() as patch, pytest.raises(BundleError, match=r"cannot be read \(it ends 8 bytes early\)"):
        patch.setattr(LateQueue, "staging", cut)
        bundle.load("transformer", "cuda")
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"transformer\.safetensors cannot be read \("):
        bundle.load("transformer", "cuda")
    path.unlink()
    with pytest.raises(BundleError, match=r"transformer\.safetensors cannot be read \("):
        bundle.load("transformer", "cuda")


def test_an_interrupt_waits_for_what_is_under_way(tmp_path: Path) -> None:
    """Memory that a copy still writes must not be let go, whether the interrupt comes between blocks or within one."""
    path = tmp_path / "x.safetensors"
    save_file({name: torch.arange(12, dtype=torch.float32) for name in "xyz"}, path)
    for copies in range(5):
        queue = LateQueue(copies_until_interrupt=copies)
        with pytest.raises(KeyboardInterrupt):
            upload(path, queue, None, block=64)
        assert queue.log.count("copy") == copies and queue.idle


def test_a_tensor_that_is_not_aligned(tmp_path: Path) -> None:
    """The library takes such a file; a view of its bytes cannot."""
    header = {
        "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(5))
    with pytest.raises(BundleError, match="b is not aligned"):
        upload(path, LateQueue(), None)


@pytest.mark.gpu
def test_the_way_to_a_gpu(tmp_path: Path) -> None:
    """Tensors over the ends of several blocks, as stored and converted, on the real queue."""
    generator = torch.Generator().manual_seed(0)
    expected = {str(number): torch.randn(BLOCK // 3 + number, generator=generator) for number in range(4)}
    with BundleWriter(tmp_path / "model") as writer:
        writer.add_tensors("transformer", expected)
        writer.finish(MANIFEST)
    bundle = Bundle.open(tmp_path / "model", verify=False)
    for dtype in (None, torch.bfloat16):
        found = bundle.load("transformer", "cuda", dtype, verify=True)
        same({name: tensor.cpu() for name, tensor in found.items()}, {k: v.to(dtype) for k, v in expected.items()})
