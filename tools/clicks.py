"""How much clicks improve a network's labels, by a simulated user: `--help`.

The user looks at each slice of a test volume, and clicks once on every organ that is wrong there.
Then all organs are corrected, and the user looks again, until the clicks of all are used up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from common.errors import InputError, exit_on_bad_input, first_few, warn
from common.files import make_folder
from common.full_memory import telling_full_memory
from common.names import write_table
from common.precision import amp_dtype
from common.writing import write_json
from common.written import Written
from config.inference_flags import TEST
from config.parser import Flag, Parser
from config.settings import class_names, parse_args, recorded_values
from config.shared_flags import PROCESSES
from correction.clicks import next_click
from correction.predictor import NETWORK, REACH, WAYS, OrganPredictor
from correction.prompts import Click
from datasets.colours import label_colours
from datasets.dataset_synapse import Synapse_dataset
from datasets.neighbours import network_slices, refuse_colour
from datasets.prepared_files import SampleFacts
from datasets.trained_on import TrainedOn, check_test_data
from evaluation.charts import save
from evaluation.held_out import held_out_warning, trained_cases
from evaluation.metrics import class_dsc, confusion, mean
from evaluation.predict_volume import default_batch_size
from evaluation.slice_batches import slice_batches
from evaluation.tables import align
from lora.prompts import require_knows_prompts
from predict import merged_network
from utils import allow_tf32, choose_device, environment, seed_everything

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSV, JSON, PNG = FILES = ("clicks.csv", "clicks.json", "clicks.png")
INMOST, ANYWHERE = USERS = ("inmost", "anywhere")
MOST_CLICKS = 100
ClickScores = dict[str, dict[int, tuple[float | None, ...]]]  # case -> clicks -> DSC of the classes


def main(argv: Sequence[str] | None = None) -> None:
    """Check the input, simulate the clicks, and write the tables."""
    args = parse_args(build_parser(), argv)
    check_clicks(args.clicks)
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)
    model = merged_network(args, choose_device(args.device))
    if args.by == NETWORK:
        require_knows_prompts(model, args.lora_ckpt)
    dataset = Synapse_dataset(
        args.volume_path, args.list_dir, "test_vol", num_classes=args.num_classes
    )
    written = Written(args.output)
    if not args.overwrite:
        written.refuse_foreign(FILES, flag="--output")
    facts = dataset.check(workers=2)
    refuse_colour(facts, args.input_slices)
    require_labels(facts)
    trained = TrainedOn.from_json(args.trained_on)
    for text in check_test_data(facts, trained, class_names(args)):
        warn(text)
    make_folder(args.output, flag="--output")
    predictor = OrganPredictor(
        model,
        class_names(args),
        input_size=args.input_size,
        img_size=args.img_size,
        by=args.by,
    )
    with tqdm(total=dataset.count_slices(), desc="clicking", unit="slice", disable=None) as bar:
        scores = {
            name: click_through(args, predictor, dataset[index], bar.update)
            for index, name in enumerate(dataset.sample_list)
        }
    seen = trained_cases({name: name for name in scores}, trained and trained.cases)
    with written.noting():
        report(args, scores, seen)


def build_parser() -> Parser:
    """Return the parser of the program."""
    parser = Parser(
        prog="python -m tools.clicks",
        description="Score a network after simulated clicks on test volumes: how much better do "
        "its labels\nget if a user corrects them?\n\n"
        "  python -m tools.clicks --config output/RUN --volume_path data/liver --output clicks\n\n"
        "On every slice, the user clicks into the middle of the largest error of each organ that\n"
        "is wrong there: inside the organ where it is missed, outside where it is false. All\n"
        "organs are corrected and the user looks again, so 5 clicks are up to 5 for each organ\n"
        "and slice. 0 clicks are what test.py scores. The user knows the truth and clicks on\n"
        "every slice, so real users gain less.\n"
        f"Files: {CSV} (DSC of each case and organ), {JSON} (also means, settings and versions)\n"
        f"and {PNG} (the curve).",
    )
    flags = {flag.name: flag for group in TEST.values() for flag in group}
    parser.add_flags(
        {
            "data": (
                flags["volume_path"],
                Flag("output", "folder for tables and picture; it is made", required=True),
                replace(flags["overwrite"], help="replace files in --output that were changed"),
                *(flags[name] for name in ("config", "dataset", "list_dir", "num_classes")),
            ),
            "user": (
                Flag(
                    "clicks",
                    "numbers of clicks on an organ of a slice after which to score, ascending",
                    type=int,
                    default=[0, 1, 3, 5],
                    low=0,
                    high=MOST_CLICKS,
                    takes_list=True,
                ),
                Flag(
                    "user",
                    f"where clicks fall: {INMOST}: the middle of the largest error; {ANYWHERE}: a "
                    "random pixel of all errors, which tells how much the middle matters",
                    default=INMOST,
                    choices=USERS,
                ),
                Flag(
                    "by",
                    f"what decides which pixels follow a click: {REACH}: the logits around it, of "
                    f"any network; {NETWORK}: the network, which is asked again with the clicks "
                    "and has to know them (train.py --prompt_prob)",
                    default=REACH,
                    choices=WAYS,
                ),
            ),
            "network": TEST["network"],
            "speed": [flag for flag in TEST["speed"] if flag.name != PROCESSES.name],
            "repeatability": TEST["repeatability"],
        }
    )
    return parser


def check_clicks(clicks: Sequence[int]) -> None:
    """Raise an `InputError` for numbers of clicks that do not ascend."""
    if list(clicks) != sorted(set(clicks)):
        raise InputError(
            f"--clicks is {' '.join(map(str, clicks))}, expected ascending numbers without "
            f"repetition; pass --clicks {' '.join(map(str, sorted(set(clicks))))}"
        )


def require_labels(facts: Sequence[SampleFacts]) -> None:
    """Raise an `InputError` if no test volume shows an organ: the user would not know the truth."""
    if not any(sum(case.voxels[1:]) for case in facts):
        names = first_few([case.name for case in facts])
        raise InputError(
            f"the {len(facts)} test volumes hold no labelled voxel ({names}), so the simulated "
            "user cannot know where to click; pass volumes with labels"
        )


def click_through(
    args: argparse.Namespace,
    predictor: OrganPredictor,
    sample: dict[str, Any],
    progress: Callable[[int], object],
) -> dict[int, tuple[float | None, ...]]:
    """Click on every slice of a volume; return the DSC of the classes after each number of clicks.

    Args:
        sample: of the data set, with `image`, `label` and `case_name`.
    """
    device, truth = predictor.sam.device, sample["label"]
    volume = network_slices(sample["image"], args.input_slices, sample["case_name"])
    batch_size = args.batch_size or default_batch_size(device)
    rng = None if args.user == INMOST else np.random.default_rng(args.seed)
    counts: dict[int, Any] = dict.fromkeys(args.clicks, 0)
    autocast = torch.autocast(device.type, amp_dtype(device), enabled=args.use_amp)
    with telling_full_memory(batch_size, use_amp=args.use_amp), autocast:
        for start, count, slices in slice_batches(volume, batch_size, device):
            embeddings, wanted = predictor.embed(slices), truth[start : start + count]
            automatic, _ = predictor.decode(embeddings, None, wanted.shape[1:])
            labels = automatic = automatic[:count]
            prompts: list[list[Click]] = [[] for _ in wanted]
            for number in range(args.clicks[-1] + 1):
                if number:
                    for given, one, right in zip(prompts, labels, wanted, strict=True):
                        organs = range(1, args.num_classes + 1)
                        clicks = [next_click(one, right, organ, rng) for organ in organs]
                        given += [click for click in clicks if click is not None]
                    labels = predictor.correct_slices(embeddings, prompts, automatic)
                if number in counts:
                    counts[number] = counts[number] + confusion(labels, wanted, args.num_classes)
            progress(count)
    return {number: class_dsc(found) for number, found in counts.items()}


def means(scores: ClickScores, clicks: int) -> list[float | None]:
    """Return the mean over the cases for each class as test.py does, and last the mean of these."""
    columns = zip(*(case[clicks] for case in scores.values()), strict=True)
    of_classes = [mean(column) for column in columns]
    return [*of_classes, mean(of_classes)]


def report(args: argparse.Namespace, scores: ClickScores, seen: list[str] | None) -> None:
    """Write table, JSON and curve, and print the means."""
    names, folder = class_names(args), Path(args.output)
    rows = [
        (case, name, clicks, dsc)
        for case, found in scores.items()
        for clicks, of_classes in found.items()
        for name, dsc in zip(names, of_classes, strict=True)
    ]
    total = {clicks: means(scores, clicks) for clicks in args.clicks}
    write_table(folder / CSV, [("case", "organ", "clicks", "dsc"), *rows])
    content = {
        "clicks": args.clicks,
        "user": args.user,
        "by": args.by,
        "mean": {clicks: found[-1] for clicks, found in total.items()},
        "classes": {
            name: {clicks: found[index] for clicks, found in total.items()}
            for index, name in enumerate(names)
        },
        "cases": {
            case: {clicks: dict(zip(names, dsc, strict=True)) for clicks, dsc in found.items()}
            for case, found in scores.items()
        },
        "trained_on_cases": seen,
        "flags": recorded_values(args),
        "environment": environment(),
    }
    write_json(folder / JSON, content)
    save(curve(total, names), folder / PNG)
    heading = ["DSC %", *(f"{clicks} click{'s' * (clicks != 1)}" for clicks in args.clicks)]
    table = [
        [name, *("-" if found[i] is None else f"{100 * found[i]:.2f}" for found in total.values())]
        for i, name in enumerate([*names, "mean"])
    ]
    print(align([heading, *table]))
    if caveat := held_out_warning(seen, len(scores)):
        warn(caveat)
    print(f"written in {folder}: {', '.join(FILES)}")


def curve(total: dict[int, list[float | None]], names: Sequence[str]) -> Figure:
    """Draw the mean DSC of each organ, and of all organs in black, against the clicks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4))
    axes = figure.subplots()
    styles = [{"color": colour, "linewidth": 1.2} for colour in label_colours(names)[1:] / 255]
    styles.append({"color": "black", "linewidth": 2.6})
    for index, (name, style) in enumerate(zip([*names, "mean"], styles, strict=True)):
        heights = [np.nan if v[index] is None else 100 * v[index] for v in total.values()]
        (line,) = axes.plot([*total], heights, marker="o", **style)
        line.set_label(name.lstrip("_"))  # matplotlib leaves out labels that start with `_`
    axes.set_xticks([*total])
    axes.set(xlabel="clicks on an organ of a slice, at most", ylabel="DSC %", ylim=(None, 101))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.set_layout_engine("tight")
    return figure


if __name__ == "__main__":
    with exit_on_bad_input():
        main(sys.argv[1:])
