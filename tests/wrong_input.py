"""A table of wrong input: how to produce it, and a part of the error message.

`python tests/wrong_input.py` writes docs/errors.md from the table; `test_wrong_input.py` runs every
row.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from conftest import TINY_FLAGS, tiny_model  # noqa: E402
from onnx_by_hand import write_onnx  # noqa: E402
from test_scans import placed, volume, write_dicom  # noqa: E402
from test_segmentations import slicer_file  # noqa: E402

import ablate  # noqa: E402
import demo  # noqa: E402
import predict  # noqa: E402
import test as test_program  # noqa: E402
import train  # noqa: E402
from common.errors import exit_on_bad_input  # noqa: E402
from datasets.scans.volumes import Geometry, read_volume, write_volume  # noqa: E402
from evaluation import __main__ as report  # noqa: E402
from evaluation.metrics import compare_volume  # noqa: E402
from evaluation.tables import CaseResult, write_json  # noqa: E402
from preprocess import prepare  # noqa: E402
from samed import __main__ as samed_program  # noqa: E402
from tools import adapter, clicks, export  # noqa: E402

PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "preprocess.prepare": prepare.main,
    "train.py": train.main,
    "test.py": test_program.main,
    "predict.py": predict.main,
    "evaluation": report.main,
    "tools.adapter": adapter.main,
    "tools.export": export.main,
    "ablate.py": ablate.main,
    "demo.py": demo.demo_args,  # all that it checks before it opens the page
    "tools.clicks": clicks.main,
    "python -m samed": samed_program.chosen,
}
GOOD_FLAGS = {
    "demo.py": ["--lora_ckpt", "adapter.pth"],
    "evaluation": ["tested"],
    "tools.adapter": ["convert", "adapter.pth", "new.safetensors"],
    "python -m samed": ["tools.adapter"],
    "tools.export": ["adapter.pth", "new.onnx"],
}
USUAL_FLAGS = {
    "preprocess.prepare": "--input raw --output new --workers 1".split(),
    "train.py": ["--root_path", "data", "--output", "out", "--max_epochs", "1", *TINY_FLAGS],
    "test.py": ("--volume_path data --lora_ckpt adapter.pth --output_dir out --device cpu".split()),
    "predict.py": ("--input scan.nii.gz --lora_ckpt adapter.pth --output out --device cpu".split()),
    "tools.clicks": (
        "--volume_path data --lora_ckpt adapter.pth --output out --device cpu --clicks 0 1".split()
    ),
    "ablate.py": "table.toml --root_path data --output out --device cpu --dry_run".split(),
}
ONNX = ("--onnx", "model.onnx")
TABLE = "title = 'Rank'\n[base]\nvit_name = 'vit_tiny'\nckpt = 'none'\nimg_size = 64\n"
SHAPE = (3, 12, 14)  # (D, H, W)


@dataclass(frozen=True)
class Wrong:
    """A mistake of a user."""

    program: str
    what: str
    spoil: Callable[[Path], Any]  # makes the mistake in a copy of the good folder
    told: str  # a part of the error message
    flags: tuple[str, ...] = ()

    @property
    def needs_onnx(self) -> bool:
        """Whether it needs the packages of requirements-onnx.txt."""
        return self.program == "tools.export" or "--onnx" in self.flags


def make_good(folder: Path) -> None:
    """Write valid input for every program: raw and prepared data, pictures, adapters, results."""
    rng = np.random.default_rng(0)
    raw = folder / "raw"
    for index in range(3):
        image = rng.integers(-1000, 500, SHAPE).astype(np.int16)
        label = rng.integers(0, 3, SHAPE).astype(np.uint8)
        write_volume(raw / "imagesTr" / f"s{index}_0000.nii.gz", image, placed("RAS"))
        write_volume(raw / "labelsTr" / f"s{index}.nii.gz", label, placed("RAS"))
    labels = {"background": 0, "liver": 1, "tumour": 2}
    told = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 3, "name": "Tiny"}
    (raw / "dataset.json").write_text(json.dumps(told))
    for kind in ("images", "labels"):
        (folder / "pictures" / kind).mkdir(parents=True)
        for index in range(3):
            picture = rng.integers(0, 3, (12, 14)).astype(np.uint8)
            Image.fromarray(picture).save(folder / "pictures" / kind / f"p{index}.png")
    with quiet():
        prepare.main(["--input", str(raw), "--output", str(folder / "data"), "--workers", "1"])
    model = tiny_model(num_classes=2)
    model.train_all_weights()
    spec = json.loads((folder / "data" / "dataset_spec.json").read_text())
    settings = {
        "vit_name": "vit_tiny",
        "img_size": 64,
        "num_classes": 2,
        "class_names": ["liver", "tumour"],
        "spec": spec,
    }
    model.save_lora_parameters(folder / "adapter.pth", settings)
    model.save_lora_parameters(folder / "between.pth", settings | {"input_slices": 3})
    del settings["spec"], settings["class_names"]
    model.save_lora_parameters(folder / "unnamed.pth", settings)  # without class names
    shutil.copy(raw / "imagesTr" / "s0_0000.nii.gz", folder / "scan.nii.gz")
    scores, counts = compare_volume(label, label, 2, (1.0, 1.0, 1.0))
    (folder / "tested").mkdir()
    (folder / "table.toml").write_text(f"{TABLE}[axes]\nrank = [1, 4]\n")
    results = [CaseResult("s2", scores, counts.tolist(), [])]
    settings = {"flags": {}, "environment": {}}
    write_json(folder / "tested" / "results.json", results, ["liver", "tumour"], settings, 2.0)


def arguments(row: Wrong, folder: Path) -> list[str]:
    """Return the command line of a row.

    Its flags follow the usual flags and replace them; a program without usual flags gets those of
    the row alone, and a row with `--onnx` no adapter.
    """
    if row.program not in USUAL_FLAGS:
        return list(row.flags) or GOOD_FLAGS[row.program]
    del folder
    usual = USUAL_FLAGS[row.program]
    if "--onnx" in row.flags:
        usual = [word for word in usual if word not in ("--lora_ckpt", "adapter.pth")]
    return [*usual, *row.flags]


def run(program: str, argv: list[str]) -> tuple[int, str]:
    """Run a program in this process and folder; return its exit code and stderr."""
    told = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            with exit_on_bad_input():
                PROGRAMS[program](argv)
        except SystemExit as stop:
            code = stop.code
    return int(code or 0), told.getvalue()


@contextlib.contextmanager
def quiet() -> Any:
    """Hide everything that is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def described(**changes: Any) -> Callable[[Path], None]:
    """Change entries of dataset.json."""

    def spoil(folder: Path) -> None:
        path = folder / "raw" / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def cut(name: str, share: float = 0.6) -> Callable[[Path], None]:
    """Cut a file short."""

    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return spoil


def listed(text: str) -> Callable[[Path], Any]:
    """Write a table of scans."""
    return lambda folder: (folder / "cases.csv").write_text(text)


def junk(name: str) -> Callable[[Path], None]:
    """Replace a file by nonsense."""
    return lambda folder: (folder / name).write_bytes(b"nothing of that kind")


def onnx(**changes: Any) -> Callable[[Path], None]:
    """Write model.onnx; `changes`: arguments of `write_onnx`."""

    def write(folder: Path) -> None:
        spec = json.loads((folder / "data" / "dataset_spec.json").read_text())
        write_onnx(folder / "model.onnx", spec, **changes)

    return write


def lost(name: str) -> Callable[[Path], None]:
    """Delete a file."""
    return lambda folder: (folder / name).unlink()


def table(text: str) -> Callable[[Path], None]:
    """Write another table of ablations, after its title and base flags."""
    return lambda folder: (folder / "table.toml").write_text(TABLE + text)


def raw(kind: str, array: np.ndarray, geometry: Geometry | None = None) -> Callable[[Path], None]:
    """Replace the first raw image or label."""
    name = "imagesTr/s0_0000.nii.gz" if kind == "image" else "labelsTr/s0.nii.gz"
    return lambda folder: write_volume(folder / "raw" / name, array, geometry or placed("RAS"))


def slices(**arrays: Any) -> Callable[[Path], None]:
    """Change arrays of the first training slice; None deletes an array."""

    def spoil(folder: Path) -> None:
        path = min((folder / "data" / "train_npz").iterdir())
        good = dict(np.load(path))
        np.savez(path, **{k: v for k, v in (good | arrays).items() if v is not None})

    return spoil


def stored(**arrays: Any) -> Callable[[Path], None]:
    """Change data sets or attributes of the test volume; None deletes a data set."""

    def spoil(folder: Path) -> None:
        path = next((folder / "data" / "test_vol_h5").iterdir())
        with h5py.File(path, "r+") as file:
            for key, value in arrays.items():
                if key in ("image", "label"):
                    del file[key]
                    if value is not None:
                        file[key] = value
                else:
                    file.attrs[key] = value

    return spoil


def nothing(folder: Path) -> None:
    """Leave the folder as it is; the flags of the row are wrong."""
    del folder


def scan(array: np.ndarray) -> Callable[[Path], None]:
    """Replace the scan to segment."""
    return lambda folder: write_volume(folder / "scan.nii.gz", array, placed("LPS"))


def pickled(folder: Path) -> None:
    """Write an adapter file that would run code when it is unpickled."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "pwned",))

    torch.save({"w_a_000": Evil()}, folder / "adapter.pth")


def list_of(text: str) -> Callable[[Path], None]:
    """Replace the list of training slices."""
    return lambda folder: (folder / "data" / "lists" / "train.txt").write_text(text)


def unnumbered_slice(folder: Path) -> None:
    """Rename the first training slice, so that its name tells no number."""
    path = min((folder / "data" / "train_npz").iterdir())
    path.rename(path.with_name("middle.npz"))
    list_of("middle\n")(folder)


def spec_of(**changes: Any) -> Callable[[Path], None]:
    """Change entries in the spec of the prepared data."""

    def spoil(folder: Path) -> None:
        path = folder / "data" / "dataset_spec.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def dicom(places: list[float]) -> Callable[[Path], None]:
    """Write a DICOM series with slices at these places."""
    return lambda folder: write_dicom(folder / "series", volume(), placed("LPS"), places) and None


def two_of_a_name(folder: Path) -> None:
    """Write a.mha and a.nii.gz into the same folder."""
    (folder / "in").mkdir()
    for name in ("a.mha", "a.nii.gz"):
        write_volume(folder / "in" / name, volume(), placed("LPS"))


def colour_labels(folder: Path) -> None:
    """Replace a mask by a colour picture."""
    Image.fromarray(np.full((12, 14, 3), (255, 0, 9), np.uint8)).save(
        folder / "pictures" / "labels" / "p0.png"
    )


def two_channels(folder: Path) -> None:
    """Give every picture a second channel."""
    for path in list((folder / "pictures" / "images").iterdir()):
        for channel in ("0000", "0001"):
            shutil.copy(path, path.with_stem(f"{path.stem}_{channel}"))
        path.unlink()


def jpeg_labels(folder: Path) -> None:
    """Save the masks as JPEG."""
    for path in list((folder / "pictures" / "labels").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


def grey_edges(folder: Path) -> None:
    """Scale the masks so that their edges become grey."""
    for path in (folder / "pictures" / "labels").iterdir():
        mask = Image.new("L", (40, 40))
        mask.paste(255, (9, 9, 27, 22))
        mask.resize((14, 12), Image.Resampling.BILINEAR).save(path)


def two_encodings(folder: Path) -> None:
    """Write the class as 1 in one mask and as 255 in the others."""
    for path in (folder / "pictures" / "labels").iterdir():
        mask = np.zeros((12, 14), np.uint8)
        mask[3:8, 3:8] = 1 if path.stem == "p0" else 255
        Image.fromarray(mask).save(path)


def stack(folder: Path) -> None:
    """Write a TIFF of three pages among the pictures."""
    path = folder / "pictures" / "images" / "p0.png"
    pages = [Image.open(path).copy() for _ in range(3)]
    path.unlink()
    pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])


def fractions(folder: Path) -> None:
    """Save the pictures with floating-point values."""
    for path in list((folder / "pictures" / "images").iterdir()):
        fraction = np.asarray(Image.open(path), np.float32) / 2
        Image.fromarray(fraction).save(path.with_suffix(".tif"))
        path.unlink()


def another_plane(folder: Path) -> None:
    """Store scan s0 as a sagittal stack beside the axial ones."""
    for kind, name in (("imagesTr", "s0_0000"), ("labelsTr", "s0")):
        path = folder / "raw" / kind / f"{name}.nii.gz"
        write_volume(path, read_volume(path)[0], placed("PIR"))


def table_without_a_picture(folder: Path) -> None:
    """Write a table of groups that lacks picture p2."""
    (folder / "groups.csv").write_text("file,group\np0.png,a\np1.png,b\n")


def one_name_for_two(folder: Path) -> None:
    """Name pictures a_1 (slice 1 of scan a) and a_slice1, which get the same name."""
    for kind in ("images", "labels"):
        for name in ("a_1", "a_2", "b_1", "a_slice1"):
            shutil.copy(
                folder / "pictures" / kind / "p0.png", folder / "pictures" / kind / f"{name}.png"
            )


def mixed_bits(folder: Path) -> None:
    """Put a picture of 16 bits among the pictures of 8 bits."""
    Image.fromarray(np.full((12, 14), 30_000, np.uint16)).save(
        folder / "pictures" / "images" / "p0.png"
    )


def deeper_base(folder: Path) -> None:
    """Write base weights as they come from merging a network of `--decoder_depth 4`."""
    state = tiny_model(num_classes=2).sam.state_dict()
    state = {key: value for key, value in state.items() if ".updates." not in key}
    layers = "mask_decoder.transformer.layers."
    for key, value in list(state.items()):
        if key.startswith(f"{layers}1."):
            for index in (2, 3):
                state[key.replace(f"{layers}1.", f"{layers}{index}.")] = value
    torch.save(state, folder / "deeper.pth")


def segmented(
    *segments: tuple[str, int, int], second: Callable[[np.ndarray], Any] = np.zeros_like
) -> Callable[[Path], None]:
    """Replace the first raw label by a segmentation of 3D Slicer.

    Args:
        segments: name, label value and layer of each.
        second: makes the second layer from the first.
    """

    def spoil(folder: Path) -> None:
        labels = folder / "raw" / "labelsTr"
        layer, geometry = read_volume(labels / "s0.nii.gz")
        (labels / "s0.nii.gz").unlink()
        slicer_file(labels / "s0.seg.nrrd", np.stack([layer, second(layer)]), geometry, segments)

    return spoil


def moved_segmentation(folder: Path) -> None:
    """Replace the first raw label by a segmentation that lies half a voxel beside the scan."""
    labels = folder / "raw" / "labelsTr"
    layer, geometry = read_volume(labels / "s0.nii.gz")
    (labels / "s0.nii.gz").unlink()
    place = replace(geometry, origin=tuple(x + 0.4 for x in geometry.origin))
    slicer_file(labels / "s0.seg.nrrd", layer[None], place, [("liver", 1, 0), ("tumour", 2, 0)])


ONES = np.ones(SHAPE, np.uint8)
HU = np.linspace(-1000, 500, ONES.size).reshape(SHAPE).astype(np.int16)
P, T, E, S, R, A, X, B, *_ = (
    PROGRAMS  # prepare, train, test (evaluation), predict (segmentation), …
)
ROWS = [
    Wrong(P, "the input folder does not exist", nothing, "does not exist", ("--input", "none")),
    Wrong(P, "a folder of no known layout", nothing, "no data set in a known layout",
          ("--input", "data")),
    Wrong(P, "input and output are one folder", nothing, "is the --input folder",
          ("--output", "raw")),
    Wrong(P, "the output is among the images", nothing, "which holds input scans",
          ("--output", "raw/imagesTr")),
    Wrong(P, "dataset.json is cut short", cut("raw/dataset.json"), "is not JSON"),
    Wrong(P, "dataset.json holds a list", lambda f: (f / "raw/dataset.json").write_text("[]"),
          "expected a JSON object"),
    Wrong(P, "no labels in dataset.json", described(labels={}), 'needs "labels"'),
    Wrong(P, "labels of regions", described(labels={"whole": [1, 2]}), "regions are not supported"),
    Wrong(P, "labels with an ignore label", described(labels={"a": 1, "ignore": 2}),
          "but training uses every voxel"),
    Wrong(P, "one value for two classes", described(labels={"a": 1, "b": 1}), "twice"),
    Wrong(P, "a label value that is no number", described(labels={"a": None}), "the value of 'a'"),
    Wrong(P, "a label value beyond all numbers", described(labels={"a": float("inf")}),
          "is no finite number"),
    Wrong(P, "a class without name", described(labels={"": 1}), "has the class name ''"),
    Wrong(P, "a class name of two lines", described(labels={"a\nb": 1}), "printable characters"),
    Wrong(P, "a class name that is there twice", nothing, "has the class name 'a' twice",
          ("--input", "pictures", "--class_names", "a", "a")),
    Wrong(P, "class names beside dataset.json", nothing, "--class_names has no effect",
          ("--class_names", "a", "b")),
    Wrong(P, "a data set's name beside dataset.json", nothing, "--dataset has no effect",
          ("--dataset", "Synapse")),
    Wrong(P, "only background", described(labels={"background": 0}), "no class except background"),
    Wrong(P, "several channels", described(channel_names={"0": "T1", "1": "T2"}), "pass --channel"),
    Wrong(P, "a channel that is not there", nothing, "--channel is 4", ("--channel", "4")),
    Wrong(P, "a channel of pictures that have one", nothing, "holds only channel 0",
          ("--input", "pictures", "--channel", "1")),
    Wrong(P, "a label without its image", lost("raw/imagesTr/s1_0000.nii.gz"),
          "have no image of the same name"),
    Wrong(P, "an image cut short", cut("raw/imagesTr/s0_0000.nii.gz"), "damaged or cut short"),
    Wrong(P, "an image that is no NIfTI", junk("raw/imagesTr/s0_0000.nii.gz"),
          "not a readable scan"),
    Wrong(P, "a label on another grid", raw("label", ONES, placed("LPS")), "differ in"),
    Wrong(P, "a label of another size", raw("label", ONES[:, :, 1:]), "shape (D, H, W)"),
    Wrong(P, "segments that overlap", segmented(
        ("liver", 1, 0), ("tumour", 2, 0), ("cyst", 3, 1), second=lambda a: 3 * (a > 0)),
          "which each lies in two segments"),
    Wrong(P, "two segments of one label value", segmented(
        ("liver", 1, 0), ("tumour", 1, 1)), "which is that of liver"),
    Wrong(P, "segments named like other classes", segmented(
        ("Tumor", 1, 0), ("liver", 2, 0)), "which is liver for --label_values raw"),
    Wrong(P, "voxels of no segment", segmented(("liver", 1, 0)), "which no segment of its header"),
    Wrong(P, "a segmentation between the scan's voxels", moved_segmentation, "differ in origin"),
    Wrong(P, "a label value that no class has", raw("label", 9 * ONES), "holds label values 9"),
    Wrong(P, "label values that are not whole", raw("label", ONES * np.float32(0.5)),
          "holds label values 0.5"),
    Wrong(P, "CT that is not in HU", raw("image", ONES), "do not look like Hounsfield units"),
    Wrong(P, "CT of air alone", raw("image", np.int16(-1000) * ONES), "all lie outside the window"),
    Wrong(P, "NaN in an image", raw("image", np.where(ONES, np.float32("nan"), 0)), "NaN"),
    Wrong(P, "a window the wrong way round", nothing, "the lower limit first",
          ("--window", "200", "-100")),
    Wrong(P, "a test case that is not there", nothing, "names s9", ("--test_cases", "s9")),
    Wrong(P, "more folds than cases", nothing, "cannot split 3 cases into 7 folds",
          ("--folds", "7")),
    Wrong(P, "a fold beyond the folds", nothing, "--fold is 3", ("--folds", "3", "--fold", "3")),
    Wrong(P, "a mask in colours", colour_labels, "expected class indices",
          ("--input", "pictures")),
    Wrong(P, "a picture cut short", cut("pictures/images/p1.png"), "not a readable picture",
          ("--input", "pictures")),
    Wrong(P, "another number of class names", nothing, "--class_names has 1",
          ("--input", "pictures", "--class_names", "a")),
    Wrong(P, "masks with grey edges", grey_edges, "grey values between 0 and 255",
          ("--input", "pictures")),
    Wrong(P, "masks of 0/1 and of 0/255", two_encodings, "hold values that never meet in one file",
          ("--input", "pictures")),
    Wrong(P, "a threshold that no value reaches", nothing, "hold no value from --label_threshold",
          ("--input", "pictures", "--label_threshold", "9")),
    Wrong(P, "a stack of slices as a picture", stack, "is a stack of 3 pictures",
          ("--input", "pictures")),
    Wrong(P, "a file named .png that is a page",
          lambda f: (f / "pictures/images/p0.png").write_text("<html>log in</html>"),
          "a text page", ("--input", "pictures")),
    Wrong(P, "labels as JPEG", jpeg_labels, "is a JPEG", ("--input", "pictures")),
    Wrong(P, "pictures of 8 and of 16 bits", mixed_bits,
          "convert all of them to 8 bits or to 16 bits", ("--input", "pictures")),
    Wrong(P, "pictures of fractions", fractions, "neither 8 nor 16 bits", ("--input", "pictures")),
    Wrong(P, "two pictures that would have one name", one_name_for_two, "would both become",
          ("--input", "pictures")),
    Wrong(P, "a group that is no pattern", nothing, "is not a regular expression",
          ("--group", "(p")),
    Wrong(P, "a pattern of no scan", nothing, "0 parts in parentheses", ("--group", "s.")),
    Wrong(P, "a pattern that misses names", nothing, "finds no scan in 1 of 3 names",
          ("--group", "s([01])")),
    Wrong(P, "a table without a file", table_without_a_picture, "gives no group for 1 of 3 files",
          ("--input", "pictures", "--group", "groups.csv")),
    Wrong(P, "a scan of another plane", another_plane, "taken in different planes"),
    Wrong(P, "pictures in another plane", nothing, "pictures have no other plane",
          ("--input", "pictures", "--plane", "axial")),
    Wrong(P, "several files a picture", two_channels, "pass --channel", ("--input", "pictures")),
    Wrong(P, "channels that have no number", described(channel_names={"CT": "0"}),
          'expected the numbers "0", "1"'),
    Wrong(P, "a fold of no folds", nothing, "pass --folds", ("--fold", "1")),
    Wrong(P, "folds and test cases", nothing, "pass only one of them",
          ("--folds", "3", "--test_cases", "s0")),
    Wrong(P, "another data set's name", nothing, "unknown data set",
          ("--input", "data", "--dataset", "X")),
    Wrong(T, "the data folder does not exist", nothing, "does not exist", ("--root_path", "none")),
    Wrong(T, "base weights are not there", nothing, "do not exist", ("--ckpt", "none.pth")),
    Wrong(T, "base weights of another kind", junk("b.pth"), "b.pth", ("--ckpt", "b.pth")),
    Wrong(T, "a slice cut short", lambda f: cut(str(min((f / "data/train_npz").iterdir())))(f),
          "not a readable npz"),
    Wrong(T, "a label of 255 in a slice", slices(label=np.full((12, 14), 255.0)),
          "holds label values 255"),
    Wrong(T, "raw HU in a slice", slices(image=np.full((12, 14), 900.0)), "look like raw HU"),
    Wrong(T, "a slice without label", slices(label=None), "no array named label"),
    Wrong(T, "a pickle inside a slice", slices(image=np.array([{}, 1], dtype=object)),
          "not a readable npz"),
    Wrong(T, "the list is empty", list_of("\n"), "is empty"),
    Wrong(T, "a list that leaves the folder", list_of("../../x\n"), "without folders"),
    Wrong(T, "a list of other data", list_of("s8_slice000\n"), "are not in"),
    Wrong(T, "a spec that is no JSON", cut("data/dataset_spec.json"), "is not JSON"),
    Wrong(T, "a spec of nonsense", spec_of(raw_labels={"1": 7}), "does not describe a data set"),
    Wrong(T, "a spec whose class names no table can hold", spec_of(class_names=["liver", "a\0"]),
          "has the class name 'a\\x00'"),
    Wrong(T, "an image size that is no multiple of 16", nothing, "multiple of 16",
          ("--img_size", "100")),
    Wrong(T, "a gradient clipped to nothing", nothing, "--clip_grad is 0", ("--clip_grad", "0")),
    Wrong(T, "a batch of nothing", nothing, "--batch_size is 0", ("--batch_size", "0")),
    Wrong(T, "weights of the classes that nothing uses", nothing,
          "--class_weights inverse has no effect with --loss dice",
          ("--loss", "dice", "--class_weights", "inverse")),
    Wrong(T, "a weight of Dice that is the only term", nothing,
          "--dice_param 0.5 has no effect with --loss dice",
          ("--loss", "dice", "--dice_param", "0.5")),
    Wrong(T, "a weight of the boundary loss without it", nothing,
          "--boundary_param 0.1 has no effect with --loss ce+dice", ("--boundary_param", "0.1")),
    Wrong(T, "an exponent of another schedule", nothing,
          "--lr_exp 7.0 has no effect with --schedule cosine",
          ("--schedule", "cosine", "--lr_exp", "7")),
    Wrong(T, "an average that never moves", nothing, "--ema is 1.0", ("--ema", "1")),
    Wrong(T, "a LoRA variant that is not there", nothing, "does not exist", ("--module", "nix")),
    Wrong(T, "updates in a block that the encoder lacks", nothing,
          "--lora_blocks names the blocks 4, expected 0…3", ("--lora_blocks", "0", "4")),
    Wrong(T, "a word for blocks beside a number", nothing, "is last_half, 0, expected all",
          ("--lora_blocks", "last_half", "0")),
    Wrong(T, "every so many blocks, more than there are", nothing, "one of every_2…every_3",
          ("--lora_blocks", "every_9")),
    Wrong(T, "blocks of an encoder without updates", nothing, "--lora_blocks has no effect",
          ("--lora_targets", "decoder", "--lora_blocks", "0")),
    Wrong(T, "a layer that no update is for", nothing, "invalid choice",
          ("--lora_targets", "q", "mlp")),
    Wrong(T, "the updates alone, without base weights", nothing,
          "--train lora has no effect with --ckpt none", ("--train", "lora")),
    Wrong(T, "the updates alone, of an adapter with every weight", nothing,
          "--train lora has no effect with adapter.pth",
          ("--lora_ckpt", "adapter.pth", "--train", "lora")),
    Wrong(T, "the decoder alone, with other updates", nothing,
          "--lora_targets has no effect with --train decoder",
          ("--ckpt", "b.pth", "--train", "decoder", "--lora_targets", "k")),
    Wrong(T, "prompts without a decoder that learns them", nothing,
          "cannot teach prompts with --train lora",
          ("--prompt_prob", "0.5", "--train", "lora", "--ckpt", "b.pth")),
    Wrong(T, "a probability above 1", nothing, "--prompt_prob is 1.5",
          ("--prompt_prob", "1.5")),
    Wrong(T, "a device that is not there", nothing, "--device", ("--device", "cuda:7")),
    Wrong(T, "too few cases to hold one out", nothing, "--val_cases",
          ("--val_every", "1", "--val_cases", "9")),
    Wrong(T, "a run folder that is none", nothing, "run folder", ("--resume", "none")),
    Wrong(T, "an adapter of other classes that names none", spec_of(
        class_names=["a", "b", "c"], raw_labels={"1": 1, "2": 2, "3": 3},
        predicted_values=[1, 2, 3]), "has 2 classes without names but the data have 3 classes",
          ("--lora_ckpt", "unnamed.pth", "--check")),
    Wrong(T, "dropout in compiled code", nothing, "--lora_dropout draws for each slice by itself",
          ("--lora_dropout", "0.1", "--compile")),
    Wrong(T, "a recording of what differs in every step", nothing,
          "--cuda_graph cannot record --lora_dropout", ("--lora_dropout", "0.1", "--cuda_graph")),
    Wrong(T, "a recording without a GPU", nothing, "--cuda_graph needs a CUDA GPU",
          ("--cuda_graph",)),
    Wrong(T, "an adapter of another form to start from", nothing,
          "was trained with --lora_kind lora, not dora; leave --lora_kind out",
          ("--lora_ckpt", "adapter.pth", "--lora_kind", "dora", "--check")),
    Wrong(E, "an adapter of another scale", nothing, "was trained with --lora_alpha as by default",
          ("--lora_alpha", "16")),
    Wrong(T, "a decoder of a depth that there is not", nothing, "--decoder_depth",
          ("--decoder_depth", "3")),
    Wrong(T, "base weights with a deeper decoder", deeper_base,
          "a mask decoder of depth 4, this network was built with 2; pass --decoder_depth 4",
          ("--ckpt", "deeper.pth")),
    Wrong(T, "deeper decoders that never train", nothing, "adds layers to the decoder",
          ("--train", "lora", "--decoder_depth", "4", "--ckpt", "base.pth")),
    Wrong(T, "an adapter of smaller logits", nothing, "has logits 1, this network was built with 2",
          ("--lora_ckpt", "adapter.pth", "--logits", "2")),
    Wrong(E, "an adapter of another decoder depth", nothing,
          "was trained with --decoder_depth 2, not 4; leave --decoder_depth out",
          ("--decoder_depth", "4")),
    Wrong(E, "the test data do not exist", nothing, "does not exist", ("--volume_path", "none")),
    Wrong(E, "the adapter is not there", nothing, "does not exist", ("--lora_ckpt", "none.pth")),
    Wrong(E, "the adapter is cut short", cut("adapter.pth"), "not a readable PyTorch checkpoint"),
    Wrong(E, "the adapter would run code", pickled, "more than plain tensors"),
    Wrong(E, "an adapter of another rank", nothing, "LoRA rank 2", ("--rank", "4")),
    Wrong(E, "an adapter of other layers", nothing, "has its updates in other layers",
          ("--lora_targets", "k", "v")),
    Wrong(E, "data of other classes", spec_of(class_names=["liver", "vessel"]),
          "holds the classes liver, vessel"),
    Wrong(E, "data of another window", spec_of(
        intensity={"rule": "window", "low": -160.0, "high": 240.0}), "differ in intensities",),
    Wrong(E, "data turned another way", spec_of(orientation="RAS"), "differ in orientation"),
    Wrong(E, "a volume cut short", lambda f: cut(str(next((f / "data/test_vol_h5").iterdir())))(f),
          "not a readable h5 file"),
    Wrong(E, "a volume without label", stored(label=None), "no data set named label"),
    Wrong(E, "a geometry of nonsense", stored(spacing=[0.0, 1.0, 1.0]),
          "stores an invalid geometry"),
    Wrong(E, "a tolerance below 0", nothing, "--nsd_tolerance is -1", ("--nsd_tolerance", "-1")),
    Wrong(T, "neighbours of slices without numbers", unnumbered_slice, "without a number",
          ("--input_slices", "3")),
    Wrong(T, "neighbours of slices in colour", slices(image=np.full((3, 12, 14), 0.5)),
          "is in colour", ("--input_slices", "3")),
    Wrong(T, "neighbours of another size", slices(
        image=np.full((12, 10), 0.5), label=np.zeros((12, 10))), "differ in size",
          ("--input_slices", "3")),
    Wrong(T, "neighbours of pictures", spec_of(pictures=True), "have no slices before and after",
          ("--input_slices", "3")),
    Wrong(E, "neighbours in a volume in colour", stored(image=np.full((3, 3, 12, 14), 0.5)),
          "is in colour", ("--lora_ckpt", "between.pth")),
    Wrong(S, "neighbours of pictures", nothing, "have no slices before and after",
          ("--input", "pictures/images", "--lora_ckpt", "between.pth")),
    Wrong(S, "the scan is not there", nothing, "does not exist", ("--input", "none.nii.gz")),
    Wrong(S, "a file of another kind", junk("a.txt"), "is not a scan or picture",
          ("--input", "a.txt")),
    Wrong(S, "a folder without scans", lambda f: (f / "empty").mkdir(), "holds no scan",
          ("--input", "empty")),
    Wrong(S, "a segmentation in place of a scan", lambda f: shutil.copy(
        f / "scan.nii.gz", f / "a.seg.nrrd"), "is a segmentation of 3D Slicer, not a scan",
          ("--input", "a.seg.nrrd")),
    Wrong(S, "a segmentation for 3D Slicer of a picture", nothing, "is for scans, but",
          ("--input", "pictures/images", "--format", ".seg.nrrd")),
    Wrong(S, "two scans of one name", two_of_a_name, "would have the same name",
          ("--input", "in")),
    Wrong(S, "a scan cut short", cut("scan.nii.gz"), "damaged or cut short"),
    Wrong(S, "MR for a CT network", scan(ONES), "do not look like Hounsfield units"),
    Wrong(S, "a DICOM slice is missing", dicom([0, 1, 3, 4, 5]),
          "missing or unevenly spaced slices", ("--input", "series")),
    Wrong(S, "a DICOM slice is there twice", dicom([0, 1, 1, 2, 3]), "duplicate slices",
          ("--input", "series")),
    Wrong(S, "base weights for an adapter", lambda f: torch.save(
        {"image_encoder.pos_embed": torch.zeros(1)}, f / "b.pth"), "looks like base weights",
          ("--lora_ckpt", "b.pth")),
    Wrong(S, "the output is a file", junk("out"), "cannot make the folder"),
    Wrong(S, "the output is the scan's folder", nothing, "is a folder of scans that are read",
          ("--output", ".")),
    Wrong(S, "the output is the folder that is read", lambda f: (f / "in").mkdir() or shutil.copy(
        f / "scan.nii.gz", f / "in"), "is a folder of scans that are read",
          ("--input", "in", "--output", "in")),
    Wrong(S, "labels of others in the output", lambda f: (f / "out").mkdir() or shutil.copy(
        f / "scan.nii.gz", f / "out"), "which this program has not written"),
    Wrong(S, "scans lie in subfolders alone", lambda f: (f / "in" / "p1").mkdir(parents=True)
          or shutil.copy(f / "scan.nii.gz", f / "in" / "p1"),
          "in subfolders only DICOM is looked for", ("--input", "in")),
    Wrong(S, "the last DICOM slice is cut short", lambda f: dicom([0, 1, 2, 3, 4])(f) or cut(
        str(max((f / "series").iterdir()).relative_to(f)))(f), "cannot be read as slices",
          ("--input", "series")),
    Wrong(S, "a DICOM segmentation of a NIfTI file", nothing,
          "--dicom_seg needs DICOM series, but scan.nii.gz holds none", ("--dicom_seg",)),
    Wrong(S, "DICOM segmentations of pictures", nothing, "--dicom_seg needs DICOM series",
          ("--input", "pictures/images", "--dicom_seg")),
    Wrong(S, "another program's DICOM segmentation in the output", lambda f: dicom([0, 1, 2])(f)
          or (f / "out").mkdir() or (f / "out" / "series.seg.dcm").write_bytes(b"mine"),
          "holds series.seg.dcm, which this program has not written",
          ("--input", "series", "--dicom_seg")),
    Wrong(S, "a folder in the place of a DICOM segmentation", lambda f: dicom([0, 1, 2])(f)
          or (f / "out" / "series.seg.dcm").mkdir(parents=True),
          "holds folders where files would be written", ("--input", "series", "--dicom_seg")),
    Wrong(S, "a channel below 0", nothing, "--channel is -1", ("--channel", "-1")),
    Wrong(S, "DICOM slices beside other scans", lambda f: (f / "IM0").write_bytes(
        bytes(128) + b"DICM"), "DICOM slices beside", ("--input", ".")),
    Wrong(S, "a part counted from 0", nothing, "--part is '0/3', expected K/N", ("--part", "0/3")),
    Wrong(S, "a part above the number of parts", nothing, "expected K/N", ("--part", "4/3")),
    Wrong(S, "a part that is none", nothing, "expected K/N", ("--part", "x")),
    Wrong(S, "a table without a column of paths", listed("file,name\nscan.nii.gz,a\n"),
          "expected 'path'", ("--input", "cases.csv")),
    Wrong(S, "a table with a path that is not there", listed("path\nscan.nii.gz\nno.nii.gz\n"),
          "1 of 2 paths that do not exist: no.nii.gz (line 3)", ("--input", "cases.csv")),
    Wrong(S, "a table with a name twice", listed(
        "path,case\nscan.nii.gz,a\nraw/imagesTr/s1_0000.nii.gz,a\n"),
          "would have the same name", ("--input", "cases.csv")),
    Wrong(S, "a table with a scan twice", listed("path,case\nscan.nii.gz,a\nscan.nii.gz,b\n"),
          "in line 2 and line 3", ("--input", "cases.csv")),
    Wrong(S, "a table with a name that leads elsewhere", listed("path,case\nscan.nii.gz,../a\n"),
          "leads to another folder", ("--input", "cases.csv")),
    Wrong(S, "a table with a column of channels", listed("path,channel\nscan.nii.gz,1\n"),
          "pass --channel", ("--input", "cases.csv")),
    Wrong(R, "a run that was not tested", nothing, "does not exist", ("none",)),
    Wrong(R, "results cut short", cut("tested/results.json"), "results.json", ("tested",)),
    Wrong(R, "the page is a folder", nothing, "choose another path",
          ("tested", "--output", "data")),
    Wrong(R, "the page's folder is a file", nothing, "choose another path",
          ("tested", "--output", "scan.nii.gz/page.html")),
    Wrong(A, "a file that is not there", nothing, "does not exist", ("show", "none.pth")),
    Wrong(A, "an output of another format", nothing, "expected .pth or .safetensors",
          ("convert", "adapter.pth", "adapter.onnx")),
    Wrong(A, "an output that is there", nothing, "exists",
          ("convert", "adapter.pth", "unnamed.pth")),
    Wrong(A, "the output's folder is a file", nothing, "choose another path",
          ("convert", "adapter.pth", "scan.nii.gz/a.safetensors")),
    Wrong(X, "an adapter that is not there", nothing, "does not exist", ("none.pth", "new.onnx")),
    Wrong(X, "a folder that is no run", nothing, "does not exist", ("data", "new.onnx")),
    Wrong(X, "an output of another format", nothing, "expected .onnx", ("adapter.pth", "new.pt")),
    Wrong(X, "an output that is there", onnx(), "exists", ("adapter.pth", "model.onnx")),
    Wrong(X, "a flag that contradicts the adapter", nothing, "leave --logits out",
          ("adapter.pth", "new.onnx", "--logits", "2")),
    Wrong(S, "an ONNX file that is not there", nothing, "tools.export", ONNX),
    Wrong(S, "an ONNX file that is text", junk("model.onnx"), "is not a readable ONNX file", ONNX),
    Wrong(S, "an ONNX file that is cut off", onnx(cut=40), "is not a readable ONNX file", ONNX),
    Wrong(S, "an ONNX file of another program", onnx(settings=None), "so another program wrote it",
          ONNX),
    Wrong(S, "an ONNX file with damaged settings", onnx(settings="{"), "damaged settings", ONNX),
    Wrong(S, "an ONNX file whose settings lack the data", onnx(settings='{"img_size": 64}'),
          "they lack num_classes, spec", ONNX),
    Wrong(S, "an ONNX file with another input", onnx(side=32), "expected images float32", ONNX),
    Wrong(S, "an ONNX file with operators of a library", onnx(domain="com.example"),
          "uses operators of com.example", ONNX),
    Wrong(S, "an ONNX file that names another file", onnx(weights="../scan.nii.gz"),
          "keeps weights in another file", ONNX),
    Wrong(S, "an ONNX file that computes nonsense", onnx(operator="Nonsense"),
          "onnxruntime does not take", ONNX),
    Wrong(S, "an ONNX file and an adapter", onnx(), "--lora_ckpt has no effect",
          (*ONNX, "--lora_ckpt", "other.pth")),
    Wrong(S, "an ONNX file and bf16", onnx(), "--use_amp has no effect", (*ONNX, "--use_amp")),
    Wrong(S, "an ONNX file and another size", onnx(), "--img_size has no effect",
          (*ONNX, "--img_size", "512")),
    Wrong(B, "no such table", lost("table.toml"), "does not exist"),
    Wrong(B, "a table that is not TOML", junk("table.toml"), "is not TOML"),
    Wrong(B, "an unknown key", table("[grid]\nrank = [1, 4]"), "has the key 'grid'"),
    Wrong(B, "neither axes nor rows", table(""), "neither [axes] nor [[rows]]"),
    Wrong(B, "an unknown flag", table("[axes]\nrnak = [1, 4]"), "did you mean --rank"),
    Wrong(B, "a value of another type", table("[axes]\nrank = [1, 'four']"), "rank = 'four'"),
    Wrong(B, "a value outside its limits", table("[axes]\nrank = [0, 4]"), "rank = 0, expected"),
    Wrong(B, "a value that is no choice", table("[axes]\nloss = ['ce', 'mse']"), "loss = 'mse'"),
    Wrong(B, "an axis without values", table("[axes]\nrank = []"), "a list of values"),
    Wrong(B, "an axis that changes nothing", table("[axes]\nrank = [1, 4]\nwarmup_period = [5, 9]"),
          "the axis warmup_period changes nothing"),
    Wrong(B, "two rows of the same settings",
          table("[[rows]]\nname = 'a'\n[[rows]]\nname = 'b'\nlora_targets = ['v', 'q']"),
          "'a' and 'b' have the same settings"),
    Wrong(B, "two rows whose names give one folder",
          table("[[rows]]\nname = 'a b'\n[[rows]]\nname = 'A-b'\nrank = 1"), "same folder"),
    Wrong(B, "flags that do not go together", table("[[rows]]\nname = 'a'\nval_cases = 1"),
          "row 'a': --val_cases"),
    Wrong(B, "a flag that ablate.py sets", table("[axes]\nseed = [1, 2]"), "list it in seeds"),
    Wrong(B, "a row of no published numbers", table("[[rows]]\nname = 'a'\npublished = 'x'"),
          "expected a key of published.json"),
    Wrong(B, "a folder that is no run",
          lambda folder: (folder / "out" / "rank-1_s1234" / "mine").mkdir(parents=True),
          "holds mine but no config.json"),
    Wrong(B, "a part that is none", nothing, "expected K/N", ("--part", "5/4")),
    Wrong(B, "a row that is none", nothing, "which is no row", ("--only", "rank 3")),
    Wrong(B, "no data", nothing, "does not exist", ("--root_path", "nowhere")),
    Wrong("demo.py", "no network, and none of the quickstart", nothing, "run `make quickstart`",
          ("--port", "7861")),
    Wrong("demo.py", "an adapter that is not there", nothing, "does not exist",
          ("--lora_ckpt", "none.pth")),
    Wrong("demo.py", "a folder that is no run", nothing, "pass a run folder", ("--config", "data")),
    Wrong("demo.py", "a port that no computer has", nothing, "--port is 70000",
          ("--lora_ckpt", "adapter.pth", "--port", "70000")),
    Wrong("demo.py", "uploads of no size", nothing, "--max_upload_mb is 0",
          ("--lora_ckpt", "adapter.pth", "--max_upload_mb", "0")),
    Wrong("tools.clicks", "a network that knows no prompts", nothing, "knows no prompts",
          ("--by", "network")),
    Wrong("tools.clicks", "clicks that do not ascend", nothing, "pass --clicks 1 3",
          ("--clicks", "3", "1")),
    Wrong("tools.clicks", "no data", nothing, "does not exist", ("--volume_path", "nowhere")),
    Wrong("tools.clicks", "a table of the user in the way",
          lambda folder: ((folder / "out").mkdir(), (folder / "out" / "clicks.csv").touch()),
          "which this program has not written"),
    Wrong("python -m samed", "a program that is none", nothing, "is no program of SAMed",
          ("tools.adaptor", "show")),
    Wrong("python -m samed", "a module of Python", nothing, "is no program of SAMed", ("os",)),
    Wrong("python -m samed", "a flag before the name of the program", nothing,
          "is no program of SAMed", ("--device", "train")),
]  # fmt: skip


def error_line(told: str, folder: Path) -> str:
    """Return the error message without the path of the folder."""
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    return lines[0].removeprefix("error: ").replace(f"{folder}/", "") if lines else ""


def page_row(row: Wrong, told: str, folder: Path) -> str:
    """Return the row of a mistake in docs/errors.md."""
    sentence = error_line(told, folder).replace(f"{REPOSITORY}/", "").replace("|", "/")
    return f"| {row.what} | {sentence} |"


def main() -> None:
    """Write docs/errors.md."""
    lines = [
        "# Wrong input",
        "",
        "What each program says about wrong input: one sentence on stderr before any long work",
        "starts, exit code 2, and nothing half-written. `predict.py` reports a bad scan among",
        "several when its turn comes, and continues with the others (exit code 3).",
        f"`tests/test_wrong_input.py` runs all {len(ROWS)} cases, and",
        "`python tests/wrong_input.py` writes this page.",
    ]
    with tempfile.TemporaryDirectory() as base:
        make_good(Path(base))
        for program in PROGRAMS:
            lines += ["", f"## {program}", "", "| what is wrong | what it says |", "| --- | --- |"]
            for row in (row for row in ROWS if row.program == program):
                with tempfile.TemporaryDirectory() as copy:
                    folder = Path(copy).resolve()
                    shutil.copytree(base, folder, dirs_exist_ok=True)
                    row.spoil(folder)
                    with contextlib.chdir(folder):
                        _, told = run(program, arguments(row, folder))
                lines.append(page_row(row, told, folder))
    (REPOSITORY / "docs" / "errors.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
