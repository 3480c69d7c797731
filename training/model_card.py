"""The model card of a run, MODEL_CARD.md: what was trained on what, how well, and its limits.

The form is that of Hugging Face: YAML front matter, then Markdown (Mitchell et al., Model Cards for
Model Reporting, arXiv 1810.03993). The card is made from what the run folder holds, so any program
can write it again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template

from common.console import printable
from common.errors import InputError
from common.files import read_json, sha256_of
from common.writing import write_text
from common.written import Written
from config.parser import by_name
from config.run_folder import CONFIG_FILE, newest_adapter, read_run
from config.shared_flags import SCRATCH
from config.train_flags import TRAIN
from datasets.registry import DATASETS, spec_from_json
from evaluation.tables import class_means
from evaluation.test_runs import TestRun
from evaluation.test_runs import read_json as read_results
from training.curves import read_validations

CARD = "MODEL_CARD.md"
TEMPLATE = Path(__file__).with_suffix(".md")
TESTED = "test"  # folder in the run folder into which test.py writes unless told otherwise
# Where the published recipe, recipes/samed.json, differs from the defaults of the flags.
PUBLISHED = {"optimizer": "adamw", "warmup": True}
# Flags whose values the card tells in words, or that only count together with others.
TOLD = {"dataset", "num_classes", "vit_name", "module"}
# Flags of the recipe that a resumed run may change, because only their product counts.
OF_UPDATE = ("batch_size", "n_gpu", "global_batch")
# Characters that mean something to Markdown within a line, or make an address a link.
MEANING = re.compile(r"([\\`*_{}\[\]()#+!|~$:]|(?<!\d)\.|\.(?!\d))")
ENTITIES = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"})


def write_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the card of a run, unless somebody edited it.

    Args:
        folder: the run folder.
        config: what config.json holds, or the flags of a run that has none.

    Raises:
        InputError: no room or no right to write there.
    """
    written = Written(folder)
    if written.foreign([CARD]):
        logging.info("%s was edited, so it stays as it is", folder / CARD)
        return
    with written.noting():
        write_text(folder / CARD, card(folder, config))


def add_test_scores(results: Path) -> None:
    """Write the card again if test.py has just tested an adapter of a run into its own folder.

    Args:
        results: folder of `results.json`.
    """
    run = results.resolve().parent
    if (
        results.resolve().name == TESTED
        and (run / CARD).is_file()
        and (run / CONFIG_FILE).is_file()
    ):
        write_card(run, read_run(run))


def card(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the card of a run as Markdown."""
    return template().render(content(folder, config))


@cache
def template() -> Template:
    """Return the template of the card, which takes longer to compile than to fill."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["score"] = score
    return environment.get_template(TEMPLATE.name)


def content(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows of a run. No name of a case or a folder is among it."""
    spec = spec_from_json(config["spec"], folder / CONFIG_FILE)
    facts = _read(folder / "check.json", dict)
    starts = _read(folder / "environment.json", list)
    names = list(spec.class_names)
    validation, test = _validation(folder, names), _test(folder, names)
    return {
        "data": spec,
        "known": spec.name in DATASETS,  # Of others, nobody could find what the name means.
        "kind": "pictures" if spec.is_pictures else "slices of scans",
        "neighbours": config.get("input_slices", 1) != 1,
        "slices": facts.get("training_slices"),
        "cases": len(facts.get("training_cases", ())),
        "held_out": validation["cases"] if validation else 0,
        "fingerprint": (config.get("data") or {}).get("slices"),
        "network": config,
        "base": _base(config),
        "adapter": _adapter(folder),
        "where": starts[-1] if starts else {},
        "differences": differences(config),
        "validation": validation,
        "test": test,
        "rows": [
            {
                "name": name,
                "validation": validation["dsc"][index] if validation else None,
                "dsc": test["means"][index]["dsc"] if test else None,
                "distance": test["means"][index][test["score"]] if test else None,
            }
            for index, name in enumerate(names)
        ],
    }


def differences(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the flags of the recipe that differ from the published one: flag, here, published."""
    found = []
    for name, flag in by_name(TRAIN).items():
        if flag.means or name in TOLD or not (flag.changes_numbers or name in OF_UPDATE):
            continue
        default = bool(flag.default) if flag.type is bool else flag.default
        published = PUBLISHED.get(name, default)
        here = config.get(name, default)
        if here != published:
            found.append((f"--{name}", _shown(here), _shown(published)))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "by default" if value is None else str(value)


def _base(config: Mapping[str, Any]) -> str:
    """Return the file and the fingerprint of the weights that a run started from."""
    if config.get("ckpt") == SCRATCH:
        return "none, every weight was trained"
    weights = config.get("weights") or "fingerprint unknown"
    return f"{Path(config.get('ckpt') or 'unknown').name}, {weights}"


def _adapter(folder: Path) -> dict[str, str] | None:
    """Return name and SHA-256 of the adapter of the last epoch; None: there is none yet."""
    try:
        path = newest_adapter(folder)
    except InputError:
        return None
    return {"name": path.name, "sha256": sha256_of(path)}


def _validation(folder: Path, names: list[str]) -> dict[str, Any] | None:
    """Return the best validation; None: there was none."""
    records = read_validations(folder, names)
    if not records:
        return None
    best = max(records, key=lambda record: record["score"])
    return {
        "count": len(records),
        "epoch": best["epoch"] + 1,
        "cases": len(best["cases"]),
        "dsc": best["dsc"],
    }


def _test(folder: Path, names: list[str]) -> dict[str, Any] | None:
    """Return the means of the test in the run folder; None: no adapter of the run was tested."""
    try:
        found = read_results(folder / TESTED / "results.json")
    except InputError:
        return None
    adapter = Path(str(found.settings["flags"].get("lora_ckpt")))
    if found.class_names != names or adapter.resolve().parent != folder.resolve():
        return None
    if not adapter.is_file() or adapter.stat().st_mtime_ns > found.path.stat().st_mtime_ns:
        return None  # It is another adapter than the one that was tested.
    means = class_means(found.results)
    in_mm = any(row["hd95_mm"] is not None for row in means)
    return {
        "adapter": adapter.name,
        "cases": len(found.results),
        "data": _tested_data(found),
        "date": found.settings["environment"].get("tested"),
        "seen": None if found.trained_on is None else len(found.trained_on),
        "means": means,
        "score": "hd95_mm" if in_mm else "hd95_voxels",
        "distance": "HD95 mm" if in_mm else "HD95 voxels",
    }


def _tested_data(found: TestRun) -> str:
    spec = found.settings["flags"].get("spec")
    return str(spec["name"]) if isinstance(spec, dict) and "name" in spec else "unknown data"


def _read(path: Path, kind: type) -> Any:
    """Read a file of the run that may be absent or damaged; nothing depends on it but the card."""
    try:
        found = read_json(path, remedy="")
    except InputError:
        return kind()
    return found if isinstance(found, kind) else kind()


def plain(value: Any) -> str:
    """Return a value as a text of which Markdown shows every character."""
    return MEANING.sub(r"\\\1", printable(str(value))).translate(ENTITIES)


def score(value: float | None, factor: int) -> str:
    """Return a number with two digits; a dash: it is not defined."""
    return "–" if value is None else f"{factor * value:.2f}"
