"""Reading training slices and test volumes, with every check that a user's data needs.

`Synapse_dataset` and `RandomGenerator` keep the names and samples that scripts of the field use;
the training loop reads plain slices and augments whole batches on the device instead.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from safe_io import (
    InputError,
    MissingFileError,
    first_few,
    load_arrays,
    require_file,
    require_folder,
    safe_name,
)

from .augmentation import draw_augmentation, keyed_rng, prepare_batch
from .registry import SYNAPSE

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED_LISTS = REPOSITORY / "lists" / "lists_Synapse"
# Intensities are HU mapped to [0, 1]; cubic zoom overshoots by a few tenths at sharp edges.
PLAUSIBLE_RANGE = (-1.0, 2.0)
GEOMETRY = ("spacing", "origin", "direction")  # attributes of a test volume, in SimpleITK's order


class Synapse_dataset(Dataset):
    """Slices (`split="train"`) or volumes (`split="test_vol"`) that a list names.

    Args:
        base_dir: folder of the `.npz` slices or `.npy.h5` volumes, or the one above it as
            preprocess writes it.
        list_dir: folder of `train.txt` and `test_vol.txt`; None: the `lists` that preprocess wrote
            beside the data, else the published split.
        split: "train" or "test_vol".
        transform: called with each training sample, e.g. a `RandomGenerator`.
        num_classes: labels beyond it are refused.

    Raises:
        MissingFileError: folder, list or a file that the list names (count and first five).
        InputError: an empty list, or a name that would leave the folder.
    """

    def __init__(
        self,
        base_dir: str | Path,
        list_dir: str | Path | None,
        split: str,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        *,
        num_classes: int = SYNAPSE.num_classes,
    ) -> None:
        if split not in ("train", "test_vol"):
            raise InputError(f"split is {split!r}, expected 'train' or 'test_vol'")
        self.split = split
        self.transform = transform
        self.num_classes = num_classes
        subfolder, suffix = (
            ("train_npz", ".npz") if split == "train" else ("test_vol_h5", ".npy.h5")
        )
        what = "training data" if split == "train" else "test data"
        base = require_folder(
            base_dir, what=f"{what} folder", remedy="run preprocess, or check the path"
        )
        self.data_dir = base / subfolder if (base / subfolder).is_dir() else base
        self.list_path = find_list(self.data_dir, list_dir, split)
        self.sample_list = read_list(self.list_path)
        self.paths = [self.data_dir / f"{name}{suffix}" for name in self.sample_list]
        absent = [path.name for path in self.paths if not path.is_file()]
        if absent:
            raise MissingFileError(
                f"{len(absent)} of the {len(self.paths)} files that {self.list_path} names are not "
                f"in {self.data_dir}: {first_few(absent)}; run preprocess, or pass the --list_dir "
                "of these data"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `image`, `label`, `case_name`, and for slices their `index`.

        A slice is (H, W), a volume (D, H, W); image float32 about [0, 1], label uint8.
        """
        sample = self.read(index)
        if self.split == "train" and self.transform is not None:
            sample = self.transform(sample)
        sample["case_name"] = self.sample_list[index]
        return sample

    def read(self, index: int) -> dict[str, Any]:
        """`image`, `label` and `index` of one checked sample, without the transform."""
        path = self.paths[index]
        arrays = load_arrays(path, ("image", "label")) if self.split == "train" else _read_h5(path)
        image, label = check_sample(
            arrays["image"],
            arrays["label"],
            path,
            num_classes=self.num_classes,
            ndim=2 if self.split == "train" else 3,
        )
        return {"image": image, "label": label, "index": index}

    def geometry(self, index: int) -> dict[str, tuple[float, ...]] | None:
        """Spacing, origin and direction of a volume in SimpleITK's order; None if not stored."""
        with h5py.File(self.paths[index], "r") as file:
            if not all(name in file.attrs for name in GEOMETRY):
                return None
            return {name: tuple(float(v) for v in file.attrs[name]) for name in GEOMETRY}

    def count_slices(self) -> int:
        """Slices of all volumes together."""
        total = 0
        for path in self.paths:
            with h5py.File(path, "r") as file:
                total += len(file["image"])
        return total

    def only(self, indices: Sequence[int]) -> Synapse_dataset:
        """The same data set with some of its samples, in the order given."""
        part = copy.copy(self)
        part.sample_list = [self.sample_list[index] for index in indices]
        part.paths = [self.paths[index] for index in indices]
        return part

    def check(self, workers: int = 4) -> list[SampleFacts]:
        """Read every sample once, so that faulty ones stop a run before it starts.

        Raises:
            InputError: the first faulty file, and how many more there are.
        """
        facts: list[SampleFacts] = []
        errors: list[InputError] = []
        with ThreadPoolExecutor(workers) as pool:
            readings = pool.map(self._facts, range(len(self)))
            for reading in tqdm(
                readings, total=len(self), desc=f"checking {self.split}", leave=False, disable=None
            ):
                (errors if isinstance(reading, InputError) else facts).append(reading)
        if len(errors) > 1:
            raise InputError(f"{errors[0]}; {len(errors) - 1} more files are faulty")
        if errors:
            raise errors[0]
        return facts

    def _facts(self, index: int) -> SampleFacts | InputError:
        try:
            sample = self.read(index)
        except InputError as error:
            return error
        image, label = sample["image"], sample["label"]
        counts = np.bincount(label.ravel(), minlength=self.num_classes + 1)
        return SampleFacts(
            name=self.sample_list[index],
            shape=image.shape,
            low=float(image.min()),
            high=float(image.max()),
            voxels=tuple(counts.tolist()),
            digest=hashlib.blake2b(image.data, digest_size=16).hexdigest(),
        )


@dataclass(frozen=True)
class SampleFacts:
    """What was seen of one slice or volume."""

    name: str
    shape: tuple[int, ...]
    low: float  # intensities, about [0, 1]
    high: float
    voxels: tuple[int, ...]  # of each class, background first
    digest: str  # of the image; equal images have equal ones


def find_list(data_dir: Path, list_dir: str | Path | None, split: str) -> Path:
    """The list file of a split: the one asked for, or the data's own, or the published one."""
    name = f"{split}.txt"
    if list_dir is not None:
        return require_file(Path(list_dir) / name, what="list", remedy="check --list_dir")
    own = [folder / "lists" / name for folder in (data_dir, data_dir.parent)]
    return next((path for path in own if path.is_file()), PUBLISHED_LISTS / name)


def read_list(path: Path) -> list[str]:
    """The names in a list file, one a line; none may leave the data folder."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [safe_name(line.strip(), source=path) for line in lines if line.strip()]
    if not names:
        raise InputError(f"list {path} is empty; expected one case or slice name a line")
    repeated = sorted({name for name in names if names.count(name) > 1}) if _repeats(names) else []
    if repeated:
        raise InputError(f"list {path} names {first_few(repeated)} more than once; remove them")
    return names


def check_sample(
    image: np.ndarray, label: np.ndarray, path: Path, *, num_classes: int, ndim: int
) -> tuple[np.ndarray, np.ndarray]:  # float32 (…), uint8 (…)
    """Return a sample in the dtypes that training takes, or say what is wrong with its file.

    Raises:
        InputError: shapes, labels outside 0…num_classes, NaN, or intensities not about [0, 1].
    """
    if image.shape != label.shape or image.ndim != ndim or not image.size:
        raise InputError(
            f"{path} holds an image {image.shape} and a label {label.shape}, expected the same "
            f"non-empty {ndim}-D shape; run preprocess again"
        )
    for name, array in (("image", image), ("label", label)):
        if array.dtype.kind not in "fiub":
            raise InputError(f"{path} holds {name} values of type {array.dtype}, expected numbers")
    low, high = float(image.min()), float(image.max())  # NaN propagates to both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path} holds NaN or infinite intensities; run preprocess again")
    if low < PLAUSIBLE_RANGE[0] or high > PLAUSIBLE_RANGE[1]:
        raise InputError(
            f"{path} holds intensities from {low:g} to {high:g}, which look like raw HU or grey "
            "values where [0, 1] is expected; run preprocess on the raw scans"
        )
    as_class = label.astype(np.uint8)
    if (as_class != label).any() or as_class.max() > num_classes:
        values = np.unique(label)
        wrong = [f"{v:g}" for v in values if not (0 <= v <= num_classes and v == int(v))]
        raise InputError(
            f"{path} holds label values {first_few(wrong)}, expected 0…{num_classes}; pass the "
            "right --num_classes or map the labels by preprocess"
        )
    return np.ascontiguousarray(image, dtype=np.float32), as_class


class RandomGenerator:
    """Augment and resize one sample, as a `transform` of `Synapse_dataset`.

    Args:
        output_size: (rows, columns) of the network's input.
        low_res: (rows, columns) of its logits.
        seed: with one, the choices about a sample are keyed by (seed, epoch, index) and `epoch`
            must be set before each; without, they come from torch's random state, which data
            loader workers advance anew in every epoch.
    """

    def __init__(
        self, output_size: Iterable[int], low_res: Iterable[int], seed: int | None = None
    ) -> None:
        self.output_size = tuple(output_size)
        self.low_res = tuple(low_res)
        self.seed = seed
        self.epoch = 0

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """From `image`, `label` (H, W) to `image` (3, S, S), `label`, `low_res_label`."""
        if self.seed is None:
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
        else:
            rng = keyed_rng(self.seed, self.epoch, sample["index"])
        batch = prepare_batch(
            [torch.as_tensor(sample["image"])],
            [torch.as_tensor(sample["label"])],
            [draw_augmentation(rng)],
            output_size=self.output_size,
            low_res=self.low_res,
        )
        return {key: value[0] for key, value in batch.items()} | {"label": batch["label"][0].long()}


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    try:
        with h5py.File(path, "r") as file:
            for key in ("image", "label"):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise InputError(
                        f"{path} has no data set named {key} (it holds "
                        f"{', '.join(file) or 'nothing'}); write it by preprocess"
                    )
            return {key: file[key][()] for key in ("image", "label")}
    except InputError:
        raise
    except Exception as error:  # on damaged bytes the parser raises nearly anything
        raise InputError(
            f"{path} is not a readable h5 file ({error}); run preprocess again"
        ) from None


def _repeats(names: list[str]) -> bool:
    return len(set(names)) != len(names)
