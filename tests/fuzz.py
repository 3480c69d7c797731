"""Fuzzing of every reader: changed files are read or refused in one sentence, and nothing else.

`make fuzz` runs it for half an hour; `test_fuzz.py` runs a short form. A try is known by the kind
of file, the seed and its number, and can be repeated:

    python tests/fuzz.py --only mha --seed 7 --first 1234 --tries 1
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from fuzz_readers import READERS, SECRET, Reader  # noqa: E402
from processes import CONTEXT  # noqa: E402

from common.errors import InputError  # noqa: E402

ADDRESS_SPACE = 6 << 30  # bytes above what the process has at its start
PEAK = 512 << 20  # bytes of memory that reading one of these small files may take for a moment
GROWTH = 96 << 20  # bytes that a process may have more after all tries than after the first ones
SLOW = 20.0  # seconds for one file
FIRST_TRIES = 20  # after these, what is imported late has been imported
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Outcome:
    """What happened to one kind of file."""

    kind: str
    seed: int
    tries: int = 0
    refused: int = 0
    read: int = 0
    seconds: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)


def fuzz(kind: str, seed: int, first: int, tries: int, *, until: float, keep: Path) -> Outcome:
    """Change and read the files of one kind.

    Args:
        until: the moment (`time.monotonic`) after which no further process is started.
        keep: folder for the files that failed.
    """
    outcome, began = Outcome(kind, seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        base = Path(name)
        (base / "secret.raw").write_bytes(SECRET.tobytes())
        (base / "sound").mkdir()
        target = READERS[kind].write(base / "sound").relative_to(base / "sound")
        number, last = first, first + tries
        while number < last and time.monotonic() < until and len(outcome.failures) < 20:
            number = _watch(outcome, base, target, range(number, last), until, keep)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def _watch(
    outcome: Outcome, base: Path, target: Path, numbers: range, until: float, keep: Path
) -> int:
    """Let a process try the numbers until one fails; return the number to go on with."""
    receiving, sending = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(
        target=_try_all, args=(outcome, base, target, numbers, until, sending)
    )
    process.start()
    sending.close()
    current, failure = numbers.start, None
    while failure is None:
        try:
            if not receiving.poll(SLOW):
                failure = f"it takes more than {SLOW:.0f} s"
                break
            told = receiving.recv()
        except EOFError:
            process.join()
            failure = f"the process ended with {process.exitcode}"
            break
        if told == "end":
            break
        current, word = told
        if word == "begins":
            outcome.tries += 1
        elif word in ("read", "refused"):
            setattr(outcome, word, getattr(outcome, word) + 1)
        else:
            failure = word
    if process.is_alive():
        process.kill()
    process.join()
    if failure is None:
        return numbers.stop
    keep.mkdir(parents=True, exist_ok=True)
    file = keep / f"{outcome.kind.replace(', ', '_').replace(' ', '_')}-{outcome.seed}-{current}"
    changed = _changed(READERS[outcome.kind], base / "sound" / target, outcome, current)
    file.with_name(file.name + target.suffix).write_bytes(changed)
    outcome.failures.append({"number": current, "what": failure})
    return current + 1


def _changed(reader: Reader, sound: Path, outcome: Outcome, number: int) -> bytes:
    rng = random.Random(f"{outcome.seed}/{outcome.kind}/{number}")
    return rng.choice(reader.changes)(sound.read_bytes(), rng)


def _try_all(
    outcome: Outcome, base: Path, target: Path, numbers: range, until: float, told: Connection
) -> None:
    """Try one file after the other, and tell the parent of each how it went."""
    torch.set_num_threads(1)
    reader = READERS[outcome.kind]
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, size + ADDRESS_SPACE))
    tempfile.tempdir = os.environ["TMPDIR"] = str(base / "temporary")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    watch = Watch(base)
    sys.addaudithook(watch)
    place = base / "try"
    try:
        expected = reader.read(_copy(base / "sound", place) / target)
    except BaseException as error:
        told.send((numbers.start, f"the sound file is not read: {error!r}"))
        os._exit(0)
    os.chdir(base)
    around = sorted(base.iterdir())
    settled = 0
    for count, number in enumerate(numbers):
        if time.monotonic() > until:
            break
        told.send((number, "begins"))
        path = _copy(base / "sound", place) / target
        path.unlink()
        path.write_bytes(_changed(reader, base / "sound" / target, outcome, number))
        with watch:
            word = _outcome_of(reader, path, expected)
        os.chdir(base)
        if word in ("read", "refused") and sorted(base.iterdir()) != around:
            word = f"files outside: {sorted(base.iterdir())}"
        if left := list((base / "temporary").iterdir()):
            word = f"temporary files stay: {left}"
        if watch.seen:
            word = f"what no reader may do: {watch.seen[:3]}"
        if watch.peak > PEAK:
            word = f"it took {watch.peak >> 20} MiB"
        told.send((number, word))
        if count == FIRST_TRIES:
            settled = _held()
    if settled and (grown := _held() - settled) > GROWTH:
        told.send((numbers.stop - 1, f"{grown >> 20} MiB stay"))
    told.send("end")
    os._exit(0)


class Watch:
    """While a file is read: programs that are started, connections, files written elsewhere."""

    def __init__(self, base: Path) -> None:
        self.allowed = (str(base), "/dev/", "/proc/")
        self.on = False
        self.seen: list[str] = []
        self.peak = 0

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
        self.before = _memory("VmRSS")
        self.seen = []
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False
        self.peak = _memory("VmHWM") - self.before

    def __call__(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
        ):
            # `git describe`, in the program's own folder; the child that reads scans.
            if "git" not in details[:1] and sys.executable not in details[:1]:
                self.seen.append(f"{event} {details[:2]}")
        elif event == "open" and isinstance(details[2], int) and details[2] & WRITING:
            path = str(details[0])
            if path.startswith("/") and not f"{path}/".startswith(self.allowed):
                self.seen.append(f"writes {path}")


def _outcome_of(reader: Reader, path: Path, expected: Any) -> str:
    """Return "read", "refused", or what went wrong."""
    try:
        found = reader.read(path)
    except InputError:
        return "refused"
    except SystemExit as stop:
        return "refused" if stop.code == 2 else f"exit code {stop.code}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            f for f in traceback.extract_tb(error.__traceback__) if str(REPOSITORY) in f.filename
        ]
        at = ours[-1] if ours else where
        return f"{type(error).__name__}: {str(error)[:200]} ({at.filename}:{at.lineno})"
    if reader.checked and not _equal(found, expected):
        return "damage was not noticed: other voxels than in the sound file"
    return "read"


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    return bool(first == second)


def _held() -> int:
    """Return the bytes that this process holds, without what is only kept to be used again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _memory("VmRSS")


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _copy(sound: Path, place: Path) -> Path:
    """Copy the sound files; large ones, which programs replace and never change, are linked."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(
        sound,
        place,
        copy_function=lambda source, target: (
            os.link if Path(source).suffix in (".pth", ".npz", ".h5") else shutil.copy2
        )(source, target),
    )
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="for all kinds together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--only", action="append", choices=sorted(READERS), help="kinds of files")
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    parser.add_argument("--tries", type=int, default=10**9, help="tries for each kind")
    parser.add_argument("--output", type=Path, default=Path("fuzz"), help="failed files, fuzz.json")
    args = parser.parse_args()
    kinds = args.only or list(READERS)
    began, outcomes = time.monotonic(), []
    for index, kind in enumerate(kinds):
        left = 60 * args.minutes - (time.monotonic() - began)
        until = time.monotonic() + left / (len(kinds) - index)
        outcome = fuzz(kind, args.seed, args.first, args.tries, until=until, keep=args.output)
        outcomes.append(asdict(outcome))
        print(
            f"{kind:28} {outcome.tries:7} tries, {outcome.refused:7} refused, "
            f"{outcome.read:7} read, {len(outcome.failures)} failed ({outcome.seconds} s)",
            flush=True,
        )
        for failure in outcome.failures:
            print(f"    --only {kind!r} --seed {args.seed} --first {failure['number']} --tries 1: "
                  f"{failure['what']}", flush=True)  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "fuzz.json").write_text(json.dumps(outcomes, indent=2) + "\n")
    sys.exit(1 if any(outcome["failures"] for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
