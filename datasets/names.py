"""Names of cases and slices: how they are made and read, and which names belong together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import first_few

# SCAN_slice012, also SCAN_slice_12, SCAN-Slice12 and SCAN_slice012_TAIL: surely a slice.
SLICE = re.compile(r"(.+?)[ _.-]*(?:slice|slc)[ _.-]?(\d+(?:[ _.-].*)?)", re.IGNORECASE)
# slice012_SCAN: also surely a slice.
SLICE_FIRST = re.compile(r"(?:slice|slc)[ _.-]?(\d+)[ _.-]+(.+)", re.IGNORECASE)
# SCAN_12, SCAN-s12, SCAN_z012, SCAN.12, SCAN_img_12, SCAN (12): a slice, or a counted picture.
NUMBERED = re.compile(
    r"(?P<scan>.+?)(?:[ _.-]+(?:(?P<mark>sl|s|z|f|fr|frame)|im|img|image)?[ _.-]?(?P<number>\d+)"
    r"|[ _.-]*\((?P<counted>\d+)\))",
    re.IGNORECASE,
)
NEIGHBOURS = {"slice", "slices", "slc", "frame", "frames", "z"}  # frame_001 and frame_002 are alike
WRITTEN_SLICE = re.compile(r"_slice_?\d+$")  # as `slice_name` writes it, and SSL4MIS
# The beginning of a name up to its first part with a digit: `patient001` of `patient001_frame01`.
PATIENT = re.compile(r"((?:[^\d _.-]*[ _.-])*[^ _.-]*\d[^ _.-]*)(?=[ _.-])")
FEW = 4  # Fewer groups than this hardly are all the scans or patients of a data set.
MANY_WORDS = 8  # Fewer beginnings without a number are rather classes: benign_12, malignant_3.


def case_names(*numbers: int) -> tuple[str, ...]:
    """Return `case0001` …, the names of BTCV's cases in the lists and test volumes."""
    return tuple(f"case{number:04d}" for number in numbers)


def slice_name(case: str, index: int) -> str:
    """Return `case0001_slice000`, the name of a training slice in the lists and on disk."""
    return f"{case}_slice{index:03d}"


def case_of(name: str) -> str:
    """Return the case of a slice: `case0005` for `case0005_slice012`."""
    return WRITTEN_SLICE.sub("", name)


@dataclass(frozen=True)
class Grouping:
    """Which names belong together. A split keeps a group on one side."""

    groups: dict[str, str]  # name -> its patient, else its scan, else the name itself
    slices: dict[str, tuple[str, str]]  # names of slices -> scan, and number with any tail
    doubts: tuple[str, ...] = ()  # sentences about groups that may be wrong


def group_names(names: Sequence[str], *, slices: bool) -> Grouping:
    """Group names of slices by scan, and scans by patient, as far as the names tell.

    All programs use this rule where the user and the records of preprocessing do not tell groups.
    Where names are not clear, a group rather gets too many names than that slices of one scan land
    on both sides of a split.

    Args:
        slices: whether the names are of slices or pictures; else they are of whole scans.
    """
    found, doubts = _slices_in(names) if slices else ({}, [])
    scans = {name: found[name][0] if name in found else name for name in names}
    stems = {scan: match[1] for scan in scans.values() if (match := PATIENT.match(scan))}
    patients = set(stems.values())
    if 1 < len(patients) < len(stems):
        if len(patients) >= FEW:
            scans = {name: stems.get(scan, scan) for name, scan in scans.items()}
            if len(patients) < MANY_WORDS:
                doubts.append(
                    f"the names of {len(stems)} scans begin with {_counted(stems.values())}, which "
                    "count as patients and stay together; they may be sites or classes"
                )
        else:
            doubts.append(
                f"the names of {len(stems)} scans begin with only {_counted(stems.values())}; they "
                "count as separate scans, but may be scans of the same patients"
            )
    return Grouping(scans, found, tuple(doubts))


def _slices_in(names: Iterable[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return scan and number (with any tail) of each name that is a slice, and doubts."""
    sure = {name: (match[1], match[2]) for name in names if (match := SLICE.fullmatch(name))}
    sure |= {n: (m[2], m[1]) for n in names if n not in sure and (m := SLICE_FIRST.fullmatch(n))}
    known = {scan for scan, _ in sure.values()}
    maybe: dict[str, tuple[str, str]] = {}
    words: dict[str, str] = {}  # name -> a beginning that is a word, without a mark like -s
    for name in names:
        match = None if name in sure else NUMBERED.fullmatch(name)
        if match:
            scan = match["scan"]
            maybe[name] = (scan, match["number"] or match["counted"])
            if not (match["mark"] or scan in known or len(scan) == 1 or re.search(r"\d", scan)):
                words[name] = scan
    doubts = []
    if words and len(set(words.values())) < MANY_WORDS:
        maybe = {name: part for name, part in maybe.items() if name not in words}
        if len(set(words.values())) > 1:
            doubts.append(
                f"{len(words)} names like {min(words)} count as separate cases, because their "
                f"beginnings {_counted(words.values())} have no number and look like classes, not "
                "like scans"
            )
        elif len(words) > 1 and words[min(words)].lower() in NEIGHBOURS:
            doubts.append(
                f"{len(words)} names like {min(words)} name no scan, so they count as separate "
                "cases; neighbouring slices of one scan may train and be tested"
            )
    elif words:
        doubts.append(
            f"the beginnings {_counted(words.values())} have no number; they count as scans, but "
            "may be classes"
        )
    begun = known | {scan for scan, _ in maybe.values()}
    # A picture with the name of a scan is one of its slices.
    maybe |= {n: (n, "") for n in names if n in begun and n not in sure and n not in maybe}
    scans = [scan for scan, _ in maybe.values()]
    if not are_slices([*scans, *(scan for scan, _ in sure.values())]) and not known & set(scans):
        if len(set(scans)) == 1 < len(scans) and scans[0] not in words.values():
            doubts.append(
                f"{len(maybe)} names like {min(maybe)} all begin with {scans[0]} and count as "
                "separate cases; if they are slices or frames of one scan, neighbours train and "
                "are tested"
            )
        maybe = {}
    elif maybe and len(begun) < FEW:
        doubts.append(
            f"only {len(begun)} scan(s) were found in the names, {_counted(scans)}; if these are "
            "classes and not scans, the split is wrong"
        )
    return sure | maybe, doubts


def _counted(groups: Iterable[str]) -> str:
    """Return the groups with the number of their members, the largest first."""
    return first_few([f"{group} ({count})" for group, count in Counter(groups).most_common()])


def are_slices(scans: Sequence[str]) -> bool:
    """Return whether files named SCAN_NUMBER are slices of their scans.

    Files count as slices if there are several scans and some scan has several files. Otherwise the
    number may simply count pictures.

    Args:
        scans: the part SCAN of each file's name.
    """
    return 1 < len(set(scans)) < len(scans)
