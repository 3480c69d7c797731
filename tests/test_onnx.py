"""Networks as ONNX files: the same numbers as PyTorch, for every form of network, and no trust."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise_updates
from onnx_by_hand import write_onnx
from real_data import REAL_DATA, needs_real_data

onnx = pytest.importorskip("onnx", reason="see requirements-onnx.txt")
pytest.importorskip("onnxruntime", reason="see requirements-onnx.txt")
pytest.importorskip("onnxscript", reason="see requirements-onnx.txt")

import predict  # noqa: E402
from common.errors import InputError  # noqa: E402
from config.flags import train_parser  # noqa: E402
from config.parser import Parser  # noqa: E402
from config.settings import adapter_settings, complete, parse_args, prediction_key  # noqa: E402
from datasets.registry import SYNAPSE  # noqa: E402
from evaluation.onnx_network import OnnxNetwork, read_onnx_settings  # noqa: E402
from segment_anything import ENCODERS  # noqa: E402
from tools import export, onnx_check  # noqa: E402
from utils import build_model  # noqa: E402

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Published; and all that changes the network, at a size whose windows are cut and padded.
NETWORKS = {
    "published": "--img_size 64",
    "every knob": "--img_size 256 --lora_kind dora --decoder_depth 4 --logits 2 --input_slices 3 "
    "--lora_targets q lin1 --module sam_lora_image_encoder_mask_decoder --num_classes 3",
}


def small_encoder(patch: pytest.MonkeyPatch) -> None:
    """Make vit_tiny shorter: a block with windows and one without, for faster exports."""
    patch.setitem(ENCODERS, "vit_tiny", replace(ENCODERS["vit_tiny"], depth=2, global_blocks=(1,)))


@pytest.fixture(scope="module", params=NETWORKS, ids=str)
def files(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """An adapter with all weights, and its network as ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    adapter, file = folder / "adapter.pth", folder / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        small_encoder(patch)
        words = f"--vit_name vit_tiny --ckpt none --rank 2 {NETWORKS[request.param]}".split()
        args = complete(train_parser().parse_args(words))
        model, _ = build_model(args, CPU)
        randomise_updates(model)
        spec = replace(SYNAPSE, size=48)
        spec = spec if args.num_classes == 8 else spec.of_plain_classes(args.num_classes)
        args.spec, args.code = spec.to_json(), {}
        model.save_lora_parameters(adapter, adapter_settings(args))
        export.main([str(adapter), str(file)])
        yield adapter, file


def network_of(adapter: Path) -> tuple[torch.nn.Module, int]:
    """Return PyTorch's network of an adapter, and the side of its input."""
    args = parse_args(export.build_parser(), [str(adapter), "none.onnx"])
    model, _ = build_model(args, CPU)
    model.eval().merge()
    return model, args.img_size


@pytest.mark.parametrize("count", [1, 3, 7])
def test_any_number_of_images_gives_the_logits_of_pytorch(files: tuple[Path, Path], count: int):
    model, side = network_of(files[0])
    images = torch.rand(count, 3, side, side)
    with torch.no_grad():
        expected = model(images, True, side)
    found = OnnxNetwork(files[1], CPU)(images, True, side)
    for name in ("low_res_logits", "masks"):
        assert found[name].shape == expected[name].shape
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-4)


def test_the_file_tells_what_it_is_and_nothing_of_this_machine(files: tuple[Path, Path]):
    model = onnx.load(files[1])
    told = {entry.key: entry.value for entry in model.metadata_props}
    settings = read_onnx_settings(files[1])
    assert json.loads(told["samed_settings"]) == settings
    assert json.loads(told["classes"]) == ["background", *settings["class_names"]]
    assert told["intensity"] == str(SYNAPSE.intensity) and told["samed_opset"] == "18"
    assert [entry.version for entry in model.opset_import] == [export.OPSET]
    assert {node.domain for node in model.graph.node} == {""}
    assert str(Path.cwd()).encode() not in files[1].read_bytes()
    onnx.checker.check_model(model, full_check=True)


def test_half_precision_is_half_the_size_and_within_its_bounds(files: tuple[Path, Path]):
    model, side = network_of(files[0])
    images = onnx_check.phantom_images(side)
    with torch.no_grad():
        logits = model(images)["low_res_logits"]
    half = export.in_half(onnx.load(files[1]))
    file = files[1].with_name("half.onnx")
    file.write_bytes(half.SerializeToString())
    assert file.stat().st_size < 0.6 * files[1].stat().st_size
    found = onnx_check.difference(OnnxNetwork(file, CPU), images, logits, onnx_check.HALF)
    onnx_check.require_within(found, onnx_check.HALF, file)
    assert found.logits > 1e-5  # it is another precision
    assert read_onnx_settings(file) == read_onnx_settings(files[1])


def test_another_network_does_not_pass_the_check(files: tuple[Path, Path]):
    model, side = network_of(files[0])
    images = onnx_check.phantom_images(side)
    with torch.no_grad():
        logits = model(images)["low_res_logits"]
    network = OnnxNetwork(files[1], CPU)
    found = onnx_check.difference(network, images, logits, onnx_check.FULL)
    onnx_check.require_within(found, onnx_check.FULL, files[1])
    for wrong in (logits + 3e-4 * max(1, float(logits.abs().max())), logits.flip(1)):
        found = onnx_check.difference(network, images, wrong, onnx_check.FULL)
        with pytest.raises(InputError, match="was not written"):
            onnx_check.require_within(found, onnx_check.FULL, files[1])


def test_a_file_that_fails_its_check_is_not_written(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def wrong_half(proto):
        for tensor in proto.graph.initializer:
            if len(tensor.dims) == 2:
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(0.5 * array, tensor.name))
        return proto

    monkeypatch.setattr(export, "to_onnx", lambda *_: onnx.load(files[1]))
    monkeypatch.setattr(export, "in_half", wrong_half)
    with pytest.raises(InputError, match="was not written"):
        export.main([str(files[0]), str(tmp_path / "new.onnx"), "--fp16"])
    assert not list(tmp_path.iterdir())


@needs_real_data
def test_predict_gives_the_labels_of_the_adapter(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scan = sorted((REAL_DATA / "ct").rglob("*.nii.gz"))[0]
    common = ["--input", str(scan), "--device", "cpu", "--batch_size", "4"]
    predict.main([*common, "--lora_ckpt", str(files[0]), "--output", str(tmp_path / "torch")])
    monkeypatch.setattr(predict, "build_model", None)  # no network of PyTorch is built
    predict.main([*common, "--onnx", str(files[1]), "--output", str(tmp_path / "onnx")])
    labels = [read_labels(tmp_path / name) for name in ("torch", "onnx")]
    assert len(np.unique(labels[0])) > 1
    # Float32 rounds in another order, so labels may differ where two logits are equal to 1e-4.
    assert (labels[0] != labels[1]).mean() < 1e-4


def read_labels(folder: Path) -> np.ndarray:
    """Return the labels of the only case in a folder of predict.py."""
    import nibabel

    (file,) = (path for path in folder.glob("*.nii.gz"))
    return np.asarray(nibabel.load(file).dataobj)


def test_a_replaced_file_of_the_same_name_is_another_network(tmp_path: Path):
    file, spec = tmp_path / "model.onnx", replace(SYNAPSE, size=48).to_json()
    words = ["--input", "scan.nii.gz", "--output", "out", "--onnx", str(file)]

    def key() -> dict:
        return prediction_key(parse_args(_predict_parser(), words))

    write_onnx(file, spec)
    first = key()
    assert key() == first
    file.rename(tmp_path / "other.onnx")
    words[-1] = str(tmp_path / "other.onnx")
    assert key() == first  # the content counts, not the name
    write_onnx(tmp_path / "other.onnx", spec, operator="ConvTranspose")
    assert key() != first


def _predict_parser() -> Parser:
    return predict.predict_parser()


def test_weights_in_other_files_are_never_opened(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(9 * 3 * 16 * 4))
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "beside").write_bytes(secret.read_bytes())
    for place in ("../secret", str(secret), "beside"):
        write_onnx(folder / "model.onnx", SYNAPSE.to_json(), weights=place)
        with pytest.raises(InputError, match="keeps weights in another file"):
            read_onnx_settings(folder / "model.onnx")


def test_a_file_is_what_its_content_says_not_its_name(tmp_path: Path):
    """The runtime reads protobuf alone, so what is looked through must be the same."""
    write_onnx(tmp_path / "model.json", SYNAPSE.to_json())
    assert read_onnx_settings(tmp_path / "model.json")["num_classes"] == 8
    model = onnx.load(tmp_path / "model.json", "protobuf")
    onnx.save(model, tmp_path / "text.textproto")
    with pytest.raises(InputError, match="not a readable ONNX file"):
        read_onnx_settings(tmp_path / "text.textproto")


def test_a_gpu_needs_the_runtime_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import onnxruntime

    write_onnx(tmp_path / "model.onnx", SYNAPSE.to_json())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    from evaluation.onnx_network import open_session

    with pytest.raises(InputError, match="install onnxruntime-gpu"):
        open_session(tmp_path / "model.onnx", torch.device("cuda:0"))


def test_slices_of_an_unrecorded_size_have_that_of_the_input(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    args = parse_args(export.build_parser(), [str(files[0]), "none.onnx"])
    spec, proto = export.dataset_spec(args), onnx.load(files[1])
    monkeypatch.setattr(export, "dataset_spec", lambda _: replace(spec, size=None))
    export.describe(proto, args)
    (told,) = [one.value for one in proto.metadata_props if one.key == "training_slices"]
    assert told == f"{args.img_size} pixels, then resized to {args.img_size}"


def test_a_run_folder_stands_for_its_newest_adapter_also_beside_its_config(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"program": "SAMed", "rank": 4}')
    for epoch in (9, 10):
        (tmp_path / f"epoch_{epoch}.pth").touch()
    run, newest, parser = str(tmp_path), str(tmp_path / "epoch_10.pth"), export.build_parser()
    config = ["--config", run]
    for words, expected in (
        ([run, "m.onnx"], [newest, "m.onnx", *config]),
        ([*config, run, "m.onnx"], [*config, newest, "m.onnx"]),
        ([run, "m.onnx", *config], [newest, "m.onnx", *config]),
    ):
        assert export.of_newest_adapter(words, parser.parse_args(words)) == expected


def test_an_absent_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = "run: pip install -r requirements-onnx.txt"
    with pytest.raises(InputError, match=told):
        read_onnx_settings(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=told):
        export.main([str(tmp_path / "adapter.pth"), str(tmp_path / "model.onnx")])


def test_networks_beyond_one_file_are_refused(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export, "LARGEST_FILE", export.GRAPH + 1000)
    with pytest.raises(InputError, match="one ONNX file holds 1,000 at most"):
        export.main([str(files[0]), str(tmp_path / "new.onnx")])


def test_a_network_that_cannot_be_followed_is_refused():
    class Doubtful(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * 2 if images.sum() > 0 else images

    with pytest.raises(InputError, match="--module mine as ONNX"):
        export.to_onnx(Doubtful(), torch.rand(2, 3, 64, 64), "mine")
