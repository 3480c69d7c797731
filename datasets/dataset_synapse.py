"""The training slices and test volumes that a list names.

`Synapse_dataset` keeps the name and the samples of the original. The training loop reads slices
without the transform, and augments whole batches on the device.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import InputError, MissingFileError, first_few, warn
from common.files import load_arrays, require_file, require_folder
from common.names import LONGEST_NAME, lines_of, safe_name
from datasets.augmentation import RandomGenerator, random_rot_flip, random_rotate
from datasets.digests import slice_digests
from datasets.h5_files import count_slices, read_h5
from datasets.neighbours import require_channels, slices_around, with_neighbours
from datasets.prepared_files import (
    SampleFacts,
    check_attributes,
    check_declared,
    check_sample,
    read_geometry,
    read_orientation,
)

# What scripts of the field import from here.
__all__ = ["RandomGenerator", "Synapse_dataset", "random_rot_flip", "random_rotate"]

PUBLISHED_LISTS = Path(__file__).resolve().parent.parent / "lists" / "lists_Synapse"


@dataclass(frozen=True)
class SplitFiles:
    """Where the files of a split lie, and what they hold.

    The first folder, suffix and list are those of preprocess, and the published ones. The others
    are those of SSL4MIS, whose prepared ACDC many projects share.
    """

    folders: tuple[str, ...]  # below the folder that the user passes
    suffixes: tuple[str, ...]
    lists: tuple[str, ...]
    what: str  # name in messages
    ndim: int  # of a label


SPLITS = {
    "train": SplitFiles(
        folders=("train_npz", "data/slices", "slices"),
        suffixes=(".npz", ".h5"),
        lists=("train.txt", "train_slices.list"),
        what="training data",
        ndim=2,
    ),
    "test_vol": SplitFiles(
        folders=("test_vol_h5", "data"),
        suffixes=(".npy.h5", ".h5"),
        lists=("test_vol.txt", "test.list"),
        what="test data",
        ndim=3,
    ),
}


class Synapse_dataset(Dataset):
    """The slices (`split="train"`) or volumes (`split="test_vol"`) that a list names.

    Scripts written against the original do not give `num_classes`. They may read what the original
    reads, with a warning: lists of other names, which name volumes; a name more than once;
    intensities far outside [0, 1].

    Args:
        base_dir: folder of the `.npz` slices or `.npy.h5` volumes, or the folder above it.
        list_dir: folder of `train.txt` and `test_vol.txt`; None: the folder `lists` beside the
            data if it exists, else the published split.
        split: "train" or "test_vol".
        transform: called with each sample, e.g. a `RandomGenerator` with each slice.
        num_classes: the largest label that is allowed; None: 255.
        lenient: read what the original reads; None: if `num_classes` is None.

    Raises:
        MissingFileError: the folder, the list or a file that the list names does not exist.
        InputError: the list is empty, or holds a name that would leave the folder.
    """

    def __init__(
        self,
        base_dir: str | Path,
        list_dir: str | Path | None,
        split: str,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        *,
        num_classes: int | None = None,
        lenient: bool | None = None,
    ) -> None:
        self.lenient = num_classes is None if lenient is None else lenient
        if split not in SPLITS:
            if not self.lenient:
                raise InputError(f"split is {split!r}, expected 'train' or 'test_vol'")
            warn(f"split is {split!r} and not 'train', so its list names volumes (.npy.h5)")
        self.split = split
        self.transform = transform
        self.num_classes = num_classes
        self.around: dict[Path, tuple[Path, Path]] | None = None  # see `between_neighbours`
        other = replace(SPLITS["test_vol"], lists=(f"{split}.txt", f"{split}.list"))
        self.files = files = SPLITS.get(split, other)
        base = require_folder(
            base_dir, what=f"{files.what} folder", remedy="run preprocess, or check the path"
        )
        self.data_dir = _data_folder(base, files)
        self.list_path = find_list(base, self.data_dir, list_dir, files)
        longest = 255 if split == "train" else LONGEST_NAME  # the names of results are longer
        names = read_list(self.list_path, may_repeat=self.lenient, longest=longest)
        self.sample_list = [_case_name(name, files) for name in names]
        self.paths = [_sample_path(self.data_dir, name, files) for name in self.sample_list]
        absent = [path.name for path in self.paths if not path.is_file()]
        if absent:
            raise MissingFileError(
                f"{len(absent)} of the {len(self.paths)} files that {self.list_path} names are not "
                f"in {self.data_dir}, with none of the suffixes {', '.join(files.suffixes)}: "
                f"{first_few(absent)}; run preprocess, or pass the --list_dir of these data"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image`, `label`, `index` and `case_name` of a sample, after the transform.

        A slice is (H, W) and a volume (D, H, W); images in colour, and slices between their
        neighbours, have 3 before H. Images are float32, about [0, 1]; labels are uint8.
        """
        sample = self.read(index)
        if self.around is not None:
            images = [self._read(path)["image"] for path in self.around[self.paths[index]]]
            sample["image"] = with_neighbours(*images, sample["image"], self.paths[index])
        if self.transform is not None:
            sample = self.transform(sample)
        sample["case_name"] = self.sample_list[index]
        return sample

    def read(self, index: int) -> dict[str, Any]:
        """Read and check `image`, `label` and `index` of a sample, as its file holds them."""
        return self._read(self.paths[index]) | {"index": index}

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        check = partial(check_declared, path=path, ndim=self.files.ndim)
        is_npz = path.suffix == ".npz"
        arrays = load_arrays(path, ("image", "label"), check) if is_npz else read_h5(path, check)
        image, label = check_sample(
            arrays["image"],
            arrays["label"],
            path,
            num_classes=self.num_classes,
            any_range=self.lenient,
        )
        return {"image": image, "label": label}

    def geometry(self, index: int) -> dict[str, tuple[float, ...]] | None:
        """Return spacing, origin and direction of a volume's scan; None if they are not stored."""
        return read_geometry(self.paths[index])

    def orientation(self, index: int) -> str | None:
        """Return the directions of a volume's axes, e.g. LPS; None: the axes of its scan."""
        return read_orientation(self.paths[index])

    def count_slices(self) -> int:
        """Return the number of slices in all volumes together."""
        return sum(map(count_slices, self.paths))

    def subset(self, indices: Sequence[int]) -> Synapse_dataset:
        """Return a data set with only these samples, in this order."""
        part = copy.copy(self)
        part.sample_list = [self.sample_list[index] for index in indices]
        part.paths = [self.paths[index] for index in indices]
        return part

    def between_neighbours(self) -> Synapse_dataset:
        """Return a data set of slices whose images are (3, H, W): before, the slice, after (2.5-D).

        The neighbours come from all slices of this data set, also in its subsets.

        Raises:
            InputError: a name does not tell the number of its slice.
        """
        if self.around is not None:
            return self
        part = copy.copy(self)
        paths = dict(zip(self.sample_list, self.paths, strict=True))
        part.around = {
            paths[name]: (paths[before], paths[after])
            for name, (before, after) in slices_around(self.sample_list, self.list_path).items()
        }
        return part

    def check(self, workers: int = 4) -> list[SampleFacts]:
        """Read every sample once, so that a faulty file stops a run before it starts.

        Raises:
            InputError: the first faulty file, and the number of other faulty files.
        """
        facts: list[SampleFacts] = []
        errors: list[InputError] = []
        with ThreadPoolExecutor(workers) as pool:
            results = pool.map(self._facts, range(len(self)))
            for result in tqdm(
                results, total=len(self), desc=f"checking {self.split}", leave=False, disable=None
            ):
                if isinstance(result, InputError):
                    errors.append(result)
                else:
                    facts.append(result)
        if len(errors) > 1:
            raise InputError(f"{errors[0]}; {len(errors) - 1} more files are faulty")
        if errors:
            raise errors[0]
        if self.around is not None:
            require_channels(facts)
        colour = [sample.name for sample in facts if sample.colour]
        if colour and len(colour) < len(facts):
            raise InputError(
                f"{self.list_path} names grey images and {len(colour)} images in colour: "
                f"{first_few(colour)}; prepare all of them together"
            )
        return facts

    def _facts(self, index: int) -> SampleFacts | InputError:
        try:
            sample = self.read(index)
            if self.files.ndim == 3:
                check_attributes(self.paths[index])
        except InputError as error:
            return error
        image, label = sample["image"], sample["label"]
        counts = np.bincount(label.ravel(), minlength=(self.num_classes or 0) + 1)
        return SampleFacts(
            name=self.sample_list[index],
            shape=label.shape,
            colour=image.ndim > label.ndim,
            low=float(image.min()),
            high=float(image.max()),
            voxels=tuple(counts.tolist()),
            digest=hashlib.blake2b(image.data, digest_size=16).hexdigest(),
            slice_digests=tuple(slice_digests(image if label.ndim == 3 else image[None])),
            label_digest=hashlib.blake2b(np.ascontiguousarray(label), digest_size=16).hexdigest(),
        )


def _data_folder(base: Path, files: SplitFiles) -> Path:
    """Return the folder of a split below `base` that holds its files, else `base` itself."""
    folders = [base / name for name in files.folders if (base / name).is_dir()]
    for folder in folders:
        if any(next(folder.glob(f"*{suffix}"), None) for suffix in files.suffixes):
            return folder
    return base / files.folders[0] if base / files.folders[0] in folders else base


def _case_name(listed: str, files: SplitFiles) -> str:
    """Return a name of a list without a file's suffix, which some lists have."""
    ending = next((suffix for suffix in files.suffixes if listed.endswith(suffix)), "")
    return listed.removesuffix(ending)


def _sample_path(folder: Path, name: str, files: SplitFiles) -> Path:
    """Return the file of a sample; if there is none, the one that preprocess would write."""
    paths = [folder / f"{name}{suffix}" for suffix in files.suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def find_list(base: Path, data_dir: Path, list_dir: str | Path | None, files: SplitFiles) -> Path:
    """Return the list of a split: in `list_dir`, else beside the data, else the published."""
    if list_dir is not None:
        given = [Path(list_dir) / name for name in files.lists]
        found = next((path for path in given if path.is_file()), given[0])
        return require_file(found, what="list", remedy="check --list_dir")
    beside_data = [
        folder / name
        for folder in (data_dir / "lists", data_dir.parent / "lists", base / "lists", base)
        for name in files.lists
    ]
    published = PUBLISHED_LISTS / files.lists[0]
    found = next((path for path in beside_data if path.is_file()), published)
    return require_file(found, what="list", remedy="pass the list_dir of these data")


def read_list(path: Path, *, may_repeat: bool = False, longest: int = 255) -> list[str]:
    """Read the names in a list file, one per line, of `longest` bytes; none may leave the folder.

    Args:
        may_repeat: a name that occurs more than once is warned of and kept.
    """
    lines = lines_of(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
    names = [safe_name(line, source=path, longest=longest) for line in lines]
    if not names:
        raise InputError(f"list {path} is empty, expected one case or slice name per line")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        found = f"list {path} names {first_few(repeated)} more than once"
        if not may_repeat:
            raise InputError(f"{found}; remove the repeated lines")
        warn(f"{found}; these samples count as often")
    return names
