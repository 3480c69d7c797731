"""Every flag of the programs and its default; what they mean together is checked in `config.py`."""

from __future__ import annotations

import argparse

from datasets.registry import DATASETS
from evaluation.metrics import NSD_TOLERANCE
from segment_anything import ENCODERS


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines and shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def train_parser() -> argparse.ArgumentParser:
    """The flags of `train.py`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune SAM with LoRA on training slices.\n\n"
        "The published recipe:\n"
        "  python train.py --root_path data/Synapse --output output --warmup --AdamW\n"
        "Without base weights, on a CPU:\n"
        "  python train.py --root_path data/Synapse --vit_name vit_tiny --ckpt none "
        "--img_size 224 \\\n      --batch_size 8 --n_gpu 1 --base_lr 3e-4 --clip_grad 0.5 "
        "--warmup --AdamW",
        formatter_class=HelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--root_path", help="folder of train_npz/, or that folder itself (required)")
    data.add_argument("--output", default="output", help="folder that run folders are made in")
    data.add_argument("--num_workers", type=int, help="loader processes; default 4, on a CPU 0")
    data.add_argument(
        "--check",
        action="store_true",
        help="read all data, show one page of facts and warnings, and stop",
    )
    _add_data_flags(data)
    add_network_flags(parser.add_argument_group("network"))

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--max_epochs", type=int, default=200, help="length of the rate's schedule")
    recipe.add_argument("--stop_epoch", type=int, default=160, help="epochs that are trained")
    recipe.add_argument("--max_iterations", type=int, help="stop after so many steps, if sooner")
    recipe.add_argument(
        "--batch_size", type=int, default=12, help="slices that a GPU takes at once"
    )
    recipe.add_argument(
        "--n_gpu",
        type=int,
        default=2,
        help="GPUs of the recipe: an update is of batch_size × n_gpu slices on any hardware, in "
        "parts of batch_size where there are fewer GPUs",
    )
    recipe.add_argument(
        "--global_batch", type=int, help="slices of an update; default: batch_size × n_gpu"
    )
    recipe.add_argument("--base_lr", type=float, default=0.005, help="largest learning rate")
    recipe.add_argument("--warmup", action="store_true", help="raise the rate linearly at first")
    recipe.add_argument("--warmup_period", type=int, default=250, help="steps of the warmup")
    recipe.add_argument("--lr_exp", type=float, default=0.9, help="exponent of the rate's decay")
    recipe.add_argument("--AdamW", action="store_true", help="AdamW instead of SGD")
    recipe.add_argument("--dice_param", type=float, default=0.8, help="weight of Dice in the loss")
    recipe.add_argument(
        "--clip_grad", type=float, help="largest norm of the gradient; default: not clipped"
    )
    recipe.add_argument("--no_augment", action="store_true", help="train on the slices as they are")

    saving = parser.add_argument_group("saving and going on")
    saving.add_argument(
        "--resume",
        help="a run folder to go on with, or 'auto': the newest under --output with these "
        "settings, a new run if there is none",
    )
    saving.add_argument(
        "--save_minutes", type=float, default=10, help="between saves of the full state"
    )
    saving.add_argument("--save_steps", type=int, help="steps between saves of the full state")
    saving.add_argument("--keep_states", type=int, default=2, help="full states that are kept")
    saving.add_argument(
        "--skip_nan",
        type=int,
        default=0,
        help="updates that may be left out because their loss is NaN or infinite; more stop the "
        "run. Watching for them costs a wait for the GPU in every step",
    )

    validation = parser.add_argument_group("validation")
    validation.add_argument(
        "--val_every",
        type=int,
        help="epochs between validations on held-out training cases; default: none is held out, "
        "as published",
    )
    validation.add_argument("--val_cases", type=int, help="cases held out; default: a sixth")
    validation.add_argument(
        "--patience", type=int, help="stop after so many validations without a better score"
    )

    speed = parser.add_argument_group("speed")
    _add_precision_flags(speed)
    _add_processes_flag(speed)
    speed.add_argument("--compile", action="store_true", help="torch.compile; pays on a GPU")
    speed.add_argument(
        "--checkpoint_blocks",
        action="store_true",
        help="keep less of the encoder for the gradient and compute it again: same numbers, "
        "less memory, more time",
    )
    parser.add_argument_group("logging").add_argument(
        "--log_every", type=int, default=20, help="steps between writes of the scalars"
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The flags of `test.py`."""
    parser = argparse.ArgumentParser(
        prog="test.py",
        description="Segment test volumes and score them.\n\n"
        "A published adapter:\n"
        "  python test.py --volume_path testset/test_vol_h5 --lora_ckpt checkpoints/epoch_159.pth "
        "--is_savenii\n"
        "A run of train.py, with its own settings and newest adapter:\n"
        "  python test.py --config output/RUN/config.json --volume_path data/Synapse",
        formatter_class=HelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--volume_path", default="testset/test_vol_h5", help="folder of the .npy.h5 volumes"
    )
    data.add_argument(
        "--output_dir", help="default: test/ in the run of --config, else output/test"
    )
    data.add_argument(
        "--is_savenii", action="store_true", help="write prediction, image and label as NIfTI"
    )
    data.add_argument(
        "--nsd_tolerance",
        type=float,
        default=NSD_TOLERANCE,
        help="mm within which surfaces agree, of the normalised surface Dice",
    )
    _add_data_flags(data)
    network = parser.add_argument_group("network")
    add_network_flags(network)
    _add_input_size_flag(network)
    _add_inference_flags(parser.add_argument_group("speed"))
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """The flags of `predict.py`."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Segment scans or pictures that have no labels.\n\n"
        "One scan, a folder of scans, a DICOM series, a picture:\n"
        "  python predict.py --input scan.nii.gz --lora_ckpt output/RUN/best.pth --output out\n"
        "  python predict.py --input scans/ --config output/RUN --output out\n"
        "Labels come in the scan's own format and geometry (a DICOM series as .mha, a picture as\n"
        "index PNG), with the volume of every organ (volumes.csv), a picture of every case\n"
        "(overlays/), and names and colours for ITK-SNAP (labels.txt) and 3D Slicer\n"
        "(labels.ctbl). Run the same command again after an interruption: finished cases are\n"
        "kept. Exit code 3: some cases failed, the others are done.",
        formatter_class=HelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input",
        required=True,
        help="a scan (.nii.gz, .nrrd, .mha), a picture, the folder of a DICOM series, or a folder "
        "of any of these",
    )
    data.add_argument("--output", required=True, help="folder to write, made if it is missing")
    data.add_argument(
        "--overwrite",
        action="store_true",
        help="segment finished cases again, and replace label files that others wrote",
    )
    data.add_argument("--config", help="a run folder or its config.json: its newest adapter")
    data.add_argument("--channel", type=int, help="which volume of a 4-D file, from 0")
    add_dataset_flag(data)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--format",
        choices=(".nii.gz", ".nrrd", ".mha"),
        help="of the labels; default: the scan's own",
    )
    results.add_argument(
        "--probabilities", action="store_true", help="also write one volume a class, 0…1"
    )
    results.add_argument(
        "--flips",
        nargs="+",
        choices=("rows", "columns"),
        default=[],
        help="average over slices flipped so; not for organs told apart by their side alone",
    )
    results.add_argument(
        "--largest_component", action="store_true", help="keep each organ's largest piece alone"
    )
    network = parser.add_argument_group("network")
    add_network_flags(network)
    network.add_argument("--num_classes", type=int, help="foreground classes of the adapter")
    _add_input_size_flag(network)
    _add_inference_flags(parser.add_argument_group("speed"))
    return parser


def _add_input_size_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input_size",
        type=int,
        help="slices are brought to this size first, as the training slices were; default: as "
        "the adapter says, for published ones 224",
    )


def _add_inference_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch_size", type=int, help="slices at once; default 12, on a CPU 2")
    _add_precision_flags(group)
    _add_processes_flag(group)


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", help="a run folder or its config.json; the command line wins")
    add_dataset_flag(group)
    group.add_argument(
        "--list_dir", help="folder of the lists; default: lists/ beside the data, else published"
    )
    group.add_argument(
        "--num_classes", type=int, help="foreground classes; default: the data set's"
    )


def add_dataset_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        help=f"{', '.join(DATASETS)}; default: what the adapter or the prepared data say of "
        "themselves, else Synapse",
    )


def add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--vit_name", default="vit_b", choices=list(ENCODERS), help="image encoder")
    group.add_argument(
        "--ckpt",
        help="base weights; default: the encoder's public file in checkpoints/; 'none': train "
        "every weight from scratch",
    )
    group.add_argument("--lora_ckpt", help="adapter file to load")
    group.add_argument("--img_size", type=int, default=512, help="side of the network's input")
    group.add_argument("--rank", type=int, default=4, help="rank of the LoRA updates")
    group.add_argument(
        "--module",
        default="sam_lora_image_encoder",
        help="LoRA variant: sam_lora_image_encoder (SAMed) or …_mask_decoder (SAMed_s)",
    )
    group.add_argument("--seed", type=int, default=1234, help="of every random choice")
    group.add_argument(
        "--deterministic", type=int, default=1, choices=(0, 1), help="repeatable GPU kernels"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def _add_precision_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--use_amp", action="store_true", help="bf16 where the device has it, else fp16"
    )
    group.add_argument("--tf32", action="store_true", help="TF32 matrix products on NVIDIA GPUs")


def _add_processes_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--processes", type=int, help="processes started here; default: one for each GPU in use"
    )
