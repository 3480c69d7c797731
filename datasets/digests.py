"""Digests of slices, which show that a slice is in training and in the test under other names."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from common.errors import first_few


def slice_digests(image: np.ndarray) -> list[str]:
    """Return a digest of the pixels of each slice; equal slices have equal digests.

    Args:
        image: (D, H, W) or (D, 3, H, W), of any type of numbers; the type does not matter.

    Returns:
        D digests. That of a constant slice is empty, because all empty slices are equal.
    """
    return [_digest(np.ascontiguousarray(plane, dtype=np.float32)) for plane in image]


def _digest(plane: np.ndarray) -> str:
    if plane.min() == plane.max():
        return ""
    text = repr(plane.shape).encode()
    return hashlib.blake2b((plane + 0.0).tobytes() + text, digest_size=16).hexdigest()  # -0 is 0


def equal_slices(
    train: Iterable[tuple[str, Sequence[str]]], test: Iterable[tuple[str, Sequence[str]]]
) -> list[str]:
    """Return a text for each two cases, of training and of test, that have equal slices.

    Args:
        train, test: name and digests of each case. A case of the same name in both is left out.
    """
    trained: dict[str, str] = {}  # digest -> the first training case that has it
    for name, digests in train:
        for digest in filter(None, digests):
            trained.setdefault(digest, name)
    shared: Counter[tuple[str, str]] = Counter()
    for name, digests in test:
        shared.update((trained[d], name) for d in digests if d in trained)
    return [
        f"{there} (test) has {count} slice(s) of {here} (training)"
        for (here, there), count in shared.items()
        if here != there
    ]


def leak_warnings(
    train: Iterable[tuple[str, Sequence[str]]], test: Iterable[tuple[str, Sequence[str]]]
) -> list[str]:
    """Return a warning about slices that are trained on and tested under different names."""
    found = equal_slices(train, test)
    if not found:
        return []
    return [
        f"the test holds slices that are trained on, under other names: {first_few(found)}; scores "
        "on them are not held-out scores, so put both cases on one side, or remove one"
    ]
