"""A training step whose encoder blocks are compiled one by one."""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import scenes
from benchmarks.timing import timed
from benchmarks.where import installed

from .rows import Row, Setting, at_most, not_run
from .speed import Ceilings, goal_rows, launch_rows, measure, measure_plain, memory_row, speed_row
from .training import Case, Way
from .work import step_operations

# Blocks of windows, blocks of the whole image, and the first block, whose input needs no gradient.
GRAPHS_OF_A_SHAPE = 3
MOST_DIFFERENCE = 0.02  # of the loss from the eager one, in bf16
HOPED = "hoped on an H100: 450 to 500 images/s"


def compiler() -> str:
    """Say which of Triton, a C compiler and the headers of Python this machine has."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    c_compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), None)
    found = {
        "Triton": installed("triton"),
        "C compiler": c_compiler and Path(c_compiler).name,
        "Python.h": "found" if header.is_file() else None,
    }
    return ", ".join(f"{name}: {value or 'absent'}" for name, value in found.items())


def compiled(setting: Setting) -> Iterator[Row]:
    """Train on batches of 24, 3 and 24 slices: seconds to compile, graphs, images a second."""
    from torch._dynamo.utils import counters

    from training.compiling import compile_blocks

    yield Row("what Inductor needs for a GPU", compiler())
    case, device, way = Case.of(setting), setting.device, Way("bf16")
    # An earlier run must not have left its code.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scenes.scratch_folder())
    way.choose(compiles=True)
    network = case.network(device)
    ceilings = Ceilings.of(sum(step_operations(network, case.image_size)), setting)
    whole, odd = (case.slices(count, device) for count in (case.batch, max(1, case.batch // 8)))
    eager = way.updates(copy.deepcopy(network), case.batch)(whole)
    # On a CPU, Inductor would need a C++ compiler and minutes.
    compile_blocks(network, "aot_eager" if setting.small else "inductor")
    update = way.updates(network, case.batch)
    counters.clear()
    graphs, losses = [], []
    for batch in (whole, odd, whole):
        before = counters["stats"]["unique_graphs"]
        seconds = timed(lambda batch=batch: losses.append(update(batch)), device)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        what = f"step {len(graphs)}, {len(batch['image'])} slices, compiled blocks"
        yield Row(what, seconds, "s", note=f"{graphs[-1]} graphs compiled")
        if len(graphs) == 1:  # before the time may run out
            difference = float((losses[0] - eager).abs())
            what = "loss of the first step: difference from eager"
            yield at_most(what, difference, MOST_DIFFERENCE)
            found = measure(partial(update, whole), case.batch, setting)
            row = speed_row(f"{way}, compiled blocks", found, ceilings)
            yield replace(row, note=f"{row.note}; {HOPED}")
    network = update = None  # so that their memory does not count
    yield from recorded(case, setting, ceilings)
    right = graphs == [GRAPHS_OF_A_SHAPE, GRAPHS_OF_A_SHAPE, 0]
    expected = f"{GRAPHS_OF_A_SHAPE} for each shape, none when it comes again"
    yield Row("graphs of the three steps", " + ".join(map(str, graphs)), "", expected, right)


def recorded(case: Case, setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """Time a step whose compiled kernels a CUDA graph replays, with and without repeatable ones."""
    from training.compiling import compile_blocks

    device = setting.device
    if device.type != "cuda":
        yield not_run("speed, compiled blocks, recorded")
        return
    network = case.network(torch.device("cpu"))
    plain = measure_plain(network, case, setting)
    batch = case.slices(case.batch, device)
    for way in (Way("bf16", recorded=True), Way("bf16", deterministic=False, recorded=True)):
        way.choose(compiles=True)
        twin = copy.deepcopy(network).to(device)
        compile_blocks(twin)
        step = partial(way.updates(twin, case.batch), batch)
        found = measure(step, case.batch, setting, recorded=True)
        name = f"{way}, compiled blocks"
        yield speed_row(name, found, ceilings)
        yield memory_row(name, found)
        yield from launch_rows(name, step, found, device)
        yield from goal_rows(name, found, plain, ceilings)
        del twin, step
