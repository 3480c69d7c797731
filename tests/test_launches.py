"""How many operators a training step launches and how many bytes it moves, so that both stay low.

The numbers are those of a small network on tensors without content, as a GPU would compute it. A
change that needs more of them has to be worth it: raise the bound then, and say why.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from launches import FusedAttention, Launches, as_on_gpu, without_content
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer import freeze_unreached, make_optimizer
from training.losses import SegmentationLoss

SIDE, BATCH = 512, 4


def test_the_counter_counts():
    """Bytes by hand: views and repeated axes are free, every tensor of an operator counts once."""
    x, row = torch.ones(4, 6), torch.ones(4)
    with Launches() as launches:
        y = x.t() + 1  # a view; 96 bytes are read and 96 written
        y.add_(row.expand(6, 4))  # 96 and 16 read, 96 written
        y.t().reshape(3, 8).t().contiguous()  # views; 96 read and 96 written
    assert launches.count == 3
    assert launches.bytes == 6 * 96 + 16


def counts(amp: bool) -> dict[str, Launches]:
    """Count the stages of one training step."""
    model = as_on_gpu(tiny_model(image_size=SIDE)).train()
    freeze_unreached(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        without_content(model, mode)
        optimizer = make_optimizer(model, "adamw", 1e-3)
        for group in optimizer.param_groups:
            group["foreach"] = True  # PyTorch's default on a GPU
        criterion = SegmentationLoss(3, 0.8)
        images = torch.empty(BATCH, 3, SIDE, SIDE)
        labels = torch.empty(BATCH, SIDE // 4, SIDE // 4, dtype=torch.long)
        stages = {}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=amp)
        with Launches() as stages["forward"], FusedAttention(), autocast:
            logits = model(images, full_size_masks=False)["low_res_logits"]
        with Launches() as stages["loss"]:
            loss = criterion(logits, labels)["loss"]
        with Launches() as stages["backward"]:
            loss.backward()
        optimizer.step()  # The first step makes the state.
        with Launches() as stages["optimizer"]:
            optimizer.step()
    return stages


# Stage: launches, MB; measured when this was written.
MEASURED = {
    False: {
        "forward": (236, 1371),
        "loss": (27, 11),
        "backward": (346, 1718),
        "optimizer": (9, 212),
    },
    True: {
        "forward": (423, 1021),
        "loss": (28, 12),
        "backward": (485, 1217),
        "optimizer": (9, 212),
    },
}
SLACK = 1.02  # Versions of PyTorch differ a little.


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_a_step_launches_and_moves_no_more_than_it_did(amp: bool):
    found = {name: (x.count, x.bytes / 1e6) for name, x in counts(amp).items()}
    for stage, (launches, megabytes) in MEASURED[amp].items():
        assert found[stage][0] <= SLACK * launches, found
        assert found[stage][1] <= SLACK * megabytes, found
