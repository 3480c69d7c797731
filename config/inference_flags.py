"""The flags of test.py, predict.py, demo.py and `python -m tools.adapter merge`, one row each."""

from __future__ import annotations

from dataclasses import replace

from config.network_flags import NETWORK
from config.parser import Flag
from config.shared_flags import (
    CONFIG,
    DATASET,
    LIST_DIR,
    NUM_CLASSES,
    PRECISION,
    PROCESSES,
    REPEATABILITY,
    SAME_CODE,
)
from datasets.intensity import RULES
from datasets.registry import LARGEST_SIDE
from evaluation.metrics import NSD_TOLERANCE

INPUT_SIZE = Flag(
    "input_size",
    "side to which slices are resized first, as the training slices were; default: what the "
    "adapter records, for published adapters 224",
    type=int,
    low=1,
    high=LARGEST_SIDE,
)
ADAPTER = "adapter file; default: the newest of the run of --config, else checkpoints/epoch_159.pth"
# The adapter records these settings of its network; the flags are for adapters that do not.
ADAPTER_NETWORK = tuple(
    replace(flag, help=ADAPTER)
    if flag.name == "lora_ckpt"
    else replace(flag, help=f"{flag.help}; the adapter records it")
    if flag.in_adapter
    else flag
    for flag in NETWORK
)
INFERENCE = (
    Flag(
        "batch_size",
        "slices to compute at once; default: 12, on a CPU 2",
        type=int,
        low=1,
        high=100_000,
        changes_numbers=False,
        from_config=False,
    ),
    *(replace(flag, from_config=False) for flag in PRECISION),
    replace(PROCESSES, from_config=False),
)
NO_VIEWER = Flag(
    "no_viewer",
    "write no viewer.html, the page on which all cases can be scrolled through",
    type=bool,
    changes_numbers=False,
    from_config=False,
)
TEST = {
    "data": (
        Flag("volume_path", "folder of the .npy.h5 volumes", default="testset/test_vol_h5"),
        Flag(
            "output_dir",
            "folder for tables, pictures and page; default: test/ in the run of --config, else "
            "output/test",
        ),
        Flag(
            "overwrite",
            "replace files in --output_dir that test.py has not written, or that were changed",
            type=bool,
            changes_numbers=False,
            from_config=False,
        ),
        Flag("is_savenii", "write prediction, image and label as NIfTI", type=bool),
        Flag(
            "nsd_tolerance",
            "distance in mm within which surfaces agree, for the normalised surface Dice",
            type=float,
            default=NSD_TOLERANCE,
            low=0,
            high=1000,
        ),
        NO_VIEWER,
        Flag(
            "check_with_medpy",
            "compute every DSC and HD95 a second time with medpy, the reference, and report the "
            "largest difference",
            type=bool,
        ),
        CONFIG,
        DATASET,
        LIST_DIR,
        NUM_CLASSES,
    ),
    "network": (*ADAPTER_NETWORK, INPUT_SIZE, SAME_CODE),
    "speed": INFERENCE,
    "repeatability": REPEATABILITY,
}
PREDICT = {
    "data": (
        Flag(
            "input",
            "a scan (.nii.gz, .nrrd, .mha), a picture, the folder of a DICOM series, a folder of "
            "any of these, or a .csv table that lists them",
            required=True,
            changes_numbers=False,
        ),
        Flag(
            "output",
            "folder to write; it is made if it does not exist",
            required=True,
            changes_numbers=False,
            from_config=False,
        ),
        Flag(
            "overwrite",
            "segment finished cases again, and replace label files of other programs",
            type=bool,
            changes_numbers=False,
        ),
        Flag(
            "part",
            "K/N: segment every N-th scan from the K-th on, for N machines or SLURM jobs, all into "
            "the same --output; needed only where its file system cannot lock files",
            changes_numbers=False,
            from_config=False,
        ),
        Flag(
            "retry",
            "also segment scans that ended two processes that segmented them",
            type=bool,
            changes_numbers=False,
            from_config=False,
        ),
        CONFIG,
        Flag(
            "keep_names",
            "name the results of a DICOM series after its folder even if that names the patient; "
            "default: such a series is called series_ and 8 digits",
            type=bool,
            changes_numbers=False,
        ),
        Flag("channel", "index of the volume in a 4-D file, from 0", type=int, low=0, high=65535),
        Flag(
            "intensity",
            "how values become [0, 1], for a network whose training data do not record it: ct (HU "
            "-125…275), mr (percentiles of each scan) or picture (0…255)",
            choices=tuple(RULES),
        ),
        Flag(
            "window",
            "other limits for the intensity rule: LOW HIGH",
            type=float,
            low=-1e12,
            high=1e12,
            takes_list=True,
        ),
        DATASET,
    ),
    "results": (
        Flag(
            "format",
            "format of the label files; .seg.nrrd is that of 3D Slicer, with names and colours; "
            "default: that of each scan",
            choices=(".nii.gz", ".nrrd", ".seg.nrrd", ".mha"),
        ),
        Flag("dicom_seg", "also write a DICOM segmentation of every DICOM series", type=bool),
        NO_VIEWER,
        Flag("probabilities", "also write the probability of each class, 0…1", type=bool),
        Flag(
            "flips",
            "average over slices flipped along these axes; do not use it for organs that only "
            "their side tells apart",
            default=[],
            choices=("rows", "columns"),
            takes_list=True,
        ),
        Flag("largest_component", "keep only the largest component of each organ", type=bool),
    ),
    "network": (
        *ADAPTER_NETWORK,
        Flag(
            "onnx",
            "a network that `python -m tools.export` wrote, in place of --ckpt and --lora_ckpt; "
            "needs requirements-onnx.txt",
            # The content of the file counts, not its name (`prediction_key`).
            changes_numbers=False,
            from_config=False,
        ),
        replace(NUM_CLASSES, help="number of foreground classes of the adapter"),
        INPUT_SIZE,
        SAME_CODE,
    ),
    "speed": INFERENCE,
    "repeatability": (
        REPEATABILITY[0],
        replace(REPEATABILITY[1], changes_numbers=False),
    ),
}
MERGE = {
    "data": (DATASET, replace(NUM_CLASSES, help="number of foreground classes of the adapter")),
    "network": (*ADAPTER_NETWORK, SAME_CODE),
}
PAGE = (
    Flag(
        "port",
        "port of 127.0.0.1 on which the page is opened",
        type=int,
        default=7860,
        low=1,
        high=65535,
        from_config=False,
    ),
    Flag(
        "max_upload_mb",
        "largest file that the page takes, in MB",
        type=int,
        default=1024,
        low=1,
        high=1 << 20,
        from_config=False,
    ),
    Flag(
        "max_voxels",
        "most voxels of a scan that the page takes",
        type=int,
        default=300_000_000,
        low=1,
        high=10**12,
        from_config=False,
    ),
    Flag(
        "corrected",
        "folder into which the page writes corrected scans, as training data for "
        "`python -m preprocess.prepare`",
        default="corrected",
        from_config=False,
    ),
)
# What the page decides itself, or has no use for.
_NOT_ON_THE_PAGE = {"input", "output", "overwrite", "part", "retry", "format", "dicom_seg", "onnx"}
_NOT_ON_THE_PAGE |= {"no_viewer", "probabilities", "processes"}
DEMO = {
    title: tuple(flag for flag in flags if flag.name not in _NOT_ON_THE_PAGE)
    for title, flags in ({"page": PAGE} | PREDICT).items()
}
