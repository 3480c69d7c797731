"""Which cases train and which are tested."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import InputError, MissingFileError, first_few, warn
from datasets.names import case_names, case_of
from preprocess.raw_cases import RawCase
from preprocess.raw_data import RawData

TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class Split:
    """How the user wants to divide the cases; None: the user gave no value."""

    train: Sequence[str] | None
    test: Sequence[str] | None
    test_share: float
    folds: int | None
    fold: int
    seed: int


def choose_roles(data: RawData, split: Split) -> dict[str, tuple[str, ...]]:
    """Return the roles of each case: TRAIN, TEST, both or none.

    The test cases come from the first source that exists: the cases that the user names, the fold,
    the published test cases, the test folder of the data set, a random share. All other cases
    train. A case has both roles only if the user names it for both.

    Raises:
        MissingFileError: the user names a case that does not exist.
        InputError: there are too few cases to split.
    """
    test = None if split.test is None else _named_cases(data, split.test)
    train = None if split.train is None else _named_cases(data, split.train)
    if test is None and split.folds is None:
        published = [name for name in data.spec.test_cases if name in data.cases]
        given = published if data.spec.test_cases else data.test
        test = None if given is None else [name for name in given if name not in (train or [])]
    if test is None:
        trained = {data.cases[name].group for name in train or []}
        candidates = {n: c.group for n, c in data.cases.items() if c.group not in trained}
        test = _drawn_cases(candidates, split)
    if train is None:
        train = [name for name in data.cases if name not in test]
    chosen = {TRAIN: set(train), TEST: set(test)}
    return {name: tuple(role for role in chosen if name in chosen[role]) for name in data.cases}


def _named_cases(data: RawData, wanted: Sequence[str]) -> list[str]:
    """Return the cases that the user names by case, by scan of pictures, or by BTCV's number."""
    found: list[str] = []
    absent = []
    for name in wanted:
        names = {name}
        if re.fullmatch(r"\d{1,9}", name):
            names.update(case_names(int(name)))
        matching = [c.name for c in data.cases.values() if names & _names_of(c)]
        found += matching
        if not matching:
            absent.append(name)
    if absent:
        groups = list(dict.fromkeys(case.group for case in data.cases.values()))
        raise MissingFileError(
            f"--train_cases or --test_cases names {first_few(absent)}, which the data set does not "
            f"have; choose from {first_few(groups, 40)}"
        )
    return found


def _names_of(case: RawCase) -> set[str]:
    return {case.name, case.group, case.image.name, case_of(case.name)}


def warn_of_split_groups(data: RawData, roles: dict[str, tuple[str, ...]], split: Split) -> None:
    """Warn about a group that trains and is tested, and about a drawn share far from the wanted."""
    sides: dict[str, set[str]] = defaultdict(set)
    for name, case in data.cases.items():
        sides[case.group].update(roles[name] if len(roles[name]) == 1 else ())
    both = [group for group, found in sides.items() if len(found) == 2]
    if both:
        warn(
            f"{len(both)} scans or patients have some of their cases in training and some in the "
            f"test: {first_few(both)}; scores on them are not held-out scores, so put all cases of "
            "a group on one side"
        )
    given = data.spec.test_cases or data.test is not None
    if split.test is None and split.folds is None and not given and len(sides) < len(data.cases):
        share = sum(TEST in role for role in roles.values()) / len(roles)
        if not 0.5 < share / split.test_share < 2:
            warn(
                f"{len(sides)} groups cannot be split into the share {split.test_share:g} for the "
                f"test, {share:.0%} of the cases are tested; name groups in --test_cases, or "
                "correct the groups by --group"
            )


def _drawn_cases(candidates: dict[str, str], split: Split) -> list[str]:
    """Draw a random share or fold of the groups; the same names and seed give the same result.

    Args:
        candidates: the group of each case.
    """
    groups = sorted(set(candidates.values()))
    if len(groups) < 2 or (split.folds or 0) > len(groups):
        parts = "training and test cases" if split.folds is None else f"{split.folds} folds"
        what = "case" if len(groups) == len(candidates) else "group"
        slices = f" ({groups[0]}, {len(candidates)} cases)" if what == "group" else ""
        raise InputError(
            f"cannot split {len(groups)} {what if len(groups) == 1 else f'{what}s'}{slices} into "
            f"{parts}; choose the cases with --train_cases and --test_cases (for an overfit check, "
            f"name a case in both){', or pass another --group' if what == 'group' else ''}"
        )
    order = np.random.default_rng(split.seed).permutation(groups).tolist()
    if split.folds is not None:
        chosen = order[split.fold :: split.folds]
    else:
        chosen = order[: min(len(groups) - 1, max(1, round(split.test_share * len(groups))))]
    return [name for name, group in candidates.items() if group in chosen]
