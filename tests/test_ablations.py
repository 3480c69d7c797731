"""Common ablations as a user makes them: train, test and predict agree on the network.

A test edits the project the way a user does: a module of one's own beside the published variants, a
changed function, a new row of a table. Nothing may be lost or ignored in silence.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_sam, write_slices
from test_datasets import write_volume_h5
from torch import nn

import predict
import sam_lora_image_encoder
import test as test_program
import train
import trainer
import utils
from common.errors import InputError
from config import source_code
from config.flags import test_parser as parser_of_test
from config.settings import parse_args
from datasets.dataset_synapse import Synapse_dataset
from datasets.registry import SYNAPSE
from datasets.scans.volumes import Geometry, read_volume, write_volume
from evaluation.cpu_speed import PackedLinear, can_pack, pack_encoder
from evaluation.predict_volume import predict_volume
from lora import LoRAModel
from lora.adapter_file import read_adapter
from lora.layers import LoRALinear
from lora.variants import load_variant
from tools import adapter as adapter_tool
from training.losses import SegmentationLoss

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
# Every linear layer of an encoder block, with its number of equal output parts.
EVERYWHERE = """
from lora import LoRAModel, Update

LAYERS = (("attn.qkv", 3), ("attn.proj", 1), ("mlp.lin1", 1), ("mlp.lin2", 1))


def rows(blocks):
    places = [
        (f"image_encoder.blocks.{block}.{layer}", part, parts)
        for block in blocks
        for layer, parts in LAYERS
        for part in range(parts)
    ]
    return [
        Update(layer, part, parts, down=f"w_a_{index:03d}", up=f"w_b_{index:03d}")
        for index, (layer, part, parts) in enumerate(places)
    ]


class LoRA_Sam(LoRAModel):
    def __init__(self, sam_model, r):
        blocks = range(len(sam_model.image_encoder.blocks))
        super().__init__(sam_model, r, updates=rows(blocks), frozen=("image_encoder.",))
"""
LAST_HALF = """
import sam_lora_image_encoder


class LoRA_Sam(sam_lora_image_encoder.LoRA_Sam):
    def __init__(self, sam_model, r):
        depth = len(sam_model.image_encoder.blocks)
        super().__init__(sam_model, r, lora_layer=range(depth // 2, depth))
"""
FROZEN_DECODER = """
from lora import LoRAModel
from sam_lora_image_encoder import encoder_updates


class LoRA_Sam(LoRAModel):
    def __init__(self, sam_model, r):
        blocks = range(len(sam_model.image_encoder.blocks))
        super().__init__(
            sam_model,
            r,
            updates=encoder_updates(blocks),
            frozen=("image_encoder.", "mask_decoder."),
            not_saved=("image_encoder.",),
        )
"""
OWN_KEYS = """
from lora import LoRAModel, Update


class LoRA_Sam(LoRAModel):
    def __init__(self, sam_model, r):
        final = "mask_decoder.transformer.final_attn_token_to_image.k_proj"
        rows = [Update(final, 0, 1, down="final_k_a", up="final_k_b")]
        super().__init__(sam_model, r, updates=rows, frozen=("image_encoder.",))
"""
VARIANTS = {
    "everywhere": EVERYWHERE,
    "last_half": LAST_HALF,
    "frozen_decoder": FROZEN_DECODER,
    "own_keys": OWN_KEYS,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training slices, and a test volume."""
    folder = write_slices(tmp_path_factory.mktemp("data"))
    write_volume_h5(folder)
    (folder / "lists" / "test_vol.txt").write_text("case0001\n")
    return folder


@pytest.fixture
def variant(project: Path):
    """Write a module as a user puts it beside the published variants, and return its name."""

    def write(name: str) -> str:
        module = f"my_{name}"
        (project / f"{module}.py").write_text(VARIANTS[name])
        return module

    return write


def train_with(data: Path, output: Path, *flags: str) -> Path:
    """Train two steps and return the run folder."""
    short = ["--batch_size", "3", "--max_iterations", "2", "--AdamW", "--base_lr", "0.05"]
    train.main(["--root_path", str(data), "--output", str(output), *TINY_FLAGS, *short, *flags])
    return max(output.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def network_of(adapter: Path, *flags: str) -> LoRAModel:
    """Return the network that test.py and predict.py build from an adapter."""
    args = parse_args(parser_of_test(), ["--lora_ckpt", str(adapter), "--device", "cpu", *flags])
    return utils.build_model(args, torch.device("cpu"))[0].eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_train_test_and_predict_agree_on_a_variant_of_ones_own(
    name: str, variant, data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained = []
    step = trainer.training_step
    monkeypatch.setattr(
        trainer, "training_step", lambda model, *rest: trained.append(model) or step(model, *rest)
    )
    monkeypatch.chdir(tmp_path)
    folder = train_with(data, tmp_path / "out", "--module", variant(name), "--ckpt", str(base))
    adapter = folder / "epoch_0.pth"
    assert read_adapter(adapter)[1]["module"] == f"my_{name}"
    network = trained[-1].eval()
    expected = network(IMAGES)["low_res_logits"]
    reloaded = network_of(adapter, "--ckpt", str(base))
    assert torch.equal(reloaded(IMAGES)["low_res_logits"], expected)
    # what test.py and predict.py compute with: updates merged, weights packed
    randomise_updates(reloaded)
    plain = reloaded(IMAGES)["low_res_logits"]
    reloaded.merge()
    pack_encoder(reloaded)
    fast = reloaded(IMAGES)["low_res_logits"]
    assert (fast - plain).abs().max() <= 1e-4 * plain.abs().max()

    flags = ["--lora_ckpt", str(adapter), "--ckpt", str(base), "--device", "cpu"]
    test_program.main(["--volume_path", str(data), "--output_dir", "tested", *flags])
    assert json.loads(Path("tested/results.json").read_text())["cases"]
    rng = np.random.default_rng(0)
    scan = rng.integers(-200, 300, (2, 40, 40)).astype(np.int16)
    write_volume("scan.nii.gz", scan, Geometry.unknown())
    predict.main(["--input", "scan.nii.gz", "--output", "predicted", *flags])
    found, _ = read_volume("predicted/scan.nii.gz")
    low, high = SYNAPSE.intensity.low, SYNAPSE.intensity.high
    unit = ((scan.clip(low, high) - low) / (high - low)).astype(np.float32)
    expected = predict_volume(network, unit, input_size=(224, 224), image_size=(64, 64))
    # merged and packed weights round differently, which may move a pixel between equal logits
    assert (found == expected).mean() > 0.999


@torch.no_grad()
def test_an_update_on_every_layer_changes_the_answer_and_survives_packing(variant):
    everywhere = load_variant(variant("everywhere"))
    sam = tiny_sam()
    plain = sam.eval()(IMAGES)["low_res_logits"]
    model = everywhere(sam, 2).eval()
    assert torch.equal(model(IMAGES)["low_res_logits"], plain)
    for layer, _ in sys.modules[everywhere.__module__].LAYERS:
        path = f"image_encoder.blocks.1.{layer}"
        updated = model.sam.get_submodule(path)
        nn.init.normal_(next(iter(updated.updates.values())).up.weight, std=0.5)
        changed = model(IMAGES)["low_res_logits"]
        assert not torch.allclose(changed, plain, rtol=0, atol=1e-5), path
        plain = changed
    model.merge()
    pack_encoder(model)
    if can_pack(torch.device("cpu")):
        assert isinstance(model.sam.image_encoder.blocks[1].mlp.lin1, PackedLinear)
    packed = model(IMAGES)["low_res_logits"]
    assert (packed - plain).abs().max() <= 1e-4 * plain.abs().max()


@torch.no_grad()
def test_a_layer_that_computes_something_else_is_not_packed():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2).eval()
    block = model.sam.image_encoder.blocks[0]
    doubled = Doubled(192, 768)
    doubled.load_state_dict(block.mlp.lin1.state_dict())
    block.mlp.lin1 = doubled
    expected = model(IMAGES)["low_res_logits"]
    model.merge()
    pack_encoder(model)
    found = model(IMAGES)["low_res_logits"]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_updates_of_other_blocks_are_refused(tmp_path: Path):
    first, last = (
        sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2, lora_layer=blocks)
        for blocks in ([0, 1], [2, 3])
    )
    first.save_lora_parameters(tmp_path / "a.pth", settings={})
    before = {key: value.clone() for key, value in last.state_dict().items()}
    with pytest.raises(InputError, match=r"updates in other layers.*blocks\.0.*blocks\.2"):
        last.load_lora_parameters(tmp_path / "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in last.state_dict().items())


@pytest.mark.slow
def test_the_last_half_of_the_blocks_is_restored_in_its_places(
    variant, data: Path, base: Path, tmp_path: Path
):
    folder = train_with(
        data, tmp_path / "out", "--module", variant("last_half"), "--ckpt", str(base)
    )
    _, settings = read_adapter(folder / "epoch_0.pth")
    blocks = {row[0].split(".")[2] for row in settings["updates"]}
    assert blocks == {"2", "3"}
    network = network_of(folder / "epoch_0.pth", "--ckpt", str(base))
    layers = [isinstance(block.attn.qkv, LoRALinear) for block in network.sam.image_encoder.blocks]
    assert layers == [False, False, True, True]
    with pytest.raises(InputError, match="variant my_last_half"):
        network_of(
            folder / "epoch_0.pth", "--ckpt", str(base), "--module", "sam_lora_image_encoder"
        )


def test_a_variant_that_trains_what_it_does_not_save_is_refused():
    sam = tiny_sam()
    rows = sam_lora_image_encoder.encoder_updates(range(4))
    with pytest.raises(InputError, match=r"trains .* parameters that its adapter file does not"):
        LoRAModel(
            sam,
            2,
            updates=rows,
            frozen=("image_encoder.blocks.",),
            not_saved=("image_encoder.",),
        )


def test_a_parameter_that_is_added_later_is_refused_before_training(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Scaled(sam_lora_image_encoder.LoRA_Sam):
        def __init__(self, sam_model, r) -> None:
            super().__init__(sam_model, r)
            self.scale = nn.Parameter(torch.ones(()))

    monkeypatch.setattr(sam_lora_image_encoder, "LoRA_Sam", Scaled)
    with pytest.raises(InputError, match="first scale"):
        train_with(data, tmp_path / "out", "--ckpt", str(base))
    assert not (tmp_path / "out").exists()


def test_an_edited_update_is_used_everywhere(monkeypatch: pytest.MonkeyPatch):
    """A scale in `low_rank` reaches the forward pass, merging and packing."""
    model = sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2).eval()
    randomise_updates(model)
    with torch.no_grad():
        before = model(IMAGES)["low_res_logits"]
        low_rank = LoRALinear.low_rank

        def scaled(self: LoRALinear) -> tuple[torch.Tensor, torch.Tensor]:
            down, up = low_rank(self)
            return down, 0.25 * up

        monkeypatch.setattr(LoRALinear, "low_rank", scaled)
        expected = model(IMAGES)["low_res_logits"]
        assert not torch.allclose(expected, before, rtol=0, atol=1e-4)
        model.merge()
        merged = model(IMAGES)["low_res_logits"]
        pack_encoder(model)
        packed = model(IMAGES)["low_res_logits"]
    for found in (merged, packed):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch):
    """Pretend that a source file was edited, as its fingerprint shows."""
    fingerprint = source_code.fingerprint_code

    def edit(file: str = "training/losses.py") -> None:
        changed = lambda module: fingerprint(module) | {file: "00000000"}  # noqa: E731
        monkeypatch.setattr("config.settings.fingerprint_code", changed)

    return edit


@pytest.mark.slow
def test_an_edited_script_is_not_taken_for_the_old_run(
    edited, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    first = train_with(data, tmp_path / "out")
    edited()
    again = train_with(data, tmp_path / "out", "--resume", "auto")
    assert again != first and (again / "epoch_0.pth").is_file()
    assert "source code (training/losses.py" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"source code \(training/losses\.py.*--same_code"):
        train.main(["--resume", str(first)])
    train.main(["--resume", str(first), "--same_code", "--max_iterations", "4"])
    records = map(json.loads, (first / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if "loss" in record] == [0, 1, 2, 3]


@pytest.mark.slow
def test_test_and_predict_warn_of_edited_code(
    edited, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = train_with(data, tmp_path / "out")
    flags = ["--config", str(folder), "--volume_path", str(data)]
    test_program.main(flags)
    assert "source code" not in capsys.readouterr().err
    edited("lora/layers.py")
    test_program.main(flags)
    told = capsys.readouterr().err
    assert "was trained with other source code; changed since: lora/layers.py" in told
    test_program.main([*flags, "--same_code"])
    assert "source code" not in capsys.readouterr().err


def test_only_code_counts_not_comments_docstrings_or_formatting(tmp_path: Path):
    (tmp_path / "training").mkdir()
    file = tmp_path / "training" / "losses.py"
    file.write_text('"""Doc."""\n\n\ndef loss(a, b):\n    """Doc."""\n    return a + b\n')
    before = source_code.fingerprint_code("none", tmp_path)
    assert list(before) == ["training/losses.py"]
    file.write_text('"""Other."""\n# why\ndef loss(\n    a, b\n):\n    return (a + b)\n')
    assert source_code.changed_files(before, source_code.fingerprint_code("none", tmp_path)) == []
    file.write_text("def loss(a, b):\n    return a - b\n")
    changed = source_code.changed_files(before, source_code.fingerprint_code("none", tmp_path))
    assert changed == ["training/losses.py"]
    assert source_code.changed_files(None, before) == []
    assert source_code.changed_files({1: "a"}, before) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("g(f(a), b)", "g(f(a, b))"),
        ("g(f(a), k=1)", "g(f(a, k=1))"),
        ("if a:\n    g()\nh()", "if a:\n    g()\n    h()"),
        ("for x in y:\n    pass\nelse:\n    z()", "for x in y:\n    pass\n    z()"),
        ("x = 1", "x = 1.0"),
        ("a - b", "b - a"),
    ],
)
def test_a_moved_bracket_or_indentation_is_an_edit(before: str, after: str, tmp_path: Path):
    prints = []
    for source in (before, after):
        (tmp_path / "code.py").write_text(source)
        prints.append(source_code.fingerprint_file(tmp_path / "code.py"))
    assert prints[0] != prints[1]


def test_a_network_is_built_from_flags_that_know_no_code(tmp_path: Path):
    sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2).save_lora_parameters(tmp_path / "a.pth")
    flags = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2, "ckpt": "none", "rank": 2}
    flags |= {"module": "sam_lora_image_encoder", "lora_ckpt": str(tmp_path / "a.pth")}
    torch.save(tiny_sam().state_dict(), tmp_path / "base.pth")
    args = argparse.Namespace(**flags | {"ckpt": str(tmp_path / "base.pth")})
    assert utils.build_model(args, torch.device("cpu"))[1] == 16


@pytest.mark.parametrize(
    "settings",
    [
        {"module": None},
        {"vit_name": None},
        {"rank": None},
        {"img_size": "64"},
        {"updates": [1]},
        {"updates": [[]]},
        {"code": 5},
        {"code": {1: "a"}},
    ],
)
def test_impossible_settings_end_in_a_sentence(settings: dict, tmp_path: Path):
    model = sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2)
    model.train_all_weights()
    good = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2}
    path = tmp_path / "a.pth"
    model.save_lora_parameters(path, good)
    state = torch.load(path, weights_only=True)
    state["samed_settings"] |= settings
    torch.save(state, path)
    adapter_tool.main(["show", str(path)])
    if "code" in settings:
        network_of(path)
    else:
        with pytest.raises(InputError):
            network_of(path)


def test_a_variant_counts_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_scale.py").write_text("SCALE = 1\n")
    (tmp_path / "my_scaled.py").write_text("import torch\nfrom my_scale import SCALE\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "my_scaled", import_module("my_scaled"))
    before = source_code.fingerprint_code("my_scaled")
    assert {"my_scaled.py", "my_scale.py", "sam_lora_image_encoder.py"} <= before.keys()
    (tmp_path / "my_scale.py").write_text("SCALE = 2\n")
    after = source_code.fingerprint_code("my_scaled")
    assert source_code.changed_files(before, after) == ["my_scale.py"]


@pytest.mark.slow
def test_a_note_enters_the_name_and_tells_runs_apart(data: Path, tmp_path: Path):
    plain = train_with(data, tmp_path / "out")
    noted = train_with(data, tmp_path / "out", "--note", "focal", "--resume", "auto")
    assert noted != plain and noted.name.endswith("_focal")
    with pytest.raises(InputError, match="--note"):
        train_with(data, tmp_path / "out", "--note", "../x")


def test_parts_draw_the_same_dropout_in_both_passes():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, images: torch.Tensor, full_size_masks: bool) -> dict[str, torch.Tensor]:
            assert not full_size_masks
            hidden = nn.functional.dropout(self.layer(images), 0.5, training=True)
            return {"low_res_logits": nn.functional.avg_pool2d(hidden, 4)}

    model = Dropping()
    batch = {"image": torch.rand(5, 3, 16, 16), "low_res_label": torch.randint(0, 3, (5, 4, 4))}
    criterion = SegmentationLoss(3, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    torch.manual_seed(3)
    options = trainer.StepOptions(at_once=2)
    terms, _ = trainer.training_step(model, batch, criterion, optimizer, 0, options)
    in_parts = model.layer.weight.grad.clone()
    after = torch.rand(())
    # the same draws with all parts in one graph
    torch.manual_seed(3)
    logits = [model(part, False)["low_res_logits"] for part in batch["image"].split(2)]
    expected = criterion(torch.cat(logits), batch["low_res_label"])["loss"]
    model.zero_grad()
    expected.backward()
    assert terms["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert torch.allclose(in_parts, model.layer.weight.grad, rtol=1e-4, atol=1e-7)
    assert torch.rand(()) == after  # later steps draw as if there had been one pass


@pytest.mark.slow
def test_a_new_row_of_encoders_trains_tests_and_predicts(data: Path, tmp_path: Path):
    """One edit of the table, in a copy of the project, is enough for all programs."""
    copy = tmp_path / "project"
    for folder in (*source_code.FOLDERS, "prediction", "preprocess"):
        shutil.copytree(REPOSITORY / folder, copy / folder)
    for file in REPOSITORY.glob("*.py"):
        shutil.copy(file, copy)
    table = copy / "segment_anything" / "build_sam.py"
    row = '    "vit_small": EncoderSpec(width=96, depth=2, heads=2, global_blocks=(1,)),\n'
    table.write_text(table.read_text().replace("ENCODERS = {\n", f"ENCODERS = {{\n{row}", 1))
    scan = np.full((2, 40, 40), -100, np.int16)
    write_volume(tmp_path / "scan.nii.gz", scan, Geometry.unknown())

    def run(program: str, *flags: str) -> None:
        command = [sys.executable, str(copy / program), "--device", "cpu", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr

    encoder = ["--vit_name", "vit_small", "--ckpt", "none", "--img_size", "64", "--rank", "2"]
    recipe = ["--batch_size", "3", "--n_gpu", "1", "--max_iterations", "2", "--AdamW"]
    run("train.py", "--root_path", str(data), "--output", "out", *encoder, *recipe)
    (folder,) = (tmp_path / "out").iterdir()
    assert "vit_small" in folder.name
    run("test.py", "--config", str(folder), "--volume_path", str(data))
    adapter = str(folder / "epoch_0.pth")
    run("predict.py", "--input", "scan.nii.gz", "--lora_ckpt", adapter, "--output", "segmented")
    assert (folder / "test" / "results.json").is_file()
    assert (tmp_path / "segmented" / "scan.nii.gz").is_file()


@pytest.mark.slow
def test_neighbouring_slices_as_channels_by_one_edit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """2.5-D input: one edit of `Synapse_dataset.read` feeds train.py and test.py alike."""
    read = Synapse_dataset.read
    seen = set()

    def with_neighbours(self: Synapse_dataset, index: int) -> dict:
        sample = read(self, index)
        image = sample["image"]
        if image.ndim == 3:  # a volume: its neighbours are its own slices
            above, below = (np.concatenate([image[:1], image[:-1]]),
                            np.concatenate([image[1:], image[-1:]]))  # fmt: skip
            sample["image"] = np.stack([above, image, below], axis=1)
        else:
            names = self.sample_list
            near = [max(index - 1, 0), index, min(index + 1, len(names) - 1)]
            sample["image"] = np.stack([read(self, i)["image"] for i in near])
        seen.add((self.split, sample["image"].shape))
        return sample

    monkeypatch.setattr(Synapse_dataset, "read", with_neighbours)
    folder = train_with(data, tmp_path / "out", "--no_augment")
    test_program.main(["--config", str(folder), "--volume_path", str(data)])
    assert {shape[-3] for _, shape in seen} == {3}
    assert {split for split, _ in seen} == {"train", "test_vol"}
    assert (folder / "test" / "results.json").is_file()
