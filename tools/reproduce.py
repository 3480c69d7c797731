"""From raw scans or the published archives to the table of the paper: `--help`.

`python -m tools.reproduce` tests the published adapters; with `--train` it trains a table of
`ablations/` instead. It says first what is missing, and where that is to be downloaded.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ablation.formats import UNKNOWN
from ablation.results import summarise, write
from ablation.table import Row, Table
from common.arguments import ArgumentParser
from common.errors import InputError, exit_on_bad_input, first_few
from common.files import make_folder, require_folder, sha256_of
from datasets.registry import SYNAPSE, stored_spec
from segment_anything.build_sam import ENCODERS

REPOSITORY = Path(__file__).resolve().parent.parent
ORIGINAL = "https://github.com/hitachinsk/SAMed#quick-start"
DRIVE = "https://drive.google.com/file/d/"
TEST_SET = f"{DRIVE}1RczbNSB37OzPseKJZ1tDxa5OO1IIICzK"
TRAINING_SET = f"{DRIVE}1zuOQRyfo0QYgjcU_uZs0X3LdCnAC2m3G"  # slices of 224 x 224
PAPER = REPOSITORY / "ablations" / "paper_main.toml"
SEED = 1234  # of the published runs


@dataclass(frozen=True)
class Model:
    """A published adapter: its encoder, where to put it, and the original repository's link."""

    encoder: str
    adapter: str
    url: str


MODELS = {  # links: README.md and SAMed_h/README.md of the original repository
    "SAMed": Model(
        "vit_b", "checkpoints/epoch_159.pth", f"{DRIVE}1P0Bm-05l-rfeghbrT1B62v5eN-3A-uOr"
    ),
    "SAMed_s": Model(
        "vit_b", "checkpoints_s/epoch_159.pth", f"{DRIVE}1rQM2md-h66RlRF3wC0m9N8aheOCvKfYv"
    ),
    "SAMed_h": Model(
        "vit_h", "checkpoints_h/epoch_299.pth", f"{DRIVE}1Kx_vx9bcxJaiMYWAgljNtwtHcooUsq8m"
    ),
}


@dataclass(frozen=True)
class Download:
    """A file or folder that has to be there."""

    what: str
    path: Path
    url: str
    sha256: str | None = None
    fault: str | None = None  # None: it is as it should be
    found: str | None = None  # its SHA-256

    def __str__(self) -> str:
        lines = [f"{'ok' if self.fault is None else self.fault:<8} {self.path}: {self.what}"]
        if self.fault is not None:
            lines.append(f"         download it from {self.url}")
        if self.path.suffix:
            lines.append(f"         SHA-256 expected {self.sha256 or UNKNOWN}")
            lines += [f"         SHA-256 found    {self.found}"] if self.found else []
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """List what is needed, then prepare, test or train, and print the table."""
    args = build_parser().parse_args(argv)
    with exit_on_bad_input():
        if args.raw is not None:
            require_folder(args.raw, what="--raw", remedy="pass the folder of the BTCV scans")
        models = chosen_models(args)
        needed = list(downloads(args, models))
        print("\n".join([*map(str, needed), f"links of {ORIGINAL}"]), flush=True)
        faulty = [f"{item.path} ({item.fault})" for item in needed if item.fault is not None]
        if faulty:
            raise InputError(
                f"{len(faulty)} of {len(needed)} downloads cannot be used: {first_few(faulty, 9)}; "
                "they are listed above with their links, and nothing was started"
            )
        if args.check:
            return
        if args.raw is not None:
            words = ["--input", str(args.raw), "--output", str(args.data), "--size", "224"]
            run([sys.executable, "-m", "preprocess.prepare", *words])
        if args.train:
            train(args)
        else:
            test_adapters(args, models)


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m tools.reproduce`."""
    parser = ArgumentParser(
        prog="python -m tools.reproduce",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Reproduce the table of the paper, published numbers beside measured ones.\n\n"
        "What has to be downloaded, and from where:\n"
        "  python -m tools.reproduce --check\n"
        "Test the published adapters on the published test set, or on the raw BTCV scans:\n"
        "  python -m tools.reproduce\n"
        "  python -m tools.reproduce --raw RawData\n"
        "Train and test all of it, three seeds of each model (GPUs and days):\n"
        "  python -m tools.reproduce --raw RawData --train",
    )
    parser.add_argument(
        "--raw", type=whole_path, help="folder of raw scans, which are prepared first"
    )
    parser.add_argument(
        "--data",
        type=whole_path,
        default=REPOSITORY / "data" / "Synapse",
        help="folder of the training set, and of what is prepared (default: data/Synapse)",
    )
    parser.add_argument(
        "--testset",
        type=whole_path,
        default=REPOSITORY / "testset",
        help="folder of the published test set; without it, that of --data (default: testset)",
    )
    parser.add_argument(
        "--output",
        type=whole_path,
        default=REPOSITORY / "output" / "reproduced",
        help="folder for all results (default: output/reproduced)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}; with --train rows of the table (default: the adapters that "
        "are there; with --train all rows)",
    )
    parser.add_argument("--train", action="store_true", help="train a table instead")
    parser.add_argument(
        "--table",
        type=whole_path,
        default=PAPER,
        help="with --train (default: ablations/paper_main.toml)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--check", action="store_true", help="list what is there and what is missing, and stop"
    )
    return parser


def whole_path(text: str) -> Path:
    """Return a path that means the same wherever a program runs."""
    return Path(text).resolve()


def chosen_models(args: argparse.Namespace) -> list[str]:
    """Return the names of the models whose files are needed.

    Raises:
        InputError: `--only` names none, or `--table` stands without `--train`.
    """
    if args.table != PAPER and not args.train:
        raise InputError("--table has no effect without --train; add it")
    if args.train and args.table != PAPER:
        return []  # ablate.py says which base weights that table lacks
    unknown = [name for name in args.only or () if name not in MODELS]
    if unknown:
        raise InputError(f"--only has {unknown[0]!a:.60}, expected {', '.join(MODELS)}")
    if args.only or args.train:
        return [name for name in MODELS if name in (args.only or MODELS)]
    there = [name for name, model in MODELS.items() if (REPOSITORY / model.adapter).is_file()]
    return there or list(MODELS)


def downloads(args: argparse.Namespace, models: Sequence[str]) -> Iterator[Download]:
    """Yield what has to be downloaded for this command, each with its fault if it has one."""
    if args.raw is None:
        yield test_set(args)
        if args.train:
            slices = args.data / "train_npz"
            fault = None if any(slices.glob("*.npz")) else "missing"
            yield Download("training set, 224 x 224, unzipped", slices, TRAINING_SET, fault=fault)
    for name in dict.fromkeys(MODELS[name].encoder for name in models):
        if (weights := ENCODERS[name].weights) is not None:
            path = REPOSITORY / "checkpoints" / weights.file
            yield checked(Download(f"SAM, {name}", path, weights.url, weights.sha256))
    for name in () if args.train else models:
        model = MODELS[name]
        yield checked(Download(f"adapter of {name}", REPOSITORY / model.adapter, model.url))


def checked(item: Download) -> Download:
    """Return a file's entry with its SHA-256, and with a fault if it is missing or another one."""
    if not item.path.is_file():
        return replace(item, fault="missing")
    found = sha256_of(item.path)
    fault = None if item.sha256 in (None, found) else "damaged"
    return replace(item, fault=fault, found=found)


def test_set(args: argparse.Namespace) -> Download:
    """Return the entry of the test volumes; of the published set, all cases must be there."""
    folder = volume_folder(args) / "test_vol_h5"
    if stored_spec(folder.parent) is not None:  # Its list says what belongs to it.
        fault = None if any(folder.glob("*.h5")) else "missing"
    else:
        gone = [case for case in SYNAPSE.test_cases if not (folder / f"{case}.npy.h5").is_file()]
        whole = len(gone) == len(SYNAPSE.test_cases)
        fault = "missing" if whole else f"lacks {first_few(gone, 12)}" if gone else None
    return Download("test set, unzipped", folder, TEST_SET, fault=fault)


def volume_folder(args: argparse.Namespace) -> Path:
    """Return the folder that holds `test_vol_h5/`."""
    if args.raw is not None:
        return args.data
    folders = (args.testset, args.data)
    return next((one for one in folders if (one / "test_vol_h5").is_dir()), args.testset)


def run(command: Sequence[str]) -> None:
    """Run a program of this repository.

    Raises:
        SystemExit: it failed; its exit code.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def train(args: argparse.Namespace) -> None:
    """Train, test and compare the rows of the table."""
    words = ["--root_path", str(args.data)]
    words += ["--volume_path", str(volume_folder(args))]
    words += ["--output", str(args.output / args.table.stem), "--device", args.device]
    words += ["--only", *args.only] if args.only else []
    run([sys.executable, "ablate.py", str(args.table), *words])


def test_adapters(args: argparse.Namespace, models: Sequence[str]) -> None:
    """Test the published adapters, and print their table."""
    rows = tuple(Row(name, {"lora_ckpt": MODELS[name].adapter}, name) for name in models)
    table = Table(Path(__file__), "The published adapters", models[0], rows, (SEED,))
    output = make_folder(args.output / "adapters", flag="--output")
    for cell in table.cells:
        model = MODELS[cell.row.name]
        words = ["--lora_ckpt", str(REPOSITORY / model.adapter), "--vit_name", model.encoder]
        words += ["--volume_path", str(volume_folder(args)), "--device", args.device]
        words += ["--output_dir", str(output / cell.name / "test")]
        run([sys.executable, "test.py", *words])
    summary = summarise(table, output, {})
    files = write(summary, output)
    print(f"\n{summary.text()}\nwritten: {', '.join(map(str, files))}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
