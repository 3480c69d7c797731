"""Which layers and blocks get updates (`--lora_targets`, `--lora_blocks`)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_model, tiny_sam, write_slices
from test_ablations import train_with
from test_datasets import write_volume_h5

import sam_lora_image_encoder as samed
import sam_lora_image_encoder_mask_decoder as samed_s
import test as test_program
import trainer
from common.errors import InputError
from config.flags import test_parser as parser_of_test
from config.flags import train_parser
from config.run_folder import run_name
from config.settings import parse_args
from lora.adapter_file import read_adapter
from sam_lora_image_encoder import chosen_blocks, encoder_updates, plainest_blocks
from tools import adapter as adapter_tool
from utils import build_model

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
EVERYWHERE = ("q", "k", "v", "proj", "lin1", "lin2")
# Of the tiny encoder, 192 channels: the layer of a block, and the rows of its weight.
ROWS = {
    "q": ("attn.qkv", slice(0, 192)),
    "k": ("attn.qkv", slice(192, 384)),
    "v": ("attn.qkv", slice(384, 576)),
    "proj": ("attn.proj", slice(0, 192)),
    "lin1": ("mlp.lin1", slice(0, 768)),
    "lin2": ("mlp.lin2", slice(0, 192)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training slices, and a test volume."""
    folder = write_slices(tmp_path_factory.mktemp("data"))
    write_volume_h5(folder)
    (folder / "lists" / "test_vol.txt").write_text("case0001\n")
    return folder


def training_flags(*flags: str) -> SimpleNamespace:
    """Parse a command line of train.py."""
    return parse_args(train_parser(), ["--root_path", "none", *TINY_FLAGS, *flags])


@torch.no_grad()
@pytest.mark.parametrize("target", EVERYWHERE)
def test_an_update_adds_b_a_to_the_rows_of_its_target_alone(target: str):
    plain = tiny_sam().eval()
    model = samed.LoRA_Sam(copy.deepcopy(plain), 2, lora_layer=[1, 3], targets=EVERYWHERE).eval()
    assert torch.equal(model(IMAGES)["masks"], plain(IMAGES)["masks"])
    # the second of the two blocks, by the order of the names in the file
    index = len(EVERYWHERE) + EVERYWHERE.index(target)
    state = model.adapter_state()
    down, up = state[f"w_a_{index:03d}"], state[f"w_b_{index:03d}"]
    torch.nn.init.normal_(up, std=0.3)
    layer, rows = ROWS[target]
    path = f"image_encoder.blocks.3.{layer}"
    tokens = torch.randn(2, 5, down.shape[1])
    change = model.sam.get_submodule(path)(tokens) - plain.get_submodule(path)(tokens)
    assert torch.allclose(change[..., rows], tokens @ down.T @ up.T, atol=1e-5)
    change[..., rows] = 0
    assert not change.any()

    before = plain(IMAGES)["low_res_logits"]
    plain.get_submodule(path).weight[rows] += up @ down
    expected = plain(IMAGES)["low_res_logits"]
    bound = 1e-5 * expected.abs().max()
    assert (expected - before).abs().max() > 10 * bound
    assert (model(IMAGES)["low_res_logits"] - expected).abs().max() <= bound
    merged = model.plain_state()
    assert all(torch.allclose(merged[k], v, atol=1e-6) for k, v in plain.state_dict().items())


def test_the_published_rows_keep_their_names_and_places():
    rows = encoder_updates(range(12))
    assert rows == encoder_updates(range(12), ["v", "q"])
    assert [(row.layer, row.part, row.parts) for row in rows] == [
        (f"image_encoder.blocks.{block}.attn.qkv", part, 3)
        for block in range(12)
        for part in (0, 2)
    ]
    assert [row.down for row in rows] == [f"w_a_{index:03d}" for index in range(24)]
    torch.manual_seed(1)
    published = samed.LoRA_Sam(tiny_sam(), 2).state_dict()
    torch.manual_seed(1)
    named = samed.LoRA_Sam(tiny_sam(), 2, lora_layer=None, targets=["v", "q"]).state_dict()
    assert list(published) == list(named)
    assert all(torch.equal(value, named[name]) for name, value in published.items())


def test_a_target_that_the_module_does_not_have_is_refused():
    with pytest.raises(InputError, match="targets are decoder, expected q k v proj lin1 lin2"):
        samed.LoRA_Sam(tiny_sam(), 2, targets=["q", "decoder"])


@pytest.mark.parametrize(
    ("words", "blocks", "plainest"),
    [
        ("all", range(12), "all"),
        ("every_1", range(12), "all"),
        ("first_half", range(6), "first_half"),
        ("last_half", range(6, 12), "last_half"),
        ("11 10 9 8 7 6 6", range(6, 12), "last_half"),
        ("every_5", (0, 5, 10), "every_5"),
        ("10 0 5", (0, 5, 10), "every_5"),
        ("0", (0,), "0"),
        ("7 2", (2, 7), "2 7"),
        ("0 1 2 3 4 5 6 7 8 9 10 11", range(12), "all"),
    ],
)
def test_the_blocks_of_vit_b(words: str, blocks: range, plainest: str):
    assert chosen_blocks(words.split(), 12) == list(blocks)
    assert plainest_blocks(words.split(), 12) == plainest.split()
    assert chosen_blocks(plainest.split(), 12) == list(blocks)


def test_the_halves_of_an_odd_depth_share_no_block():
    assert chosen_blocks(["first_half"], 5) == [0, 1]
    assert chosen_blocks(["last_half"], 5) == [2, 3, 4]
    assert plainest_blocks(["0"], 1) == ["all"]
    with pytest.raises(InputError, match="first_half, expected"):
        chosen_blocks(["first_half"], 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("every_0", "every_0, expected all"),
        ("every_99", r"expected .* every_2…every_11, or numbers"),
        ("every_x", "is every_x, expected"),
        ("middle", "is middle, expected"),
        ("all 3", "is all, 3, expected"),
        ("first_half last_half", "is first_half, last_half, expected"),
        ("-1", "is -1, expected"),
        ("1.5", "is 1.5, expected"),
        ("3 12 14", "names the blocks 12, 14, expected 0…11"),
        ("", "is nothing, expected"),
        ("٣", "expected all"),
    ],
)
def test_words_that_name_no_block_are_refused(words: str, told: str):
    with pytest.raises(InputError, match=told):
        chosen_blocks(words.split(), 12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("--lora_targets v q", ""),
        ("--lora_targets lin2 k lin2", "--lora_targets k lin2"),
        ("--lora_blocks 2 3", "--lora_blocks last_half"),
        ("--lora_blocks every_1", ""),
        ("--lora_targets decoder v q", "--module sam_lora_image_encoder_mask_decoder"),
        (
            "--module sam_lora_image_encoder_mask_decoder --lora_targets decoder k",
            "--lora_targets k decoder",
        ),
        ("--lora_alpha 2", ""),  # the rank
        ("--train all", ""),  # with --ckpt none
    ],
)
def test_two_ways_to_say_the_same_are_the_same_settings(one: str, other: str):
    one, other = training_flags(*one.split()), training_flags(*other.split())
    assert vars(one) == vars(other)
    assert run_name(one) == run_name(other)


def test_the_published_settings_leave_the_name_of_a_run_as_it_was():
    assert "_encoder_r2_scratch_" in run_name(training_flags())
    flags = training_flags(*"--lora_targets v k --lora_blocks 3 1".split())
    assert "_encoder_r2_k-v_blocks-1-3_scratch_" in run_name(flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ("--lora_targets q k v proj lin1 lin2 --lora_blocks last_half", 12),
        ("--lora_targets v k decoder --lora_blocks 2", 2 + 14),
        ("--lora_targets decoder", 14),
    ],
)
def test_training_testing_and_tools_agree_without_the_flags(
    flags: str,
    rows: int,
    data: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    trained, tested = [], []
    step = trainer.training_step
    monkeypatch.setattr(
        trainer, "training_step", lambda model, *rest: trained.append(model) or step(model, *rest)
    )
    run = train_with(data, tmp_path / "out", "--ckpt", str(base), *flags.split())
    adapter = run / "epoch_0.pth"
    state, settings = read_adapter(adapter)
    assert len(settings["updates"]) == rows and len(state) > 2 * rows
    changed = [row[4] for row in settings["updates"] if state[row[4]].any()]
    assert len(changed) == rows  # every update was trained
    expected = trained[-1].eval()(IMAGES)["low_res_logits"]

    def keep(*args, **kwargs):
        tested.append(build_model(*args, **kwargs)[0])
        return tested[-1], 16

    monkeypatch.setattr(test_program, "build_model", keep)
    test_program.main(["--config", str(run), "--volume_path", str(data)])
    assert json.loads((run / "test" / "results.json").read_text())["cases"]
    args = parse_args(
        parser_of_test(), ["--lora_ckpt", str(adapter), "--ckpt", str(base), "--device", "cpu"]
    )
    rebuilt = build_model(args, torch.device("cpu"))[0].eval()
    assert torch.equal(rebuilt(IMAGES)["low_res_logits"], expected)
    assert rebuilt.updates == tested[0].updates == trained[-1].updates

    capsys.readouterr()
    adapter_tool.main(["show", str(adapter)])
    words = " ".join(settings["lora_targets"])
    assert f"network: --lora_targets {words}" in capsys.readouterr().out
    plain = tmp_path / "merged.pth"
    adapter_tool.main(["merge", str(plain), "--lora_ckpt", str(adapter), "--ckpt", str(base)])
    sam = tiny_sam(num_classes=8).eval()
    sam.load_state_dict(torch.load(plain, weights_only=True))
    found = sam(IMAGES)["low_res_logits"]
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    safe = tmp_path / "adapter.safetensors"
    adapter_tool.main(["convert", str(adapter), str(safe)])
    assert read_adapter(safe)[1] == settings


def built_for(adapter: Path, *flags: str) -> torch.nn.Module:
    """Return the network of test.py for an adapter that holds every weight."""
    args = parse_args(
        parser_of_test(), ["--lora_ckpt", str(adapter), "--device", "cpu", "--rank", "2", *flags]
    )
    return build_model(args, torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--lora_targets k v", r"updates in other layers .*--lora_targets q v, --lora_blocks all"),
        ("--lora_targets lin2", "updates in other layers"),
        ("--lora_blocks first_half", "updates in other layers"),
        ("--lora_targets q v decoder", "variant sam_lora_image_encoder,"),
        ("--lora_alpha 7", "was trained with --lora_alpha as by default, not 7.0"),
        ("--logits 2", "was trained with --logits 1, not 2"),
    ],
)
def test_flags_that_contradict_an_adapter_are_refused(flags: str, told: str, tmp_path: Path):
    model = tiny_model()
    model.train_all_weights()
    known = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2}
    known |= {"lora_targets": ["q", "v"], "lora_blocks": ["all"]}
    model.save_lora_parameters(tmp_path / "a.pth", known)
    with pytest.raises(InputError, match=told):
        built_for(tmp_path / "a.pth", *flags.split())


def test_a_file_that_records_no_layers_has_the_published_ones(tmp_path: Path):
    tiny = ["--vit_name", "vit_tiny", "--img_size", "64", "--num_classes", "2"]
    for name, blocks in (("all", None), ("some", [1, 3])):
        model = samed.LoRA_Sam(tiny_sam(), 2, lora_layer=blocks)
        randomise_updates(model)
        model.train_all_weights()
        model.save_lora_parameters(tmp_path / f"{name}.pth")
        # what a script of the field chose by `lora_layer` has to be told
        flags = ["--lora_blocks", *map(str, blocks)] if blocks else []
        rebuilt = built_for(tmp_path / f"{name}.pth", *tiny, *flags).eval()
        assert torch.equal(rebuilt(IMAGES)["masks"], model.eval()(IMAGES)["masks"])
    with pytest.raises(InputError, match="was trained with --lora_targets q v, not k v"):
        built_for(tmp_path / "all.pth", *tiny, "--lora_targets", "k", "v")
    with pytest.raises(InputError, match="does not fit"):
        built_for(tmp_path / "all.pth", *tiny, "--lora_blocks", "1")


def test_samed_s_takes_targets_and_keeps_its_decoder():
    def layers(**choices) -> list[str]:
        return [row.layer for row in samed_s.LoRA_Sam(tiny_sam(), 2, **choices).updates]

    decoder = [layer for layer in layers() if layer.startswith("mask_decoder.")]
    assert len(decoder) == 14
    assert layers(targets=["decoder"]) == decoder
    chosen = layers(targets=["proj", "decoder"], lora_layer=[2])
    assert chosen == ["image_encoder.blocks.2.attn.proj", *decoder]


@pytest.mark.parametrize("places", [{"targets": ("q", "k")}, {"lora_layer": [0, 1]}])
def test_a_file_without_settings_records_places_that_are_not_the_published(
    places: dict, tmp_path: Path
):
    """As scripts of the field save it, where nothing else tells them."""
    others = {"lora_layer": [2, 3]} if "lora_layer" in places else {}
    samed.LoRA_Sam(tiny_sam(), 2, **places).save_lora_parameters(tmp_path / "a.pth")
    with pytest.raises(InputError, match="other layers"):
        samed.LoRA_Sam(tiny_sam(), 2, **others).load_lora_parameters(tmp_path / "a.pth")
    samed.LoRA_Sam(tiny_sam(), 2, **places).load_lora_parameters(tmp_path / "a.pth")
    samed.LoRA_Sam(tiny_sam(), 2).save_lora_parameters(tmp_path / "published.pth")
    assert read_adapter(tmp_path / "published.pth")[1] == {}
