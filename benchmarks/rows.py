"""The rows of the table: what is timed against what."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import test
from datasets.augmentation import draw_augmentation, keyed_rng, prepare_batch
from datasets.dataset_synapse import Synapse_dataset
from datasets.resampling import resize_images
from evaluation.cpu_speed import pack_encoder
from evaluation.metrics import score_volume
from trainer import freeze_unreached, make_optimizer, training_step
from training.batches import collate_slices
from training.losses import SegmentationLoss

from . import plain, scenes
from .saving import saving_rows
from .timing import Row, check_agreement, compare, largest, timed

CPU = torch.device("cpu")


def metrics_rows(device: torch.device) -> list[Row]:
    """DSC and HD95 of a whole volume. medpy takes minutes, so each organ is timed once."""
    _, label, prediction = scenes.scene()
    return [
        metrics_row("metrics", "DSC + HD95, 150×512×512, 8 organs", prediction, label, 50),
        metrics_row(
            "metrics, scattered",
            "the same with 60 stray voxels an organ",
            *(scenes.scattered(prediction), label, 20),
        ),
    ]


def metrics_row(
    name: str, what: str, prediction: np.ndarray, label: np.ndarray, target: float
) -> Row:
    """Our time for all organs after each organ of the peer: the turns of one long comparison."""
    ours = score_volume(prediction, label, scenes.NUM_CLASSES)
    peer_seconds, our_seconds, worst = 0.0, [], 0.0
    for index, score in enumerate(ours, start=1):
        scores: list[tuple[float, float]] = []
        masks = prediction == index, label == index
        peer_seconds += timed(lambda m=masks, s=scores: s.append(plain.plain_scores(*m)))
        our_seconds.append(timed(lambda: score_volume(prediction, label, scenes.NUM_CLASSES)))
        dsc, hd95 = scores[0]
        worst = max(worst, abs(dsc - score.samed_dsc), abs(hd95 - score.samed_hd95))
    difference = check_agreement(name, worst, 1e-6)
    ratios = [peer_seconds / seconds for seconds in our_seconds]
    return Row(
        *(name, what, "medpy, whole volume"),
        *(float(np.median(ratios)), min(ratios), max(ratios), len(ratios), difference, 1e-6),
        target,
        notes="the peer ran once, organ by organ; ours after each",
    )


def resize_rows(device: torch.device) -> list[Row]:
    """A volume's slices to the training size and on to the network's."""
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

    what = f"test-time resize 512→224→512 of {len(image)} slices"
    peer_name = "scipy zoom, order 3, twice"
    return [
        compare(
            *("resize", what, peer_name, ours, peer, largest),
            **{"tolerance": 1e-5, "target": 10, "device": device},
        )
    ]


def sample_rows(device: torch.device) -> list[Row]:
    """A batch of training samples from their files to the device."""
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
            *(raw["image"].to(device), raw["label"].to(device), choices),
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

    row = compare(
        *("training sample", "24 samples: read, augment, resize 224→512, labels", "scipy"),
        *(ours, peer, lambda a, b: max(map(largest, a, b))),
        **{"tolerance": 1e-5, "target": 8, "device": device},
    )
    return [row]


def encoder_rows(device: torch.device) -> list[Row]:
    """vit_b at 512 px against Hugging Face's, with the same weights."""
    from transformers import SamVisionConfig, SamVisionModel

    model = scenes.network().eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".up." in name:
            nn.init.zeros_(parameter)  # the peer has no updates
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
        for function in (ours, peer):
            function.requires_grad_(False)

        def run(network: nn.Module, images: torch.Tensor = images) -> torch.Tensor:
            with torch.inference_mode():
                out = network(images)
            return out if isinstance(out, torch.Tensor) else out.last_hidden_state

        what = f"encoder forward, vit_b, 512 px, batch {count}, {str(dtype).split('.')[1]}"
        rows.append(
            compare(
                *("encoder", what, "transformers' SAM vision encoder, SDPA"),
                *(lambda n=ours, r=run: r(n), lambda n=peer, r=run: r(n), largest),
                **{"tolerance": tolerance, "target": 1.2, "repeats": 9, "device": device},
            )
        )
    return rows


def transformers_names(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Our encoder's weights by the names of `SamVisionModel`."""
    changes = (
        *(("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers.")),
        *((".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2.")),
        *(("neck.0.", "neck.conv1."), ("neck.1.", "neck.layer_norm1.")),
        *(("neck.2.", "neck.conv2."), ("neck.3.", "neck.layer_norm2.")),
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
    """One update of vit_b at 512 px; on a GPU in `gpu.py`, with memory and share of the peak."""
    if device.type == "cuda":
        from .gpu import gpu_step_rows

        return gpu_step_rows(device)
    model = scenes.network().train()
    freeze_unreached(model)
    slow = plain.plain_copy(model)
    criterion = SegmentationLoss(scenes.NUM_CLASSES + 1, 0.8)
    optimizers = [make_optimizer(network, adamw=True, base_lr=1e-4) for network in (model, slow)]
    batch = {
        "image": torch.rand(2, 1, 512, 512).expand(-1, 3, -1, -1),
        "low_res_label": torch.randint(0, scenes.NUM_CLASSES + 1, (2, 128, 128)),
    }

    def ours() -> float:
        return training_step(model, batch, criterion, optimizers[0], 1e-4)[0]["loss"].item()

    def peer() -> float:
        return plain.plain_step(slow, batch, criterion, optimizers[1], 1e-4)["loss"]

    return [
        compare(
            *("training step", "one update, vit_b, 512 px, batch 2, float32"),
            *("the same network written plainly", ours, peer, lambda a, b: abs(a - b)),
            **{"tolerance": 1e-5, "target": 1.3, "repeats": 6},
        )
    ]


def testing_rows(device: torch.device) -> list[Row]:
    """`test.py` on a volume: with vit_b, and all that is not the network."""
    image, label, prediction = scenes.scene()
    middle = slice(60, 80)
    with_network = testing_row(
        *("test.py", "a volume of 20×512×512, vit_b, read to NIfTI", device),
        *(image[middle], label[middle], prediction[middle], scenes.network(), 1.8, 3),
    )
    middle = slice(40, 88)
    without = testing_row(
        *("test.py, not the network", "a volume of 48×512×512, masks given, read to NIfTI", device),
        *(image[middle], label[middle], prediction[middle], None, 20, 3),
    )
    return [with_network, without]


def testing_row(
    name: str,
    what: str,
    device: torch.device,
    image: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    model: nn.Module | None,
    target: float,
    repeats: int,
) -> Row:
    """One volume through `test.test_cases` and through the original's loop."""
    folder = scenes.scratch_folder()
    args, dataset = scenes.test_data(folder, {"case0001": (image, label)}, "--is_savenii")
    slow = None if model is None else plain.plain_copy(model).eval().to(device)
    if model is not None:
        model.eval().to(device).merge()
        pack_encoder(model)
    fast_net = scenes.Answers(prediction, model).to(device)
    slow_net = scenes.Answers(prediction, slow).to(device)

    def ours() -> tuple[torch.Tensor, np.ndarray]:
        fast_net.restart()
        results = list(test.test_cases(args, fast_net, dataset, folder / "out"))
        scores = results[0][0].scores
        return logits_of(fast_net), np.array([(s.samed_dsc, s.samed_hd95) for s in scores])

    def peer() -> tuple[torch.Tensor, np.ndarray]:
        slow_net.restart()
        found, scores = plain.plain_test(
            *(dataset.paths[0], slow_net),
            **{"classes": scenes.NUM_CLASSES, "input_size": args.input_size},
            **{"image_size": args.img_size, "folder": folder},
        )
        check_agreement(name, float((found != prediction).sum()), 0)
        return logits_of(slow_net), np.array(scores)

    def difference(a: tuple, b: tuple) -> float:
        return max(largest(a[0], b[0]), float(np.abs(a[1] - b[1]).max()))

    return compare(
        *(name, what, "the original's loop: slice by slice, scipy, medpy", ours, peer, difference),
        **{"tolerance": 1e-4, "target": target, "repeats": repeats, "device": device},
    )


def logits_of(net: scenes.Answers) -> torch.Tensor:
    """All logits of the network inside; zero if there is none."""
    return torch.cat(net.logits) if net.logits else torch.zeros(1)


ROWS: dict[str, Callable[[torch.device], list[Row]]] = {
    "encoder": encoder_rows,
    "step": step_rows,
    "sample": sample_rows,
    "resize": resize_rows,
    "testing": testing_rows,
    "saving": saving_rows,
    "metrics": metrics_rows,
}
