"""`--prompt_prob`: what it draws and trains, what it leaves as it was, and who may prompt."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_model, tiny_sam, write_slices

import sam_lora_image_encoder
import sam_lora_image_encoder_mask_decoder
import train
from common.errors import InputError
from config.flags import predict_parser, train_parser
from config.settings import complete, parse_args
from datasets.augmentation import AUGMENTATIONS, keyed_rng
from lora import LoRAModel
from lora.adapter_file import read_adapter
from lora.form import UpdateForm
from lora.older_module import as_lora_model
from lora.prompts import knows_prompts, recorded_prompt_prob, require_knows_prompts
from segment_anything.modeling import OrganPrompts
from segment_anything.modeling.prompt_encoder import INSIDE
from trainer import (
    OF_PROMPTS,
    UNREACHED,
    StepOptions,
    freeze_unreached,
    make_optimizer,
    training_step,
)
from training import batches
from training.losses import SegmentationLoss
from training.prompts import NUMBERS, DrawnPrompts, prompted_logits
from utils import build_model

SEEDS = [3, 2**62 + 11, 5, 2**40]


def prompted_model(module=sam_lora_image_encoder, dropout: float = 0.0) -> LoRAModel:
    torch.manual_seed(5)
    model = module.LoRA_Sam(tiny_sam(), 2)
    randomise_updates(model)
    model.set_form(UpdateForm(alpha=16, dropout=dropout))
    freeze_unreached(model, 0.5)
    return model.train()


def some_batch(prompted: list[bool], seeds: list[int] | None = None) -> dict:
    generator = torch.Generator().manual_seed(1)
    count = len(prompted)
    labels = torch.randint(0, 3, (count, 16, 16), generator=generator)
    numbers = torch.rand(count, NUMBERS, generator=generator, dtype=torch.float64)
    batch = {"image": torch.rand(count, 3, 64, 64, generator=generator), "low_res_label": labels}
    batch["drawn"] = DrawnPrompts(prompted, numbers, labels)
    return batch | ({"seeds": seeds} if seeds else {})


def step_of(model: LoRAModel, batch: dict, options: StepOptions) -> dict[str, torch.Tensor]:
    """Return the logits of a step and the gradients by their names."""
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(twin, "sgd", 0)
    _, logits = training_step(twin, batch, SegmentationLoss(3, 0.8), optimizer, 0, options)
    return {"logits": logits} | {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}


def draw(args: argparse.Namespace, indices: list[int], epoch: int = 2) -> dict:
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, (40, 40)).astype(np.float32) for _ in range(8)]
    samples = [{"image": labels[i], "label": labels[i], "index": i} for i in indices]
    slices = batches.collate_slices(samples)
    return batches.augmented_batch(slices, epoch, args, 16, torch.device("cpu"))


def test_the_draw_follows_from_the_slice_and_changes_nothing_else():
    args = complete(train_parser().parse_args(["--root_path", "none", *TINY_FLAGS]))
    args.lora_dropout = 0.1
    plain = draw(args, [0, 1, 2, 3])
    assert "drawn" not in plain
    args.prompt_prob = 0.5
    found = draw(args, [0, 1, 2, 3])
    assert torch.equal(found["image"], plain["image"]) and found["seeds"] == plain["seeds"]
    drawn = found["drawn"]
    assert torch.equal(drawn.labels, found["low_res_label"])
    for indices in ([2, 0], [3], [1, 2]):  # another rank, another part
        other = draw(args, indices)["drawn"]
        assert torch.equal(other.numbers, drawn.numbers[indices])
        assert other.prompted == [drawn.prompted[index] for index in indices]
    assert not torch.equal(draw(args, [0, 1, 2, 3], epoch=3)["drawn"].numbers, drawn.numbers)
    generator = keyed_rng(args.seed, 2, 1)
    AUGMENTATIONS["samed"](generator, args.spec), generator.integers(2**63)
    assert np.array_equal(drawn.numbers[1].numpy(), generator.random(NUMBERS))
    assert "drawn" not in draw(args, [])  # a rank without slices


@pytest.mark.parametrize("prob", [0.2, 1.0])
def test_the_share_of_prompted_slices_is_the_probability(prob: float):
    generators = [keyed_rng(7, 0, index) for index in range(1000)]
    drawn = DrawnPrompts.draw(generators, prob, torch.zeros(1000, 1, 1))
    assert abs(len(drawn.asked) / 1000 - prob) < 5 * (prob * (1 - prob) / 1000) ** 0.5 + 1e-9
    assert sorted(drawn.asked + drawn.others) == list(range(1000))


def test_the_encoder_runs_once_and_slices_without_prompts_are_decoded_as_before():
    model, calls = prompted_model().eval(), {"image_encoder": 0, "mask_decoder": 0}
    batch = some_batch([True, False, True, False])
    plain = model(batch["image"], full_size_masks=False)["low_res_logits"]

    def counting(name: str):
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        getattr(model.sam, name).register_forward_hook(counting(name))
    found = prompted_logits(model, batch["image"], batch["drawn"])
    assert calls == {"image_encoder": 1, "mask_decoder": 3}
    assert torch.allclose(found[[1, 3]], plain[[1, 3]], atol=1e-4)
    embeddings = model.sam.image_encoder(batch["image"][[0, 2]])
    prompts = batch["drawn"].prompts(plain[[0, 2]], 64)
    expected = model.sam.decode(embeddings, prompts)[0]
    assert torch.allclose(found[[0, 2]], expected, atol=1e-4)
    assert (found - plain)[[0, 2]].abs().max() > 1e-2


def test_a_step_without_a_prompt_has_the_bits_of_training_without_prompts():
    """Also its update: what only prompts reach gets no gradient, so that nothing decays it."""
    model, batch = prompted_model(), some_batch([False] * 4)
    found = step_of(model, batch, StepOptions())
    assert all((found[name] is None) == name.removeprefix("sam.").startswith(OF_PROMPTS)
               for name in found if name != "logits")  # fmt: skip
    del batch["drawn"]
    freeze_unreached(model)
    expected = step_of(model, batch, StepOptions())
    assert found.keys() - expected.keys() == {n for n in found if found[n] is None}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_everything_that_trains_gets_a_gradient(amp_dtype: torch.dtype | None):
    """Autocast must not keep the weights that the pass without gradient has rounded."""
    found = step_of(prompted_model(), some_batch([True] * 3), StepOptions(amp_dtype=amp_dtype))
    names = {name.removeprefix("sam.") for name in found}
    assert not [name for name in names if name.startswith(UNREACHED) and "downsc" in name]
    assert all(any(name.startswith(prefix) for name in names) for prefix in OF_PROMPTS)
    still = [name for name, value in found.items() if value is None or not value.any()]
    kinds = {f"sam.prompt_encoder.point_embeddings.{kind}.weight" for kind in range(4)}
    assert {*still} <= kinds | {n for n in still if n.endswith("k_proj.bias")}
    assert len(kinds & {*still}) < 4  # those that no prompt of these slices is of
    if amp_dtype:
        exact = step_of(prompted_model(), some_batch([True] * 3), StepOptions())
        for name in ("sam.mask_decoder.mask_tokens.weight", "sam.image_encoder.blocks.0.attn.qkv"):
            for key in (key for key in exact if key.startswith(name)):
                one, other = exact[key].flatten(), found[key].flatten()
                assert torch.cosine_similarity(one, other, dim=0) > 0.5, key


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_parts_and_computing_blocks_again_give_the_same_gradients(dropout: float):
    """SAMed_s drops in the decoder too, where each slice needs its own seed."""
    model = prompted_model(sam_lora_image_encoder_mask_decoder, dropout)

    def found(**options: int) -> dict[str, torch.Tensor]:
        batch = some_batch([True, False, True, True], SEEDS if dropout else None)
        return step_of(model, batch, StepOptions(**options))

    whole = found()
    for at_once in (1, 3):
        for name, other in found(at_once=at_once).items():
            atol = 5e-5 * float(whole[name].abs().max()) + 1e-9
            assert torch.allclose(whole[name], other, rtol=1e-3, atol=atol), name
    model.sam.image_encoder.checkpoint_blocks = True
    again = found()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def organ_slices(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """Return labels with a square of each of two organs, and the places of these (x, y)."""
    labels, places = torch.zeros(count, 16, 16, dtype=torch.int64), np.zeros((count, 3, 2), int)
    for index in range(count):
        corners = rng.permutation(4)[:2]
        for organ, corner in enumerate(corners, start=1):
            x, y = 8 * (corner % 2), 8 * (corner // 2)
            labels[index, y + 1 : y + 7, x + 1 : x + 7] = organ
            places[index, organ] = x + 4, y + 4
    return labels, places


@pytest.fixture(scope="module")
def taught() -> LoRAModel:
    """A network that learned from prompts alone, since its images show nothing."""
    torch.manual_seed(0)
    model = tiny_model()
    freeze_unreached(model, 1.0)
    with torch.no_grad():
        flat = model.sam.image_encoder(torch.zeros(1, 3, 64, 64))
    model.sam.image_encoder.forward = lambda images: flat.expand(len(images), -1, -1, -1)
    optimizer = make_optimizer(model, "adamw", 0)
    rng = np.random.default_rng(0)
    for step in range(100):
        labels, _ = organ_slices(6, rng)
        drawn = DrawnPrompts.draw([keyed_rng(1, step, i) for i in range(6)], 1.0, labels)
        batch = {"image": torch.zeros(6, 3, 64, 64), "low_res_label": labels, "drawn": drawn}
        options = StepOptions(clip_grad=0.5)
        training_step(model, batch, SegmentationLoss(3, 0.8), optimizer, 1e-3, options)
    return model.eval()


@pytest.mark.slow
@torch.no_grad()
def test_a_click_raises_the_organ_that_it_names_where_it_lies(taught: LoRAModel):
    """Taught for seconds, it takes every click at a place that it knows nothing of."""
    embedding = taught.sam.image_encoder(torch.zeros(1, 3, 64, 64))
    before = taught.sam.decode(embedding)[0][0].softmax(0)
    for x in (3, 4, 12):
        for y in (4, 11):
            for organ in (1, 2):
                click = OrganPrompts(
                    torch.tensor([[[4.0 * x, 4.0 * y]]]),
                    torch.tensor([[INSIDE]]),
                    torch.tensor([[organ]]),
                )
                after = taught.sam.decode(embedding, click)[0][0].softmax(0)
                raised = after - before
                assert raised[organ, y, x] > 0.2 and raised[organ, y, x] > raised[3 - organ, y, x]
                elsewhere = raised[organ, (y + 8) % 16, (x + 8) % 16]
                assert raised[organ, y, x] > elsewhere + 0.2


def run_of(data: Path, output: Path, *more: str) -> Path:
    flags = ["--root_path", str(data), "--output", str(output), *TINY_FLAGS, "--name", "run"]
    train.main([*flags, "--batch_size", "4", "--max_iterations", "1", *more])
    return output / "run"


def test_the_adapter_tells_who_knows_prompts(tmp_path: Path):
    data = write_slices(tmp_path / "data")
    prompted = run_of(data, tmp_path / "one", "--prompt_prob", "1") / "epoch_0.pth"
    plain = run_of(data, tmp_path / "two") / "epoch_0.pth"

    def network(adapter: Path) -> LoRAModel:
        argv = ["--input", "x", "--output", "y", "--lora_ckpt", str(adapter), "--device", "cpu"]
        return build_model(parse_args(predict_parser(), argv), torch.device("cpu"))[0]

    assert read_adapter(prompted)[1]["prompt_prob"] == 1
    require_knows_prompts(network(prompted))
    assert not knows_prompts(network(plain)) and not knows_prompts(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"a\.pth knows no prompts, .*--prompt_prob 0\.5"):
        require_knows_prompts(network(plain), "a.pth")
    # A run that starts from it goes on with prompts, unless it is told otherwise.
    start = ["--root_path", str(data), *TINY_FLAGS, "--lora_ckpt"]
    assert parse_args(train_parser(), [*start, str(prompted)]).prompt_prob == 1
    assert parse_args(train_parser(), [*start, str(plain)]).prompt_prob == 0
    assert (
        parse_args(train_parser(), [*start, str(prompted), "--prompt_prob", "0"]).prompt_prob == 0
    )


@pytest.mark.parametrize("value", ["0.5", None, 2, -0.1, float("nan"), True, [0.5]])
def test_an_entry_that_is_no_probability_is_refused(value: object):
    with pytest.raises(InputError, match=r"a\.pth has prompt_prob = .*, expected 0…1"):
        recorded_prompt_prob({"prompt_prob": value}, "a.pth")
    assert recorded_prompt_prob({}, "a.pth") == 0 and recorded_prompt_prob({"prompt_prob": 1}, "")


def test_a_training_that_cannot_teach_prompts_is_refused(monkeypatch: pytest.MonkeyPatch):
    flags = ["--root_path", "none", *TINY_FLAGS, "--ckpt", "b.pth", "--prompt_prob", "0.5"]
    with pytest.raises(InputError, match="cannot teach prompts with --train lora"):
        parse_args(train_parser(), [*flags, "--train", "lora"])
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "older_scripts"))
    import older_lora

    model = as_lora_model(older_lora.LoRA_Sam(tiny_sam(), 2), 2)
    with pytest.raises(InputError, match=r"computes its forward pass by itself.*--prompt_prob"):
        freeze_unreached(model, 0.5)
    freeze_unreached(model)
