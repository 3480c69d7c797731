"""How fast a training step is, how much of the GPU it uses, and what it spends its time on."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.plain import plain_copy, plain_step
from benchmarks.timing import wait
from training.losses import SegmentationLoss
from training.memory import FITS, estimate_training_memory

from .machine import product_speed
from .rows import Row, Setting, at_most, not_run
from .training import CLASSES, LR, Case, Way, make_optimizer, median_seconds
from .work import datasheet_peak, step_operations

GIB = 2**30
# The way that the goals are about comes first, in case the time is too short for all.
PROMISED, *OTHERS = (
    Way(precision, deterministic=deterministic, parts=parts)
    for precision in ("bf16", "tf32", "fp32")
    for deterministic, parts in ((True, 1), (False, 1), (True, 2))
)
WAYS = [PROMISED, replace(PROMISED, recorded=True), *OTHERS]
AIM = 40  # % of the datasheet's bf16 peak
# Goals: so many times the images/s of plain fp32, and its memory divided by so much. They depend on
# the processor that launches the kernels too, so a goal that is missed is no failure.
FASTER, LEANER = 8, 3
SHOWN = 10  # kernels
MOST_OF_NAME = 120  # characters; those of a kernel may be a thousand
ACTIVITIES = (ProfilerActivity.CPU, ProfilerActivity.CUDA)


@dataclass(frozen=True)
class Speed:
    """A training step as it was measured."""

    seconds: float  # of a step
    images: int
    memory: float | None  # GiB, peak of a step; None: not on a GPU

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass(frozen=True)
class Ceilings:
    """What a step can be compared with.

    Args:
        operations: of one image, forward and backward.
        datasheet: bf16 operations per second as the maker states them; None: not known.
        measured: bf16 operations per second of a large product.
    """

    operations: int
    datasheet: float | None
    measured: float

    @classmethod
    def of(cls, operations: int, setting: Setting) -> Ceilings:
        """Measure the speed of a large product, and look up the datasheet's."""
        on_gpu = setting.device.type == "cuda"
        name = torch.cuda.get_device_name(setting.device) if on_gpu else ""
        return cls(operations, datasheet_peak(name), product_speed(setting, torch.bfloat16))

    def shares(self, speed: Speed) -> dict[str, float | None]:
        """Return the share of each peak in %."""
        rate = 100 * self.operations * speed.images_per_s
        return {
            "datasheet's": rate / self.datasheet if self.datasheet else None,
            "measured": rate / self.measured,
        }


def speed(setting: Setting) -> Iterator[Row]:
    """Time a training step in every precision, whole and in parts, against plain fp32."""
    case, device = Case.of(setting), setting.device
    network = case.network(torch.device("cpu"))  # only a copy lies on the GPU
    trained, every = (step_operations(n, case.image_size) for n in (network, _all_trained(network)))
    note = f"forward {trained[0] / 1e9:.4g}, backward {trained[1] / 1e9:.4g}; "
    note += f"{sum(every) / 1e9:.4g} if frozen weights had gradients too"
    yield Row("operations of a training image, plain form", sum(trained) / 1e9, "GFLOP", note=note)
    ceilings = Ceilings.of(sum(trained), setting)
    plain = measure_plain(network, case, setting)
    if plain is None:
        yield not_run("speed, plain fp32", "the memory is too small for a quarter of the batch")
    else:
        yield speed_row("plain fp32, as the original computes", plain, ceilings)
        yield memory_row("plain fp32", plain)
    batch = case.slices(case.batch, device)
    estimates: dict[tuple[torch.dtype | None, int], float] = {}
    for way in WAYS:
        if way.recorded and device.type != "cuda":
            yield not_run(f"speed, {way}")
            continue
        way.choose()
        key = way.amp_dtype, case.batch // way.parts
        if key not in estimates:
            estimates[key] = estimated_memory(network, case, *key)
        twin = copy.deepcopy(network).to(device)
        step = partial(way.updates(twin, case.batch), batch)
        found = measure(step, case.batch, setting, recorded=way.recorded)
        yield speed_row(str(way), found, ceilings)
        yield memory_row(str(way), found, estimates[key])
        yield from launch_rows(way, step, found, device)
        if way == PROMISED:
            yield from goal_rows(way, found, plain, ceilings)
        del twin, step


def _all_trained(network: nn.Module) -> nn.Module:
    twin = copy.deepcopy(network)
    twin.train_all_weights()
    return twin


def measure_plain(network: nn.Module, case: Case, setting: Setting) -> Speed | None:
    """Measure the plain form in fp32 with the largest part of the batch that fits; None: none."""
    Way("fp32", deterministic=False).choose()  # The original asks for no repeatable kernels.
    for images in (case.batch, case.batch // 2, case.batch // 4):
        if found := _plain_speed(network, case.slices(images, setting.device), setting):
            return found
        torch.cuda.empty_cache()
    return None


def _plain_speed(
    network: nn.Module, batch: dict[str, torch.Tensor], setting: Setting
) -> Speed | None:
    twin = plain_copy(network).to(setting.device)
    criterion = SegmentationLoss(CLASSES, 0.8)
    optimizer = make_optimizer(twin, "adamw", LR)
    try:
        return measure(
            lambda: plain_step(twin, batch, criterion, optimizer, LR), len(batch["image"]), setting
        )
    except torch.OutOfMemoryError:
        return None


def measure(
    step: Callable[[], object], images: int, setting: Setting, *, recorded: bool = False
) -> Speed:
    """Time a step, and take the peak memory of one that follows.

    Args:
        recorded: take the peak from the first step on, which records the others: a replay allocates
            nothing.
    """
    device = setting.device
    on_gpu = device.type == "cuda"
    if on_gpu and recorded:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(step, setting)
    if on_gpu and not recorded:
        torch.cuda.reset_peak_memory_stats(device)
        step()
    memory = torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None
    return Speed(seconds, images, memory)


def estimated_memory(
    network: nn.Module, case: Case, amp_dtype: torch.dtype | None, at_once: int
) -> float:
    """Return the GiB that `train.py --check` states for a step."""
    parts = estimate_training_memory(
        network,
        batch_size=at_once,
        img_size=case.image_size,
        kept=2,
        device_type="cuda",
        amp_dtype=amp_dtype,
    )
    return sum(parts.values())


def speed_row(what: str, found: Speed, ceilings: Ceilings) -> Row:
    """Return the images per second, and which share of the peaks they are."""
    shares = ", ".join(
        f"{share:.3g} % of the {name} bf16 peak"
        for name, share in ceilings.shares(found).items()
        if share is not None
    )
    note = f"batch {found.images}, {1e3 * found.seconds:.4g} ms a step, {shares}"
    return Row(f"speed, {what}", found.images_per_s, "images/s", note=note)


def memory_row(what: str, found: Speed, estimate: float | None = None) -> Row:
    """Return the peak memory.

    The trainer lets an estimate take the share `FITS` of the free memory, so it may be that much
    too low.
    """
    name = f"peak memory, {what}"
    if found.memory is None:
        return not_run(name)
    note = f"batch {found.images}"
    if estimate is None:
        return Row(name, found.memory, "GiB", note=note)
    note += f", estimate {estimate:.3g} GiB / {FITS}"
    return at_most(name, found.memory, estimate / FITS, "GiB", note)


def met(reached: bool) -> str:
    """Say whether a goal is reached."""
    return "reached" if reached else "missed"


def goal_rows(
    way: Way | str, found: Speed, plain: Speed | None, ceilings: Ceilings
) -> Iterator[Row]:
    """Compare a way with the goals and with the aim."""
    faster = f"{way}: images/s, in those of plain fp32"
    leaner = f"{way}: memory, in that of plain fp32"
    if plain is None or found.memory is None or plain.memory is None:
        yield not_run(faster)
        yield not_run(leaner)
    else:
        ratio = found.images_per_s / plain.images_per_s
        yield Row(faster, ratio, "×", note=f"goal: ≥ {FASTER}, {met(ratio >= FASTER)}")
        ratio = found.memory / plain.memory
        smaller = f"; plain fp32 fits only {plain.images} slices" * (plain.images < found.images)
        yield Row(
            leaner, ratio, "×", note=f"goal: ≤ 1/{LEANER}, {met(ratio <= 1 / LEANER)}{smaller}"
        )
    for name, share in ceilings.shares(found).items():
        what = f"{way}: share of the {name} bf16 peak"
        if share is None:
            yield not_run(what, "benchmarks/gpu/work.py does not know the GPU")
        else:
            yield Row(what, share, "%", note=f"aim: {AIM} % of the datasheet's")


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel in a step."""

    name: str
    calls: int
    milliseconds: float


def launch_rows(
    way: Way | str, step: Callable[[], object], found: Speed, device: torch.device
) -> Iterator[Row]:
    """Count what a step launches and how long the GPU waits; show the promised way's kernels."""
    if device.type != "cuda":
        yield not_run(f"launches a step, {way}")
        return
    kernels = profile(step, device)
    if not kernels:  # A machine may forbid it, of which the profiler only warns.
        yield not_run(f"launches a step, {way}", "PyTorch's profiler sees no kernel of this GPU")
        return
    busy = sum(kernel.milliseconds for kernel in kernels)
    launches = sum(kernel.calls for kernel in kernels)
    yield Row(f"launches a step, {way}", launches, note="kernels, copies and fills on the GPU")
    idle = max(0.0, 100 - 100 * busy / (1e3 * found.seconds))
    note = f"{busy:.4g} ms of kernels (profiled) in {1e3 * found.seconds:.4g} ms (not profiled)"
    yield Row(f"idle GPU within a step, {way}", idle, "%", note=note)
    if way == PROMISED:
        for rank, kernel in enumerate(kernels[:SHOWN], start=1):
            note = f"{kernel.calls} calls, {100 * kernel.milliseconds / busy:.1f} %: "
            note += kernel.name[:MOST_OF_NAME]
            yield Row(f"kernel {rank} of a step, {way}", kernel.milliseconds, "ms", note=note)


def profile(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Return what a step runs on the GPU, the largest share of the time first."""
    wait(device)
    with torch.profiler.profile(activities=ACTIVITIES) as recorded:
        step()
        wait(device)
    on_gpu = (
        (event.name, event.time_range.elapsed_us())
        for event in recorded.events()
        # Names that the host gives to a span of kernels are no kernels.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return grouped(on_gpu)


def grouped(calls: Iterable[tuple[str, float]]) -> list[Kernel]:
    """Add up calls (name, microseconds) by name, the largest sum first."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for name, microseconds in calls:
        times[name].append(microseconds)
    found = [Kernel(name, len(each), sum(each) / 1e3) for name, each in times.items()]
    return sorted(found, key=lambda kernel: -kernel.milliseconds)
