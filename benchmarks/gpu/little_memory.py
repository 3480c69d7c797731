"""Too little memory on the GPU: every program ends with code 2 and one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import scenes

from . import files
from .programs import start
from .rows import Row, Setting, holds, not_run

# The limit is set in the process of the program, before it starts.
LIMITED = """
import sys
import torch
from common.errors import exit_on_bad_input

name, share, device, *argv = sys.argv[1:]
if float(share) < 1:
    torch.cuda.set_per_process_memory_fraction(float(share), device)
program = __import__(name)
with exit_on_bad_input():
    program.main(argv)
"""
SHARE = 0.05  # of the card's memory
# predict.py computes a picture alone, which fits into that share: the weights nearly fill this.
WEIGHTS_ONLY = 380 * 2**20  # bytes


def memory(setting: Setting) -> Iterator[Row]:
    """Run train.py, test.py and predict.py where the network or its activations do not fit."""
    folder, on_gpu = scenes.scratch_folder(), setting.device.type == "cuda"
    share, least = 1.0, 1.0
    if on_gpu:
        share = SHARE
        least = WEIGHTS_ONLY / torch.cuda.get_device_properties(setting.device).total_memory
    running = {}
    for name, flags in commands(setting, folder).items():
        limit = least if name == "predict" else share
        limited = ["-c", LIMITED, name, f"{limit:.6f}", str(setting.device), *flags]
        running[name] = start(limited, folder / f"{name}.txt")
    for name, program in running.items():
        code, told = program.process.wait(), program.told()
        if not on_gpu:
            yield holds(f"{name}.py ends with code 0", code == 0, told[-1] if code else "")
            yield not_run(f"{name}.py with too little memory")
            continue
        errors = [line for line in told if line.startswith("error: ")]
        clean = not any(line.startswith("Traceback") for line in told)
        passed = code == 2 and len(errors) == 1 and "memory" in errors[0] and clean
        which = least if name == "predict" else share
        what = f"{name}.py with {100 * which:.1f} % of the memory: code 2 and one sentence"
        yield holds(what, passed, f"code {code}; {(errors or told)[-1]}")


def commands(setting: Setting, folder: Path) -> dict[str, list[str]]:
    """Write the data and return the flags of each program."""
    from PIL import Image

    vit_name, size, count = ("vit_tiny", 64, 2) if setting.small else ("vit_b", 512, 24)
    common = ["--vit_name", vit_name, "--img_size", str(size), "--device", str(setting.device)]
    common += ["--processes", "1"]
    # One part of all slices, and every weight trains: gradients and optimiser need memory too.
    train = ["--root_path", str(files.write_slices(folder / "data", count, 64)), *common]
    train += ["--ckpt", "none", "--output", str(folder / "runs"), "--n_gpu", "1"]
    train += ["--batch_size", str(count), "--max_iterations", "1", "--num_workers", "0"]

    adapter = files.write_adapter(folder / "adapter.pth", vit_name, size)
    network = [*common, "--ckpt", "none", "--lora_ckpt", str(adapter)]
    network += ["--num_classes", str(files.NUM_CLASSES), "--input_size", "64"]
    slices = 2 if setting.small else 128  # in one batch
    volume = files.write_volume(folder / "testset", slices, 64)
    test = ["--volume_path", str(volume), "--output_dir", str(folder / "test"), *network]
    test += ["--batch_size", str(slices)]

    (folder / "pictures").mkdir()
    Image.linear_gradient("L").save(folder / "pictures" / "picture.png")
    predict = ["--input", str(folder / "pictures"), "--output", str(folder / "out"), *network]
    return {"train": train, "test": test, "predict": [*predict, "--intensity", "picture"]}
