"""How well processes share many scans, and what a `kill -9` costs.

`python -m benchmarks.many_cases` writes scans of very different length and a tiny adapter into a
temporary folder, segments them three times, and prints what share of the time the processes waited
for each other, and what a killed process lost. Results after a kill must be those of the run
without, to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import predict
from common.arguments import ArgumentParser
from common.errors import exit_on_bad_input
from common.files import sha256_of
from datasets.intensity import WINDOW, Intensity
from datasets.registry import DatasetSpec
from datasets.scans.volumes import Geometry, write_volume
from distributed.launch import launch
from distributed.ranks import is_rank
from distributed.signals import ended_by_signals
from prediction import segmenting
from prediction.claims import Claims
from sam_lora_image_encoder import LoRA_Sam
from segment_anything import sam_model_registry
from utils import seed_everything

NAME = "benchmarks.many_cases"
NOTES = "SAMED_MANY_CASES"  # environment variable: folder for the notes of the ranks
SIDE, LONGEST = 64, 120  # pixels of a slice; slices of the longest scan


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or be one of the ranks of a measurement."""
    words = list(sys.argv[1:] if argv is None else argv)
    if NOTES in os.environ:
        run_rank(words)
        return
    parser = ArgumentParser(prog=f"python -m {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=200, help="default: 200")
    parser.add_argument("--processes", type=int, default=4, help="default: 4")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Segment the scans undisturbed, then with a kill of the last rank, then of the first."""
    slices = write_input(folder, args.scans)
    print(
        f"{args.scans} scans of {min(slices)} to {max(slices)} slices, {args.processes} processes"
    )
    whole = Call(folder, "whole", args.processes)
    whole.end()
    idle = whole.waited() / (args.processes * whole.seconds())
    print(
        f"undisturbed: exit code {whole.code}, {whole.seconds():.1f} s, scans by rank "
        f"{[len(names) for names in whole.begun()]}"
    )
    print(f"waited for other processes: {100 * idle:.1f} % of the time of all")
    shares = [sum(whole.durations()[rank :: args.processes]) for rank in range(args.processes)]
    static = 1 - sum(shares) / (args.processes * max(shares))
    print(f"with every {args.processes}th scan fixed to a process it would be {100 * static:.1f} %")
    for rank in (args.processes - 1, 0):
        call = Call(folder, f"kill{rank}", args.processes)
        call.kill(rank, after=args.scans // 4)
        first, twice = call.code, call.twice()
        again = Call(folder, f"kill{rank}", args.processes)
        again.end()
        same = again.labels() == whole.labels()
        print(
            f"kill -9 of rank {rank}: exit code {first}, scans begun twice {twice}; the same "
            f"command again: exit code {again.code}, {sum(map(len, again.begun()))} scans, results "
            f"{'the same' if same else 'DIFFER'}"
        )


def write_input(folder: Path, count: int) -> list[int]:
    """Write an adapter that holds all weights, and scans; return their numbers of slices."""
    seed_everything(0, deterministic=True)
    network, _ = sam_model_registry["vit_tiny"](image_size=SIDE, num_classes=3, checkpoint=None)
    model = LoRA_Sam(network, 2)
    model.train_all_weights()
    names = ("one", "two", "three")
    spec = DatasetSpec(
        name="noise",
        class_names=names,
        raw_labels={1: 1, 2: 2, 3: 3},
        ignored_labels=(),
        predicted_values=(1, 2, 3),
        intensity=Intensity(WINDOW, -200.0, 300.0),
        orientation=None,
    )
    settings = {"vit_name": "vit_tiny", "img_size": SIDE, "num_classes": 3}
    settings |= {"class_names": list(names), "spec": spec.to_json()}
    model.save_lora_parameters(folder / "adapter.pth", settings)
    rng = np.random.default_rng(0)
    slices = [int(n) for n in np.exp(rng.uniform(0, np.log(LONGEST), count)).round()]
    for index, depth in enumerate(slices):
        array = rng.integers(-200, 300, (depth, SIDE, SIDE)).astype(np.int16)
        write_volume(folder / "in" / f"{index:03}.mha", array, Geometry.unknown())
    return slices


class Call:
    """A call of predict.py whose ranks note what they do."""

    def __init__(self, folder: Path, name: str, processes: int) -> None:
        self.output, self.processes = folder / name, processes
        self.notes = Path(tempfile.mkdtemp(dir=folder))
        words = ["--input", folder / "in", "--output", self.output, "--device", "cpu"]
        words += ["--lora_ckpt", folder / "adapter.pth", "--processes", processes]
        program = f"import sys; from {NAME} import start; start(sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)],
            env=os.environ | {NOTES: str(self.notes), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> None:
        """Wait for the end."""
        self.code = self.process.wait()

    def kill(self, rank: int, *, after: int) -> None:
        """Kill a rank when so many scans are done; wait for the end of the others."""
        while len(self.labels()) < after and self.process.poll() is None:
            time.sleep(0.02)
        os.kill(self.events(rank)[0]["pid"], signal.SIGKILL)
        self.end()

    def events(self, rank: int) -> list[dict[str, Any]]:
        """Return the notes of a rank."""
        return [json.loads(line) for line in (self.notes / f"{rank}").read_text().splitlines()]

    def begun(self) -> list[list[str]]:
        """Return the names of the scans that each rank began."""
        ranks = range(self.processes)
        return [[e["begun"] for e in self.events(rank) if "begun" in e] for rank in ranks]

    def twice(self) -> list[str]:
        """Return the scans that were begun more than once."""
        names = [name for names in self.begun() for name in names]
        return sorted({name for name in names if names.count(name) > 1})

    def durations(self) -> list[float]:
        """Return the seconds that each scan took the process that segmented it, by name."""
        found = {}
        for rank in range(self.processes):
            times = [(e["at"], e.get("begun")) for e in self.events(rank)]
            for (start, name), (end, _) in pairwise(times):
                found |= {name: end - start} if name else {}
        return [found[name] for name in sorted(found)]

    def seconds(self) -> float:
        """Return the seconds from the first scan to the end of the last."""
        events = [event["at"] for rank in range(self.processes) for event in self.events(rank)]
        starts = [self.events(rank)[0]["at"] for rank in range(self.processes)]
        return max(events) - min(starts)

    def waited(self) -> float:
        """Return the seconds that all ranks waited: for claims, and at the start and end."""
        lists = [self.events(rank) for rank in range(self.processes)]
        first, last = min(e[0]["at"] for e in lists), max(e[-1]["at"] for e in lists)
        edges = sum(e[0]["at"] - first + last - e[-1]["at"] for e in lists)
        return edges + sum(event.get("waited", 0) for events in lists for event in events)

    def labels(self) -> dict[str, str]:
        """Return the hash of each label file."""
        return {path.name: sha256_of(path) for path in self.output.glob("[!.]*.mha")}


def start(words: list[str]) -> None:
    """Start the ranks, as predict.py does."""
    raise SystemExit(launch("-m", [NAME, *words], int(words[-1]), go_on=True))


def run_rank(words: list[str]) -> None:
    """Run predict.py as one rank that notes what it does."""
    assert is_rank()
    file = (Path(os.environ[NOTES]) / os.environ["RANK"]).open("w", buffering=1)

    def note(**facts: Any) -> None:
        file.write(json.dumps({"at": time.time(), "pid": os.getpid()} | facts) + "\n")

    class Noted(Claims):
        def __enter__(self) -> Claims:
            note()
            return super().__enter__()

        def __exit__(self, *error: object) -> None:
            note(waited=self.waited_s)
            super().__exit__(*error)

    segment = segmenting.segment

    def noted(args: Any, spec: Any, model: Any, case: Any, progress: Any) -> Any:
        note(begun=case.scan.name)
        return segment(args, spec, model, case, progress)

    predict.Claims, segmenting.segment = Noted, noted
    predict.main(words)


if __name__ == "__main__":
    with exit_on_bad_input(), ended_by_signals():
        main()
