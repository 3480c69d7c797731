"""What `--train` trains, saves and refuses."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_model, tiny_sam, write_slices
from test_ablations import network_of, train_with

import sam_lora_image_encoder as samed
import sam_lora_image_encoder_mask_decoder as samed_s
import train
import trainer
from common.errors import InputError
from config.flags import train_parser
from config.settings import parse_args
from lora.adapter_file import holds_every_weight, read_adapter
from lora.older_module import as_lora_model
from lora.trainable import TRAINABLE, train_only
from lora.variants import load_variant
from trainer import UNREACHED, freeze_unreached
from training.checkpoint import newest_state
from training.memory import estimate_training_memory
from utils import build_model

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
OWN = """
from lora import LoRAModel
from sam_lora_image_encoder import encoder_updates


class LoRA_Sam(LoRAModel):
    def __init__(self, sam_model, r):
        super().__init__(
            sam_model,
            r,
            updates=encoder_updates(range(4)),
            frozen=("image_encoder.", "mask_decoder.", "prompt_encoder."),
            not_saved=("image_encoder.",),
        )
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training slices."""
    return write_slices(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own(project: Path) -> str:
    """A user's module that freezes the decoder and takes no keywords."""
    (project / "my_own.py").write_text(OWN)
    return "my_own"


def part_of(name: str) -> str:
    """Return to which part of a network a parameter belongs."""
    if ".updates." in name:
        return "updates"
    name = name.removeprefix("sam.")
    if name.startswith(UNREACHED):
        return "unreached"
    return "encoder" if name.startswith("image_encoder.") else "decoder"


WHAT_TRAINS = {
    "adapter+decoder": {"updates", "decoder"},
    "decoder": {"decoder"},
    "lora": {"updates"},
    "all": {"updates", "decoder", "encoder"},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", TRAINABLE)
def test_exactly_what_its_name_says_trains_and_is_rebuilt(
    what: str, data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    step = trainer.training_step

    def watched(model, *rest):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        result = step(model, *rest)
        seen.append(model)
        return result

    monkeypatch.setattr(trainer, "training_step", watched)
    run = train_with(data, tmp_path / "out", "--ckpt", str(base), "--train", what)
    before, model = seen[0], seen[-1]
    assert len(seen) == 4
    parameters = dict(model.named_parameters())
    trains = {name for name, value in parameters.items() if value.requires_grad}
    assert trains == {name for name in parameters if part_of(name) in WHAT_TRAINS[what]}
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    # The bias of k shifts all logits of an attention alike, so that its gradient may be exactly 0.
    still = {name for name in trains - changed if not name.endswith("k_proj.bias")}
    assert changed <= trains and still == set()
    if what == "decoder":
        assert not any(value.any() for name, value in after.items() if ".up.weight" in name)

    adapter = run / "epoch_0.pth"
    state, _ = read_adapter(adapter)
    assert holds_every_weight(state) == (what == "all")
    assert {"w_a_000", "mask_decoder.mask_tokens.weight"} <= state.keys()
    # Every frozen part that the base does not hold is in the file: nobody names --train again.
    flags = [] if what == "all" else ["--ckpt", str(base)]
    found = network_of(adapter, *flags)(IMAGES)["low_res_logits"]
    assert torch.equal(found, model.eval()(IMAGES)["low_res_logits"])
    saved = newest_state(run)["model"]
    assert trains <= saved.keys()
    assert {part_of(name) for name in saved} >= {"updates", "decoder"}
    assert (f"_train-{what}_" in run.name) == (what != "adapter+decoder")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["decoder", "lora", "all"])
def test_a_resumed_run_has_the_same_bits(what: str, data: Path, base: Path, tmp_path: Path):
    flags = ["--ckpt", str(base), "--train", what, "--max_epochs", "2"]
    short = train_with(data, tmp_path / "short", *flags)
    with pytest.raises(InputError, match=f"--train {what.replace('+', '.')} → adapter"):
        train.main(["--resume", str(short), "--train", "adapter+decoder"])
    train.main(["--resume", str(short), "--max_iterations", "4"])
    whole = train_with(data, tmp_path / "whole", *flags, "--max_iterations", "4")
    one, other = (read_adapter(run / "epoch_1.pth")[0] for run in (short, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first(
    data: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Heads first, then the updates alone, then every weight: each on top of the adapter before."""
    told = "trains no mask head"
    first = train_with(data, tmp_path / "1", "--ckpt", str(base), "--train", "decoder")
    heads = ["--train", "lora", "--ckpt"]
    fitting = train_with(data, tmp_path / "a", *heads, str(base))
    assert told not in (fitting / "log.txt").read_text()
    other = tmp_path / "of_3_classes.pth"  # as SAM's own file
    torch.save(tiny_sam(num_classes=3).state_dict(), other)
    capsys.readouterr()
    alone = train_with(data, tmp_path / "b", *heads, str(other))
    assert told in (alone / "log.txt").read_text()
    assert "28 of 31 tensors from the base file; fresh: " in capsys.readouterr().err

    def stage(what: str, before: Path) -> tuple[Path, dict, dict]:
        start = ["--lora_ckpt", str(before / "epoch_0.pth"), "--ckpt", str(base)]
        run = train_with(data, tmp_path / what, *start, "--train", what)
        assert told not in (run / "log.txt").read_text()
        return run, read_adapter(before / "epoch_0.pth")[0], read_adapter(run / "epoch_0.pth")[0]

    second, old, new = stage("lora", first)
    same = {name for name, value in new.items() if torch.equal(value, old[name])}
    assert same == {name for name in new if not name.startswith("w_")}
    third, old, new = stage("all", second)
    assert not holds_every_weight(old) and holds_every_weight(new)
    assert not torch.equal(new["w_b_000"], old["w_b_000"])
    # All is trained from now on: two words for it are one, and parts of it are refused.
    flags = ["--root_path", str(data), *TINY_FLAGS, "--lora_ckpt", str(third / "epoch_0.pth")]
    with pytest.raises(InputError, match=r"--train lora has no effect .*tools.adapter merge"):
        parse_args(train_parser(), [*flags, "--train", "lora"])
    network_of(third / "epoch_0.pth")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--train lora", "--train lora has no effect with --ckpt none"),
        ("--train decoder", "--train decoder has no effect with --ckpt none"),
        ("--ckpt b.pth --train decoder --lora_targets k", "--lora_targets has no effect with"),
        ("--ckpt b.pth --train decoder --lora_kind dora", "--lora_kind has no effect with"),
        ("--ckpt b.pth --train decoder --lora_dropout 0.1", "--lora_dropout has no effect"),
        ("--lora_targets decoder --lora_blocks 1", "--lora_blocks has no effect"),
    ],
)
def test_a_flag_without_effect_is_refused(flags: str, told: str):
    with pytest.raises(InputError, match=told):
        parse_args(train_parser(), ["--root_path", "none", *TINY_FLAGS, *flags.split()])


def test_a_variant_that_cannot_train_so_is_refused(own: str):
    with pytest.raises(InputError, match=r"would leave the mask decoder of .* half trained"):
        train_only(samed_s.LoRA_Sam(tiny_sam(), 2), "decoder")
    with pytest.raises(InputError, match="leaves nothing of the LoRA variant my_own"):
        train_only(load_variant(own)(tiny_sam(), 2), "decoder")
    train_only(load_variant(own)(tiny_sam(), 2), "lora")


def test_a_module_in_the_originals_style_decides_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "older_scripts"))
    import older_lora

    model = as_lora_model(older_lora.LoRA_Sam(tiny_sam(), 2), 2)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    train_only(model, "adapter+decoder")
    for what in ("decoder", "lora", "all"):
        with pytest.raises(InputError, match=f"--train {what} has no effect on the LoRA variant"):
            train_only(model, what)
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    sys.modules.pop("older_lora")


def test_a_variant_of_ones_own_need_not_take_the_keywords(own: str):
    flags = ["--root_path", "none", *TINY_FLAGS, "--module", own]
    args = parse_args(train_parser(), flags)
    assert len(build_model(args, torch.device("cpu"))[0].updates) == 8
    for flag, value in (("--lora_targets", "k"), ("--lora_blocks", "1")):
        told = f"{flag} has no effect on --module my_own, whose LoRA_Sam takes no"
        with pytest.raises(InputError, match=told):
            parse_args(train_parser(), [*flags, flag, value])
    # A script's flags lack these names.
    older = argparse.Namespace(**vars(args))
    for name in ("lora_targets", "lora_blocks", "train"):
        delattr(older, name)
    assert len(build_model(older, torch.device("cpu"))[0].updates) == 8
    older.lora_targets = ["k"]
    with pytest.raises(InputError, match="--lora_targets has no effect on"):
        build_model(older, torch.device("cpu"))


def test_the_memory_of_a_step_counts_what_trains():
    needed = {}
    for what in TRAINABLE:
        model = tiny_model(image_size=256)
        train_only(model, what)
        freeze_unreached(model)
        needed[what] = estimate_training_memory(
            model, batch_size=4, img_size=256, kept=2, device_type="cpu"
        )
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert needed[what]["gradients and optimiser"] == 3 * trained / 2**30
    assert needed["decoder"]["activations of 4 slices"] < needed["lora"]["activations of 4 slices"]
    total = {what: sum(memory.values()) for what, memory in needed.items()}
    assert max(total["decoder"], total["lora"]) < total["adapter+decoder"] < total["all"]


def test_the_default_changes_nothing():
    model = samed.LoRA_Sam(tiny_sam(), 2)
    randomise_updates(model)
    saved, trains = set(model.saved), [p.requires_grad for p in model.parameters()]
    train_only(model, "adapter+decoder")
    assert model.saved == saved and [p.requires_grad for p in model.parameters()] == trains
    assert json.dumps(sorted(saved)).count("image_encoder") == 0
