"""Batches of slices on the device: their values, their sizes, and no waiting between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_no_sync import TO_HOST, Watch, watched

from evaluation import predict_volume as predicting
from evaluation import slice_batches as batching
from evaluation.predict_volume import predict_volume
from evaluation.slice_batches import padded_count, slice_batches

CPU, GPU = torch.device("cpu"), SimpleNamespace(type="cuda")


class StandIn:
    """A GPU that copies only when it is waited for, as late as a real one may.

    Args:
        late: False: it copies at once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, late: bool = True) -> None:
        self.late, self.pinned, self.waits = late, set(), 0
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        empty, to, gpu = torch.empty, torch.Tensor.to, self

        class Event:
            at = 0

            def record(self, stream: object) -> None:
                assert stream == (GPU, "stream")
                self.at = len(gpu.queue)

            def synchronize(self) -> None:
                gpu.run(self.at)

        def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            made = empty(*args, **kwargs)
            if pin_memory:
                made.fill_(7)  # what was in that memory before
                self.pinned.add(made.untyped_storage().data_ptr())
            return made

        def send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not args or args[0] is not GPU:
                return to(tensor, *args, **kwargs)
            pinned = tensor.untyped_storage().data_ptr() in self.pinned
            self.waits += not (pinned and kwargs.get("non_blocking"))
            arrived = torch.full_like(tensor, torch.nan)
            self.queue.append(lambda: arrived.copy_(tensor))
            if not self.late:
                self.run(len(self.queue))
            return arrived

        monkeypatch.setattr(torch, "empty", make)
        monkeypatch.setattr(torch.Tensor, "to", send)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (device, "stream"))

    def run(self, until: int) -> None:
        for copy in self.queue[self.done : until]:
            copy()
        self.done = max(self.done, until)


class Counting:
    """A volume that is read a few slices at a time."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.read = array, array.shape, []

    def __getitem__(self, part: slice) -> np.ndarray:
        self.read.append((part.start, part.stop))
        return self.array[part]


def volume_of(depth: int, dtype: str = "float32", colour: bool = False) -> np.ndarray:
    shape = (depth, 3, 5, 4) if colour else (depth, 5, 4)
    return np.random.default_rng(depth).uniform(0, 200, shape).astype(dtype)


VOLUMES = [
    volume_of(0),
    volume_of(1),
    volume_of(7, "uint8"),
    volume_of(12, "int16"),
    volume_of(26, "float64"),
    volume_of(29, colour=True),
    volume_of(30)[::-1, :, ::-1].copy(),
]


@pytest.mark.parametrize("volume", VOLUMES, ids=lambda volume: f"{volume.shape}-{volume.dtype}")
@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_a_cpu_and_a_late_gpu_get_the_same_slices(
    volume: np.ndarray, batch_size: int, monkeypatch: pytest.MonkeyPatch
):
    gpu = StandIn(monkeypatch)
    on_cpu = list(slice_batches(Counting(volume), batch_size, CPU))
    assert not gpu.pinned
    on_gpu = list(slice_batches(Counting(volume), batch_size, GPU))
    assert gpu.waits == 0 and len(gpu.pinned) == min(2, len(on_gpu))
    gpu.run(len(gpu.queue))
    expected = torch.from_numpy(volume.astype(np.float32))
    for number, batches in enumerate(zip(on_cpu, on_gpu, strict=True)):
        start = number * batch_size
        slices = expected[start : start + batch_size]
        for place, count, batch in batches:
            assert (place, count, batch.dtype) == (start, len(slices), torch.float32)
            assert torch.equal(batch[:count], slices)
            assert not batch[count:].any()  # neither NaN nor what was there before
        assert len(batches[0][2]) == len(slices)
        assert len(batches[1][2]) == padded_count(len(slices), batch_size)


def test_the_stand_in_shows_a_buffer_that_is_overwritten_too_early(monkeypatch: pytest.MonkeyPatch):
    gpu, volume = StandIn(monkeypatch), volume_of(30)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    (_, count, first), *_ = slice_batches(volume, 4, GPU)
    gpu.run(len(gpu.queue))
    assert not torch.equal(first[:count], torch.from_numpy(volume[:4]))


def test_the_host_reads_two_batches_ahead_and_no_more(monkeypatch: pytest.MonkeyPatch):
    gpu, volume = StandIn(monkeypatch), Counting(volume_of(20))
    batches = slice_batches(volume, 4, GPU)
    assert [next(batches)[0] for _ in range(2)] == [0, 4]
    assert gpu.done == 0  # nothing waited for the first copy
    next(batches)
    assert gpu.done == 1 and volume.read == [(0, 4), (4, 8), (8, 12)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 12, 16, 100])
def test_a_padded_batch_has_one_of_few_sizes_and_never_doubles(batch_size: int):
    sizes = {count: padded_count(count, batch_size) for count in range(1, batch_size + 1)}
    for count, size in sizes.items():
        assert count <= size <= min(batch_size, max(1, 2 * count - 1)), count
    assert sizes[1] == 1 and sizes[batch_size] == batch_size
    assert len(set(sizes.values())) <= 1 + int(np.ceil(np.log2(batch_size)))


def test_the_sizes_of_the_default_batch():
    sizes = [padded_count(count, 12) for count in range(1, 13)]
    assert sizes == [1, 2, 3, 6, 6, 6, 12, 12, 12, 12, 12, 12]
    assert sum(sizes) - sum(range(1, 13)) == 18  # 1.5 on average


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_model().eval()


def on_stand_in(volume: Any, batch_size: int, device: torch.device) -> Iterator[Any]:
    assert device == CPU
    return batching.slice_batches(volume, batch_size, GPU)


@pytest.mark.parametrize("flips", [(), (0, 1)])
def test_padding_reaches_no_label_no_probability_and_no_check(
    model: torch.nn.Module, flips: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    volume = np.random.default_rng(1).random((13, 40, 40), dtype=np.float32)
    sizes = {"input_size": (40, 40), "image_size": (64, 64), "batch_size": 8, "flips": flips}

    def predicted(net: torch.nn.Module) -> tuple[np.ndarray, torch.Tensor, list[int]]:
        parts: dict[int, torch.Tensor] = {}
        progress: list[int] = []
        labels = predict_volume(
            net, volume, **sizes, progress=progress.append, on_probabilities=parts.__setitem__
        )
        assert list(parts) == [0, 8]
        return labels, torch.cat(list(parts.values())), progress

    class NaNIfEmpty(torch.nn.Module):
        """The logits of an empty slice, which only padding has here, are NaN."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.batches = model, []

        def forward(self, images: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
            self.batches.append(len(images))
            masks = self.model(images, *rest)["masks"]
            empty = images.flatten(1).count_nonzero(1) == 0
            return {"masks": masks.masked_fill(empty[:, None, None, None], torch.nan)}

    labels, probabilities, progress = predicted(model)
    StandIn(monkeypatch, late=False)
    monkeypatch.setattr(predicting, "slice_batches", on_stand_in)
    net = NaNIfEmpty()
    same, likewise, told = predicted(net)
    assert set(net.batches) == {8} and told == progress == [8, 5]
    assert np.array_equal(same, labels) and len(np.unique(labels)) > 1
    assert torch.allclose(likewise, probabilities, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 11, 31])
def test_a_volume_waits_for_the_device_only_at_its_end(
    depth: int, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
):
    volume = np.random.default_rng(1).random((depth, 48, 40), dtype=np.float32)
    sizes = {"input_size": (40, 40), "image_size": (64, 64), "batch_size": 4}
    predict_volume(model, volume, **sizes)  # makes the matrices of the zooms
    gpu, watch = StandIn(monkeypatch, late=False), Watch()
    monkeypatch.setattr(predicting, "slice_batches", on_stand_in)
    for name in TO_HOST:
        monkeypatch.setattr(torch.Tensor, name, watched(watch, name, getattr(torch.Tensor, name)))
    with watch:
        predict_volume(model, volume, **sizes)
    assert gpu.waits == 0
    assert watch.seen == [f"{name} in predict_volume.py" for name in ("cpu", "numpy") * 2]
