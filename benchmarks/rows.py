"""The rows of the table: each times a part of the project against a peer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from datasets.augmentation import draw_augmentation, keyed_rng, prepare_batch
from datasets.dataset_synapse import Synapse_dataset
from datasets.resampling import resize_images
from evaluation.cpu_speed import pack_encoder
from evaluation.medpy_check import medpy_scores, require_medpy
from evaluation.metrics import score_volume
from trainer import freeze_unreached, make_optimizer, training_step
from training.batches import collate_slices
from training.losses import SegmentationLoss

from . import plain, scenes
from .exporting import onnx_rows
from .saving import saving_rows
from .testing import testing_rows
from .timing import Comparison, Row, check_agreement, compare, largest, timed

CPU = torch.device("cpu")


def metrics_rows(device: torch.device) -> list[Row]:
    """Time DSC and HD95 of a volume. medpy takes minutes, so it scores each organ once."""
    _, label, prediction = scenes.scene()
    return [
        metrics_row("metrics", "DSC + HD95, 150×512×512, 8 organs", prediction, label, 50),
        metrics_row(
            "metrics, scattered",
            "the same with 60 stray voxels an organ",
            scenes.scattered(prediction),
            label,
            20,
        ),
    ]


def metrics_row(
    name: str, what: str, prediction: np.ndarray, label: np.ndarray, target: float
) -> Row:
    """Time medpy organ by organ, and our scores of all organs after each of its organs."""
    require_medpy()  # imports it before the clock starts
    ours = score_volume(prediction, label, scenes.NUM_CLASSES)
    peer_seconds, our_seconds, worst = 0.0, [], 0.0
    for index, score in enumerate(ours, start=1):
        scores: list[tuple[float, float]] = []
        masks = prediction == index, label == index
        peer_seconds += timed(lambda m=masks, s=scores: s.append(medpy_scores(*m)))
        our_seconds.append(timed(lambda: score_volume(prediction, label, scenes.NUM_CLASSES)))
        dsc, hd95 = scores[0]
        worst = max(worst, abs(dsc - score.samed_dsc), abs(hd95 - score.samed_hd95))
    difference = check_agreement(name, worst, 1e-6)
    ratios = [peer_seconds / seconds for seconds in our_seconds]
    return Row(
        name=name,
        what=what,
        peer="medpy, whole volume",
        ratio=float(np.median(ratios)),
        low=min(ratios),
        high=max(ratios),
        repeats=len(ratios),
        difference=difference,
        tolerance=1e-6,
        target=target,
        notes="the peer ran once, organ by organ; ours after each organ",
    )


def resize_rows(device: torch.device) -> list[Row]:
    """Time the zoom of slices to the training size and then to the network's size."""
    image = scenes.scene()[0][:24] if device.type == "cpu" else scenes.scene()[0]
    slices = torch.from_numpy(image).to(device)

    def ours() -> torch.Tensor:
        return resize_images(resize_images(slices, (224, 224)), (512, 512))

    def peer() -> torch.Tensor:
        sizes = [(224, 224), (512, 512)]
        out = []
        for plane in image:
            for size in sizes:
                plane = plain.plain_zoom(plane, size, order=3)
            out.append(plane)
        return torch.from_numpy(np.stack(out))

    comparison = Comparison(
        name="resize",
        what=f"test-time resize 512→224→512 of {len(image)} slices",
        peer_name="scipy zoom, order 3, twice",
        ours=ours,
        peer=peer,
        difference=largest,
        tolerance=1e-5,
        target=10,
    )
    return [compare(comparison, device=device)]


def sample_rows(device: torch.device) -> list[Row]:
    """Time a batch of training samples from files to the device."""
    folder = scenes.scratch_folder()
    paths = scenes.write_slices(folder / "train_npz", 24)
    lists = folder / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("".join(f"{path.stem}\n" for path in paths))
    dataset = Synapse_dataset(folder, lists, "train")
    choices = [draw_augmentation(keyed_rng(0, 0, index)) for index in range(len(paths))]

    def ours() -> list[torch.Tensor]:
        raw = collate_slices([dataset[index] for index in range(len(dataset))])
        batch = prepare_batch(
            raw["image"].to(device),
            raw["label"].to(device),
            choices,
            output_size=(512, 512),
            low_res=(128, 128),
        )
        return [batch["image"][:, 0], batch["label"], batch["low_res_label"]]

    def peer() -> list[torch.Tensor]:
        samples = [
            plain.plain_sample(path, choice, 512, 128)
            for path, choice in zip(paths, choices, strict=True)
        ]
        return [torch.stack(parts).to(device) for parts in zip(*samples, strict=True)]

    comparison = Comparison(
        name="training sample",
        what="24 samples: read, augment, resize 224→512, labels",
        peer_name="scipy",
        ours=ours,
        peer=peer,
        difference=lambda a, b: max(map(largest, a, b)),
        tolerance=1e-5,
        target=8,
    )
    return [compare(comparison, device=device)]


def encoder_rows(device: torch.device) -> list[Row]:
    """Time vit_b at 512 px against Hugging Face's encoder with the same weights."""
    from transformers import SamVisionConfig, SamVisionModel

    model = scenes.network().eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".up." in name:
            nn.init.zeros_(parameter)  # the peer has no LoRA updates
    model.merge()
    encoder = model.sam.image_encoder
    weights = transformers_names(encoder)
    pack_encoder(model)  # as test.py does
    config = SamVisionConfig(image_size=512, attn_implementation="sdpa")
    theirs = SamVisionModel(config).eval().to(device)
    theirs.load_state_dict(weights)
    rows = []
    for dtype, count, tolerance in (
        [(torch.float32, 1, 1e-4)]
        if device.type == "cpu"
        else [(torch.float32, 24, 1e-3), (torch.bfloat16, 24, 0.2)]
    ):
        images = torch.rand(count, 3, 512, 512, device=device, dtype=dtype)
        ours, peer = encoder.to(dtype), theirs.to(dtype)
        for network in (ours, peer):
            network.requires_grad_(False)
        comparison = Comparison(
            name="encoder",
            what=f"encoder forward, vit_b, 512 px, batch {count}, {str(dtype).split('.')[1]}",
            peer_name="transformers' SAM vision encoder, SDPA",
            ours=partial(embed, ours, images),
            peer=partial(embed, peer, images),
            difference=largest,
            tolerance=tolerance,
            target=1.2,
        )
        rows.append(compare(comparison, repeats=9, device=device))
    return rows


@torch.inference_mode()
def embed(network: nn.Module, images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S)
    """Run an image encoder, ours or `SamVisionModel`, and return its embeddings."""
    out = network(images)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def transformers_names(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Return our encoder's weights under the names of `SamVisionModel`."""
    changes = (
        ("patch_embed.proj.", "patch_embed.projection."),
        ("blocks.", "layers."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        ("neck.0.", "neck.conv1."),
        ("neck.1.", "neck.layer_norm1."),
        ("neck.2.", "neck.conv2."),
        ("neck.3.", "neck.layer_norm2."),
    )
    state = {}
    for name, value in encoder.state_dict().items():
        if ".updates." in name:
            continue
        for ours, theirs in changes:
            name = name.replace(ours, theirs)
        state[f"vision_encoder.{name}"] = value
    return state


def step_rows(device: torch.device) -> list[Row]:
    """Time one update of vit_b at 512 px on a CPU; the package `gpu` does it on a GPU."""
    model = scenes.network().train()
    freeze_unreached(model)
    slow = plain.plain_copy(model)
    criterion = SegmentationLoss(scenes.NUM_CLASSES + 1, 0.8)
    optimizers = [make_optimizer(network, "adamw", 1e-4) for network in (model, slow)]
    batch = {
        "image": torch.rand(2, 1, 512, 512).expand(-1, 3, -1, -1),
        "low_res_label": torch.randint(0, scenes.NUM_CLASSES + 1, (2, 128, 128)),
    }

    def ours() -> float:
        return training_step(model, batch, criterion, optimizers[0], 1e-4)[0]["loss"].item()

    def peer() -> float:
        return plain.plain_step(slow, batch, criterion, optimizers[1], 1e-4)["loss"]

    comparison = Comparison(
        name="training step",
        what="one update, vit_b, 512 px, batch 2, float32",
        peer_name="the same network written plainly",
        ours=ours,
        peer=peer,
        difference=lambda a, b: abs(a - b),
        tolerance=1e-5,
        target=1.3,
    )
    return [compare(comparison, repeats=6)]


ROWS: dict[str, Callable[[torch.device], list[Row]]] = {
    "encoder": encoder_rows,
    "onnx": onnx_rows,
    "step": step_rows,
    "sample": sample_rows,
    "resize": resize_rows,
    "testing": testing_rows,
    "saving": saving_rows,
    "metrics": metrics_rows,
}
