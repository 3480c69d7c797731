"""Files of weights that PyTorch opens but that hold something else end in one sentence."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_sam

from common.errors import InputError
from common.files import load_arrays
from common.state_dicts import unwrapped
from common.tensors import load_tensors, plain_tensors
from config.flags import predict_parser
from config.run_folder import differences
from config.settings import parse_args
from lora.adapter_file import SETTINGS_KEY, read_adapter
from segment_anything.base_weights import fingerprint, read_base_weights, same_base
from tools import adapter as adapter_tool
from utils import build_model

WIDTHS = {"vit_tiny": (192, 4)}
PATCHES = "image_encoder.patch_embed.proj.weight"


def quantised(w: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(w: torch.Tensor) -> torch.Tensor:
        w = w.clone()
        w.view(-1)[w.numel() // 2] = value
        return w

    return fill


# What a weight may become, and what the sentence says about it.
ODD = {
    "sparse": (lambda w: w.to_sparse(), "layout torch.sparse_coo"),
    "csr": (lambda w: w.flatten(1).to_sparse_csr(), "layout torch.sparse_csr"),
    "nested": (lambda w: torch.nested.nested_tensor([w, w]), "is a nested tensor"),
    "meta": (lambda w: w.to("meta"), "device meta"),
    "quantised": (quantised, "qint8"),
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "whole numbers": (lambda w: w.to(torch.int64), "int64"),
    "bool": (lambda w: w > 0, "bool"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "float8"),
    "NaN": (filled(float("nan")), "NaN, infinite"),
    "infinite": (filled(float("-inf")), "NaN, infinite"),
    "beyond 32 bits": (lambda w: filled(1e300)(w.double()), "beyond 32 bits"),
    "empty": (lambda w: w[:0], "an empty tensor"),
    "4 TB by stride 0": (lambda w: torch.zeros(1).expand(10**6, 10**6), "claim to be tensors"),
    "an overlap": (lambda w: torch.zeros(2**14).as_strided((2**13, 2**13), (1, 1)), "claim to be"),
    "a number": (lambda w: 5.0, "a float"),
    "a list": (lambda w: [w], "a list"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that needs no base weights."""
    model = tiny_model()
    model.train_all_weights()
    path = tmp_path_factory.mktemp("adapter") / "a.pth"
    model.save_lora_parameters(
        path, {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2, "class_names": ["a", "b"]}
    )
    return path


def changed(adapter: Path, path: Path, change: dict[Any, Any], **settings: object) -> Path:
    state = torch.load(adapter, weights_only=True)
    state[SETTINGS_KEY] |= settings
    torch.save({**state, **change}, path)
    return path


def arguments(adapter: Path) -> list[str]:
    return ["--lora_ckpt", str(adapter), "--input", "i", "--output", "o", "--device", "cpu"]


def refused_by_the_tool(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as ended:
        adapter_tool.main(list(map(str, argv)))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and len(told) < 700
    return told


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_an_adapter_of_other_tensors_is_refused(kind: str, adapter: Path, tmp_path: Path, capsys):
    make, told = ODD[kind]
    for key in ("w_b_001", "mask_decoder.mask_tokens.weight"):
        w = torch.load(adapter, weights_only=True)[key]
        path = changed(adapter, tmp_path / "x.pth", {key: make(w)})
        with pytest.raises(InputError, match=told) as caught:
            read_adapter(path)
        assert "claim" in told or key in str(caught.value)
        assert told in refused_by_the_tool(capsys, "show", path)
        assert told in refused_by_the_tool(capsys, "convert", path, tmp_path / "y.safetensors")
        assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in ("a number", "a list")])
def test_base_weights_of_other_tensors_are_refused(kind: str, tmp_path: Path):
    make, told = ODD[kind]
    sam = tiny_sam().state_dict()
    for key in (PATCHES, "mask_decoder.mask_tokens.weight"):
        torch.save({**sam, key: make(sam[key])}, tmp_path / "b.pth")
        with pytest.raises(InputError) as caught:
            read_base_weights(tmp_path / "b.pth", name="vit_tiny", widths=WIDTHS, public=None)
        assert told in str(caught.value) or "holds an encoder of width" in str(caught.value)


@pytest.mark.parametrize(
    "key", [5, (1, 2), None, True, 1.5, "a\nb", "w\x1b[2J", "k" * 10_000, b"w"], ids=repr
)
def test_a_key_that_is_no_name_is_refused(key: object, adapter: Path, tmp_path: Path, capsys):
    path = changed(adapter, tmp_path / "x.pth", {key: torch.zeros(2)})
    told = refused_by_the_tool(capsys, "convert", path, tmp_path / "y.safetensors")
    assert "is no name of a tensor" in told and "\x1b" not in told


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4)])
def test_matrices_of_other_shapes_are_refused(shape: tuple[int, ...], adapter: Path, tmp_path):
    for key in ("w_a_000", "w_b_003", "mask_decoder.mask_tokens.weight"):
        path = changed(adapter, tmp_path / "x.pth", {key: torch.ones(shape)})
        with pytest.raises(InputError, match=key):
            args = parse_args(predict_parser(), arguments(path))
            build_model(args, torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("image_encoder.pos_embed", (4, 4, 192)),
        ("image_encoder.pos_embed", (1, 1, 1, 2**20)),  # at 64 × 64 it would take 16 GiB
        ("image_encoder.blocks.1.attn.rel_pos_h", ()),
        ("image_encoder.blocks.1.attn.rel_pos_h", (3, 3, 3)),
        ("image_encoder.blocks.1.attn.rel_pos_w", (3, 2**20)),
        ("image_encoder.neck.0.weight", ()),
        (PATCHES, ()),
    ],
)
def test_base_weights_of_other_shapes_are_refused(key: str, shape: tuple[int, ...], tmp_path):
    torch.save({**tiny_sam().state_dict(), key: torch.ones(shape)}, tmp_path / "b.pth")
    with pytest.raises(InputError):
        build_tiny(tmp_path / "b.pth")


def build_tiny(base: Path) -> str:
    """Return the fingerprint of base weights that a network was built from."""
    from segment_anything import sam_model_registry

    sam, _ = sam_model_registry["vit_tiny"](
        image_size=64, num_classes=2, checkpoint=base, pixel_mean=[0] * 3, pixel_std=[1] * 3
    )
    return sam.base_fingerprint


def test_names_may_share_memory_and_views_are_made_whole(adapter: Path, tmp_path: Path):
    state, settings = read_adapter(adapter)
    wide = torch.rand(4, 2 * state["w_a_000"].shape[1])
    both = {"w_a_000": wide[:2, ::2], "w_a_001": wide[:2, ::2]}
    path = changed(adapter, tmp_path / "x.pth", both)
    adapter_tool.main(["convert", str(path), str(tmp_path / "y.safetensors")])
    back = read_adapter(tmp_path / "y.safetensors")
    assert back[1] == settings
    assert all(torch.equal(back[0][key], value) for key, value in both.items())


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def laughing() -> list:
    """A list of 10^9 numbers in ten objects."""
    value: list = [1] * 10
    for _ in range(8):
        value = [value] * 10
    return value


ROUND: dict = {}
ROUND["a"] = ROUND
SETTINGS = {
    "a circle": ROUND,
    "tuples as keys": {(1, 2): 3},
    "a tensor": {"x": torch.zeros(2)},
    "bytes": {"x": b"a"},
    "NaN": {"x": float("nan")},
    "beyond 64 bits": {"x": 2**64},
    "many digits": {"x": 10**5000},
    "half a character": {"x": "\ud800"},
    "a set": {"x": {1}},
    "complex": {"x": 1j},
    "100 deep": {"x": deep(100)},
    "10^5 deep": {"x": deep(100_000)},
    "20 MB of text": {"x": "a" * 20_000_000},
    "a billion numbers in ten objects": {"x": laughing()},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_are_no_plain_values_are_refused(
    kind: str, adapter: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lora.adapter_file.LARGEST_SETTINGS", 2**20)
    try:
        path = changed(adapter, tmp_path / "x.pth", {SETTINGS_KEY: SETTINGS[kind]})
    except (RecursionError, UnicodeEncodeError):
        pytest.skip("Python cannot write such a file")
    told = refused_by_the_tool(capsys, "show", path)
    assert "settings that are no plain values" in told or "more than plain tensors" in told


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 10**11},
        {"rank": -1},
        {"rank": True},
        {"rank": [2]},
        {"img_size": 2**40},
        {"img_size": 16 * 10**6},
        {"img_size": 64.0},
        {"num_classes": 10**9},
        {"num_classes": "2"},
        {"vit_name": ["vit_tiny"]},
        {"vit_name": "vit_tiny\n"},
        {"module": "sam_lora_image_encoder\n"},
        {"spec": 5},
        {"spec": {"name": "x"}},
    ],
    ids=str,
)
def test_settings_of_impossible_values_are_refused(settings: dict, adapter: Path, tmp_path: Path):
    path = changed(adapter, tmp_path / "x.pth", {}, **settings)
    with pytest.raises(InputError):
        parse_args(predict_parser(), arguments(path))
    adapter_tool.main(["show", str(path)])  # It shows what can be shown.


@pytest.mark.parametrize(
    "settings",
    [
        {"class_names": [["a"], "b"]},
        {"class_names": "ab"},
        {"class_names": ["a\x1b[2J", "b"]},
        {"updates": {"a": 1}},
        {"code": [1]},
        {"trained_on": {"cases": [[[]]], "sizes": [[1, 1]]}},
        {"base_fingerprint": 5},
    ],
    ids=str,
)
def test_odd_settings_are_shown_without_control_characters(
    settings: dict, adapter: Path, tmp_path: Path, capsys
):
    path = changed(adapter, tmp_path / "x.pth", {}, **settings)
    adapter_tool.main(["show", str(path)])
    assert "\x1b" not in capsys.readouterr().out
    parse_args(predict_parser(), arguments(path))


def repacked(source: Path, path: Path, compression: int) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return path


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path, adapter: Path):
    torch.save({"w_a_000": torch.zeros(2, 2**20)}, tmp_path / "zeros.pth")
    bomb = repacked(tmp_path / "zeros.pth", tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"bomb.pth is not a readable.*records would take 8,"):
        load_tensors(bomb)
    repacked(adapter, tmp_path / "stored.pth", zipfile.ZIP_STORED)
    assert read_adapter(tmp_path / "stored.pth")[1] == read_adapter(adapter)[1]


def test_records_that_lie_on_each_other_are_refused(tmp_path: Path):
    """A thousand entries of the directory that all mean one record."""
    torch.save({"w_a_000": torch.rand(2, 2**16)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        record = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        archive.filelist += [record] * 1000
        archive.writestr("last", b"")
    with pytest.raises(InputError, match="records would take"):
        load_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"PK\x03\x04" + bytes(10_000), b"", b"\x80"])
def test_the_start_of_an_archive_is_no_archive(content: bytes, tmp_path: Path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pth"):
        load_tensors(tmp_path / "a.pth")


def test_a_checkpoint_of_the_older_format_opens(tmp_path: Path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert load_tensors(tmp_path / "a.pth")["w"].sum() == 3


def test_a_name_of_a_million_prefixes_takes_no_time():
    state = {"module." * 1_000_000 + "w": torch.zeros(1)}
    assert unwrapped(state).keys() != {"w"}
    assert unwrapped({"module._orig_mod.model.sam.w": 0 * torch.ones(1)}).keys() == {"w"}


def safetensors_file(path: Path, header: dict, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets", "size"),
    [
        ("F32", [2, 2**40], [0, 8], 8),
        ("F32", [2**33, 2**33], [0, 2**68], 8),
        ("F32", [2, 1], [0, 2**50], 8),
        ("F32", [2, 1], [8, 0], 8),
        ("F32", [2, -1], [0, 8], 8),
        ("I64", [1, 1], [0, 8], 8),
        ("F8_E4M3", [2, 4], [0, 8], 8),
        ("BOOL", [2, 4], [0, 8], 8),
        ("F32", [0, 4], [0, 0], 0),
        ("X9", [2, 1], [0, 8], 8),
    ],
)
def test_headers_of_safetensors_are_checked(dtype: str, shape: list, offsets, size: int, tmp_path):
    header = {"w_a_000": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    path = safetensors_file(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(InputError, match=r"a\.safetensors"):
        read_adapter(path)


def npz(path: Path, **headers: tuple[tuple[int, ...], str]) -> Path:
    """Write an `.npz` whose headers promise arrays, followed by four bytes each."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, (shape, kind) in headers.items():
            member = io.BytesIO()
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            archive.writestr(f"{key}.npy", member.getvalue() + bytes(4))
    return path


@pytest.mark.parametrize(
    ("shape", "kind", "told"),
    [
        ((20_000, 20_000), "<f4", "not a readable npz"),
        ((2**40, 2**40), "<f4", "not a readable npz"),
        ((4, 4), "<U100000000", "not a readable npz"),
        ((4, 4), "|O", "not a readable npz"),
    ],
)
def test_what_a_slice_states_is_checked_before_it_is_read(shape, kind: str, told: str, tmp_path):
    path = npz(tmp_path / "a.npz", image=(shape, kind), label=((4, 4), "<f4"))
    with pytest.raises(InputError, match=told):
        load_arrays(path, ("image", "label"))


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is packed to 1/1000 is known by its header, without memory for its values."""
    zeros = np.zeros((5000, 4000), np.float32)
    np.savez_compressed(tmp_path / "a.npz", image=zeros, label=zeros)
    monkeypatch.setattr("common.files.LARGEST_SLICE", 1 << 20)
    monkeypatch.setattr(np.lib.format, "read_array", None)  # reading values would be an error
    with pytest.raises(InputError, match=r"its image \(5000, 4000\) would take 80,000,000 bytes"):
        load_arrays(tmp_path / "a.npz", ("image", "label"), check=lambda *_: None)


def test_a_fingerprint_sees_every_weight_but_the_heads(tmp_path: Path):
    state = dict(tiny_sam().state_dict())
    torch.save(state, tmp_path / "b.pth")
    first = build_tiny(tmp_path / "b.pth")
    assert first == build_tiny(tmp_path / "b.pth") and len(first) == 32
    assert same_base(first, first[:16]) and same_base(first[:16], first)  # of an earlier version
    for key in ("image_encoder.blocks.3.mlp.lin2.bias", "image_encoder.pos_embed"):
        other = {**state, key: state[key] + 1e-3}
        assert fingerprint(other)[:16] == first[:16]
        assert not same_base(first, fingerprint(other)) and same_base(first, fingerprint(state))
    moved = state["image_encoder.neck.0.weight"] + 1e-3
    assert not same_base(first[:16], fingerprint({**state, "image_encoder.neck.0.weight": moved}))
    heads = "mask_decoder.mask_tokens.weight"
    assert fingerprint({**state, heads: state[heads] + 1}) == first
    assert not same_base(None, first) and same_base(None, None)


def test_a_run_goes_on_with_the_same_base_weights_only():
    """Earlier versions recorded the first half of the fingerprint."""
    neck, whole, other = "a" * 16, "a" * 16 + "1" * 16, "a" * 16 + "2" * 16

    def found(before: str, now: str) -> list[str]:
        flags = {"batch_size": 1, "n_gpu": 1, "code": {}, "same_code": False}
        return differences({**flags, "weights": before}, argparse.Namespace(**flags, weights=now))

    assert found(whole, whole) == found(neck, whole) == found(f"{neck} and b", f"{whole} and b")
    assert found(whole, whole) == found("none", "none") == []
    for before, now in ((other, whole), ("none", whole), (f"{neck} and b", f"{whole} and c")):
        assert found(before, now) == [f"weights {before} → {now}"]
    assert found(neck, f"{whole} and b") and found("", "none") and found("5", whole)


def test_an_adapter_remembers_all_of_its_base_weights(tmp_path: Path):
    model = tiny_model()
    model.sam.base_fingerprint = "a" * 16 + "1" * 16
    model.save_lora_parameters(tmp_path / "a.pth", settings={})
    for other, fits in (("a" * 16, True), ("a" * 16 + "2" * 16, False), (None, False)):
        model.sam.base_fingerprint = other
        if fits:
            model.load_lora_parameters(tmp_path / "a.pth")
            continue
        with pytest.raises(InputError, match="was trained on base weights"):
            model.load_lora_parameters(tmp_path / "a.pth")


def test_plain_tensors_are_returned_as_they_are():
    state = {"a": torch.rand(2, 3), "b": torch.nn.Parameter(torch.rand(3)), "c": torch.ones(())}
    found = plain_tensors(state, "file")
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert not any(value.requires_grad for value in found.values())
    assert found["a"].data_ptr() == state["a"].data_ptr()


def test_a_pickle_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for name in ("a.pth", "b.pth"):
        if name == "a.pth":
            torch.save({"w_a_000": Evil()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(pickle.dumps({"w_a_000": Evil()}))
        with pytest.raises(InputError, match=r"more than plain tensors|not a readable"):
            read_adapter(tmp_path / name)
    assert not (tmp_path / "ran").exists()
