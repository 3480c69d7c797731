"""Training slices and test volumes, as lists name them.

`Synapse_dataset` and `RandomGenerator` keep the names and samples that scripts of the field use;
the training loop reads plain slices and augments whole batches on the device instead.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import InputError, MissingFileError, first_few
from common.files import load_arrays, require_file, require_folder, safe_name

from .augmentation import draw_augmentation, keyed_rng, prepare_batch
from .registry import SYNAPSE
from .samples import (
    SampleFacts,
    check_sample,
    read_geometry,
    read_orientation,
    read_volume_file,
)

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED_LISTS = REPOSITORY / "lists" / "lists_Synapse"


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

        A slice is (H, W), a volume (D, H, W); image float32 about [0, 1], in colour with 3 before
        H; label uint8.
        """
        sample = self.read(index)
        if self.split == "train" and self.transform is not None:
            sample = self.transform(sample)
        sample["case_name"] = self.sample_list[index]
        return sample

    def read(self, index: int) -> dict[str, Any]:
        """`image`, `label` and `index` of one checked sample, without the transform."""
        path = self.paths[index]
        arrays = (
            load_arrays(path, ("image", "label"))
            if self.split == "train"
            else read_volume_file(path)
        )
        image, label = check_sample(
            arrays["image"],
            arrays["label"],
            path,
            num_classes=self.num_classes,
            ndim=2 if self.split == "train" else 3,
        )
        return {"image": image, "label": label, "index": index}

    def geometry(self, index: int) -> dict[str, tuple[float, ...]] | None:
        """Spacing, origin and direction of a volume's scan; None if they are not stored."""
        return read_geometry(self.paths[index])

    def orientation(self, index: int) -> str | None:
        """What the axes of a volume run towards, as LPS; None: it lies as its scan."""
        return read_orientation(self.paths[index])

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
        colour = [one.name for one in facts if one.colour]
        if colour and len(colour) < len(facts):
            raise InputError(
                f"{self.list_path} names grey images and {len(colour)} in colour: "
                f"{first_few(colour)}; prepare all of them together"
            )
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
            shape=label.shape,
            colour=image.ndim > label.ndim,
            low=float(image.min()),
            high=float(image.max()),
            voxels=tuple(counts.tolist()),
            digest=hashlib.blake2b(image.data, digest_size=16).hexdigest(),
        )


def find_list(data_dir: Path, list_dir: str | Path | None, split: str) -> Path:
    """The list file of a split: the one asked for, or the data's own, or the published one."""
    name = f"{split}.txt"
    if list_dir is not None:
        return require_file(Path(list_dir) / name, what="list", remedy="check --list_dir")
    own = [folder / "lists" / name for folder in (data_dir, data_dir.parent)]
    return next((path for path in own if path.is_file()), PUBLISHED_LISTS / name)


def read_list(path: Path) -> list[str]:
    """The names in a list file, one a line; none may leave the data folder."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = [safe_name(line.strip(), source=path) for line in lines if line.strip()]
    if not names:
        raise InputError(f"list {path} is empty; expected one case or slice name a line")
    repeated = sorted({name for name in names if names.count(name) > 1}) if _repeats(names) else []
    if repeated:
        raise InputError(f"list {path} names {first_few(repeated)} more than once; remove them")
    return names


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


def _repeats(names: list[str]) -> bool:
    return len(set(names)) != len(names)
