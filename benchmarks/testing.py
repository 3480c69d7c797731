"""Time `test.py` on a volume against the original's loop."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import test
from evaluation.cpu_speed import pack_encoder

from . import plain, scenes
from .timing import Comparison, Row, check_agreement, compare, largest


def testing_rows(device: torch.device) -> list[Row]:
    """Time `test.py` on a volume, once with vit_b and once without a network."""
    scene = scenes.scene()
    with_network = testing_row(
        "test.py",
        "a volume of 20×512×512, vit_b, read to NIfTI",
        device,
        scene.part(60, 80),
        scenes.network(),
        target=1.8,
    )
    without = testing_row(
        "test.py, not the network",
        "a volume of 48×512×512, masks given, read to NIfTI",
        device,
        scene.part(40, 88),
        None,
        target=20,
    )
    return [with_network, without]


def testing_row(
    name: str,
    what: str,
    device: torch.device,
    scene: scenes.Scene,
    model: nn.Module | None,
    *,
    target: float,
    repeats: int = 3,
) -> Row:
    """Time one volume in `test.test_cases` and in the original's loop.

    Args:
        scene: `prediction` is what the network answers, see `scenes.Answers`.
        model: its forward pass is timed too; None: only the given answers.
    """
    folder = scenes.scratch_folder()
    volumes = {"case0001": (scene.image, scene.label)}
    args, dataset = scenes.test_data(folder, volumes, "--is_savenii")
    slow = None if model is None else plain.plain_copy(model).eval().to(device)
    if model is not None:
        model.eval().to(device).merge()
        pack_encoder(model)
    fast_net = scenes.Answers(scene.prediction, model).to(device)
    slow_net = scenes.Answers(scene.prediction, slow).to(device)

    def ours() -> tuple[torch.Tensor, np.ndarray]:
        fast_net.restart()
        results = list(test.test_cases(args, fast_net, dataset, folder / "out"))
        scores = results[0].scores
        return logits_of(fast_net), np.array([(s.samed_dsc, s.samed_hd95) for s in scores])

    def peer() -> tuple[torch.Tensor, np.ndarray]:
        slow_net.restart()
        found, scores = plain.plain_test(
            dataset.paths[0],
            slow_net,
            classes=scenes.NUM_CLASSES,
            input_size=args.input_size,
            image_size=args.img_size,
            folder=folder,
        )
        check_agreement(name, float((found != scene.prediction).sum()), 0)
        return logits_of(slow_net), np.array(scores)

    def difference(a: tuple, b: tuple) -> float:
        return max(largest(a[0], b[0]), float(np.abs(a[1] - b[1]).max()))

    comparison = Comparison(
        name=name,
        what=what,
        peer_name="the original's loop: slice by slice, scipy, medpy",
        ours=ours,
        peer=peer,
        difference=difference,
        tolerance=1e-4,
        target=target,
    )
    return compare(comparison, repeats=repeats, device=device)


def logits_of(net: scenes.Answers) -> torch.Tensor:
    """Return the logits of the inner network; a zero if there is none."""
    return torch.cat(net.logits) if net.logits else torch.zeros(1)
