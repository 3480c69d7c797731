"""The files in recipes/ are the commands of the published variants."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.files import sha256_of
from config.flags import train_parser
from config.run_folder import run_name
from config.settings import parse_args

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SAMED = ["--warmup", "--AdamW"]
# shared/spec/samed.md: one GPU with 24 slices, vit_h, exponent 7, 300 of 400 epochs.
SAMED_H = "--vit_name vit_h --batch_size 24 --n_gpu 1 --tf32 --compile --use_amp --lr_exp 7"
SAMED_H += " --max_epochs 400 --stop_epoch 300"
COMMANDS = {
    "samed": SAMED,
    "samed_s": [*SAMED, "--module", "sam_lora_image_encoder_mask_decoder"],
    "samed_h": [*SAMED, *SAMED_H.split()],
}


def test_every_recipe_has_a_command():
    assert {path.stem for path in RECIPES.iterdir()} == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_equals_its_command(name: str):
    file = RECIPES / f"{name}.json"
    before = sha256_of(file)
    data = ["--root_path", "data/Synapse"]
    found = parse_args(train_parser(), [*data, "--config", str(file)])
    expected = parse_args(train_parser(), [*data, *COMMANDS[name]])
    assert vars(found) == vars(expected) | {"config": str(file)}
    assert run_name(found) == run_name(expected)
    assert sha256_of(file) == before


def test_samed_h_is_vit_h_with_24_slices_and_the_command_line_wins():
    flags = ["--root_path", "x", "--config", str(RECIPES / "samed_h.json")]
    args = parse_args(train_parser(), [*flags, "--base_lr", "0.001"])
    assert (args.vit_name, args.batch_size * args.n_gpu, args.lr_exp) == ("vit_h", 24, 7)
    assert (args.base_lr, args.stop_epoch, args.max_epochs) == (0.001, 300, 400)
    assert args.ckpt.endswith("sam_vit_h_4b8939.pth")
