"""The stages of the proof on a GPU that measure speed: counts, bounds, and each at small size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import scenes
from benchmarks.gpu import compiled, kernels, loader, phantoms, ranks, speed
from benchmarks.gpu.rows import Row, Setting
from benchmarks.gpu.training import Case, Way
from benchmarks.gpu.work import count_operations, datasheet_peak, step_operations
from benchmarks.plain import plain_copy
from segment_anything import ENCODERS

SMALL = Setting(torch.device("cpu"), small=True)
RANK = 4  # of the networks of `scenes`


@pytest.fixture(autouse=True)
def usual_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the stages choose for their own process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.set_deterministic_debug_mode("default")


def product(rows: int, inner: int, columns: int) -> int:
    """The operations of a matrix product."""
    return 2 * rows * inner * columns


def operations_of_block(
    width: int, grid: int, window: int | None, *, trained: bool
) -> tuple[int, int]:
    """The operations of a block of SAM's encoder for one image, by hand: forward and backward.

    Args:
        trained: whether every weight trains, or only the low-rank updates of q and v.
    """
    side = window or grid
    windows = (-(-grid // side)) ** 2
    tokens = side**2  # of a window; SAM pads the grid before it projects the tokens
    weights = product(windows * tokens, width, 3 * width) + product(windows * tokens, width, width)
    weights += 2 * product(grid**2, width, 4 * width)
    updates = 2 * 2 * product(windows * tokens, width, RANK)
    attention = 2 * windows * product(tokens, width, tokens)
    positions = 2 * windows * product(tokens, width, side)
    # A product has two gradients, of which those of frozen weights are not computed.
    both = 2 if trained else 1
    return (
        weights + updates + attention + positions,
        both * weights + 2 * updates + 2 * attention + both * positions,
    )


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny", 320), ("vit_tiny", 224), ("vit_tiny", 512)]
)
def test_operations_of_blocks_are_those_by_hand(name: str, size: int, trained: bool):
    case = Case(name, size, 1)
    network = case.network(torch.device("cpu"))
    if trained:
        network.train_all_weights()
    encoder = plain_copy(network).to("meta").sam.image_encoder
    grid, spec = size // 16, ENCODERS[name]
    for index, block in enumerate(encoder.blocks):
        tokens = torch.empty(1, grid, grid, spec.width, device="meta", requires_grad=True)
        window = None if index in spec.global_blocks else 14
        expected = operations_of_block(spec.width, grid, window, trained=trained)
        assert count_operations(lambda block=block, x=tokens: block(x)) == expected


@pytest.mark.slow
def test_operations_of_the_published_network():
    network = Case("vit_b", 512, 1).network(torch.device("cpu"))
    forward, backward = step_operations(network, 512)
    blocks = [
        operations_of_block(768, 32, None if index in (2, 5, 8, 11) else 14, trained=False)
        for index in range(12)
    ]
    by_hand = [sum(each) for each in zip(*blocks, strict=True)]
    by_hand[0] += product(1024, 768, 768)  # patches; their weights are frozen
    neck = product(1024, 768, 256) + product(1024, 9 * 256, 256)
    by_hand = [operations + neck for operations in by_hand]
    # The first block has no input that needs a gradient; the rest is the decoder.
    assert 0.95 < by_hand[0] / forward < 1 and 0.95 < by_hand[1] / backward < 1.05
    assert forward + backward == pytest.approx(472.3e9, rel=1e-3)


def test_the_share_of_the_peak():
    ceilings = speed.Ceilings(operations=5_000, datasheet=1e6, measured=5e5)
    found = speed.Speed(seconds=0.5, images=10, memory=None)
    assert ceilings.shares(found) == {"datasheet's": 10.0, "measured": 20.0}
    assert replace(ceilings, datasheet=None).shares(found)["datasheet's"] is None
    assert datasheet_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert datasheet_peak("") is None and datasheet_peak("Tesla T4") is None


@pytest.mark.parametrize(
    ("seconds", "memory", "expected"), [(1.0, 3.0, "reached"), (1.01, 3.01, "missed")]
)
def test_the_goals_are_told(seconds: float, memory: float, expected: str):
    ceilings = speed.Ceilings(operations=1, datasheet=None, measured=1.0)
    plain = speed.Speed(seconds=8.0, images=24, memory=9.0)
    rows = list(speed.goal_rows("bf16", speed.Speed(seconds, 24, memory), plain, ceilings))
    assert all(row.note.endswith(expected) for row in rows[:2])
    assert rows[2].verdict == "not run" and rows[3].verdict == "figure" and "40 %" in rows[3].note
    rows = list(speed.goal_rows("bf16", speed.Speed(seconds, 24, memory), None, ceilings))
    assert [row.verdict for row in rows[:2]] == ["not run", "not run"]


@pytest.mark.parametrize(("memory", "passed"), [(9.9, True), (10.1, False)])
def test_memory_may_exceed_its_estimate_by_what_the_trainer_allows(memory: float, passed: bool):
    row = speed.memory_row("bf16", speed.Speed(1.0, 24, memory), estimate=8.0)
    assert row.passed is passed


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def measure(step: object, images: int, setting: Setting) -> speed.Speed:
        tried.append(images)
        if images > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return speed.Speed(1.0, images, 1.0)

    monkeypatch.setattr(speed, "measure", measure)
    case = Case("vit_tiny", 64, 4)
    network = case.network(torch.device("cpu"))
    assert speed.measure_plain(network, case, SMALL).images == 1
    assert tried == [4, 2, 1]
    assert speed.measure_plain(network, replace(case, batch=8), SMALL) is None


def test_kernels_are_added_up_by_name(monkeypatch: pytest.MonkeyPatch):
    calls = [("norm", 1000.0), ("product", 2500.0), ("norm", 500.0), ("copy", 1000.0)]
    found = speed.grouped(calls)
    expected = [("product", 1, 2.5), ("norm", 2, 1.5), ("copy", 1, 1.0)]
    assert [(k.name, k.calls, k.milliseconds) for k in found] == expected
    monkeypatch.setattr(speed, "profile", lambda step, device: found)
    slow = speed.Speed(0.01, 24, 1.0)
    rows = list(speed.launch_rows(speed.PROMISED, lambda: None, slow, torch.device("cuda")))
    assert [row.value for row in rows] == [4, 50.0, 2.5, 1.5, 1.0]
    assert rows[2].note == "1 calls, 50.0 %: product"
    found.clear()  # where the profiler may not look at the GPU
    (row,) = speed.launch_rows(speed.PROMISED, lambda: None, slow, torch.device("cuda"))
    assert row.verdict == "not run" and "profiler" in row.note


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_runs_on_a_cpu_is_no_kernel():
    assert speed.profile(lambda: torch.ones(3) + 1, torch.device("cpu")) == []


def test_an_update_that_differs_fails_and_names_the_weight():
    whole = {"a": torch.zeros(2), "b": torch.zeros(3), "loss": torch.tensor(1.0)}
    other = {"a": torch.full((2,), 9e-5), "b": torch.tensor([0, 0, 2e-4]), "loss": whole["loss"]}
    loss, weight = ranks.same(whole, other, "in parts")
    assert loss.passed and not weight.passed and weight.note == "b"


def test_dsc_of_all_volumes_together():
    label = np.zeros((3, 32, 32), dtype=np.uint8)
    label[:, 4:8, 4:8], label[:, 10:20, 10:20] = 1, 5
    prediction = label.copy()
    prediction[0, 4:8, 4:8] = 0  # a third of organ 1 is missed: 2 · 2 / (2 + 3)
    net = scenes.Answers(prediction)
    sizes = phantoms.Sizes(size=32, image_size=32)
    image = label.astype(np.float32) / 8
    found = phantoms.dsc(net, [(image, label)], Way("fp32"), sizes)
    assert found[[0, 4]] == pytest.approx([80, 100])
    assert np.isnan(np.delete(found, [0, 4])).all()


def not_failed(rows: list[Row]) -> list[Row]:
    """Return the rows, of which none may have failed."""
    assert [row for row in rows if row.passed is False] == []
    return rows


@pytest.mark.slow
def test_speed_at_small_size():
    rows = not_failed(list(speed.speed(SMALL)))
    told = [row.what for row in rows if row.verdict == "figure"]
    assert len(told) == 1 + 1 + sum(not way.recorded for way in speed.WAYS) + 1
    assert {row.note for row in rows if row.what.startswith("peak memory")} == {"needs CUDA"}


@pytest.mark.slow
def test_kernels_at_small_size():
    rows = not_failed(list(kernels.kernels(SMALL)))
    refusing = [row.value for row in rows if row.what.endswith("kernels that refuse")]
    assert len(refusing) == 2 * len(kernels.SHAPES)
    assert all("cuDNN" in value and "efficient" in value for value in refusing)
    assert [row.verdict for row in rows].count("not run") == 1


@pytest.mark.slow
def test_loader_at_small_size():
    rows = not_failed(list(loader.loader(SMALL)))
    assert [row.unit for row in rows] == ["images/s", "images/s", "%"]


@pytest.mark.slow
def test_ranks_at_small_size():
    rows = not_failed(list(ranks.ranks(SMALL)))
    assert [row.verdict for row in rows].count("PASS") == 5


@pytest.mark.slow
def test_a_failed_process_ends_the_other(tmp_path):
    with pytest.raises(RuntimeError, match="ended with codes"):
        ranks.in_processes(
            SMALL, "gloo", [torch.device("cpu"), torch.device("meta")], tmp_path / "x"
        )


@pytest.mark.slow
def test_phantoms_at_small_size():
    rows = not_failed(list(phantoms.phantoms(SMALL)))
    assert len(rows) == 2 + 1 + scenes.NUM_CLASSES + 1 + 1 + 3


@pytest.mark.slow
def test_compiled_at_small_size():
    rows = not_failed(list(compiled.compiled(SMALL)))
    assert "3 + 3 + 0" in [row.value for row in rows]
