"""The command lines of train.py, test.py, predict.py and demo.py.

The flags themselves stand in the other `*_flags.py`, one row each.
"""

from __future__ import annotations

from config.inference_flags import DEMO, PREDICT, TEST
from config.parser import Parser
from config.train_flags import TRAIN


def train_parser() -> Parser:
    """Return the parser of `train.py`."""
    parser = Parser(
        prog="train.py",
        description="Fine-tune SAM with LoRA on training slices.\n\n"
        "The published recipe:\n"
        "  python train.py --root_path data/Synapse --output output --warmup --AdamW\n"
        "Without base weights, on a CPU:\n"
        "  python train.py --root_path data/Synapse --vit_name vit_tiny --ckpt none "
        "--img_size 224 \\\n      --batch_size 8 --n_gpu 1 --base_lr 3e-4 --clip_grad 0.5 "
        "--warmup --AdamW",
    )
    parser.add_flags(TRAIN)
    return parser


def test_parser() -> Parser:
    """Return the parser of `test.py`."""
    parser = Parser(
        prog="test.py",
        description="Segment test volumes and score them.\n\n"
        "A published adapter:\n"
        "  python test.py --volume_path testset/test_vol_h5 --lora_ckpt checkpoints/epoch_159.pth "
        "--is_savenii\n"
        "A run of train.py, with its settings and its newest adapter:\n"
        "  python test.py --config output/RUN/config.json --volume_path data/Synapse",
    )
    parser.add_flags(TEST)
    return parser


def predict_parser() -> Parser:
    """Return the parser of `predict.py`."""
    parser = Parser(
        prog="predict.py",
        description="Segment scans or pictures that have no labels.\n\n"
        "One scan, a folder of scans, a DICOM series, a picture:\n"
        "  python predict.py --input scan.nii.gz --config output --output out\n"
        "  python predict.py --input scans/ --config output/RUN --output out\n"
        "Label files have the format and geometry of the scan. A DICOM series gives .mha, a\n"
        "picture an index PNG. Beside them: the volume of every organ (volumes.csv), a picture of\n"
        "every case (overlays/), and the names and colours of the classes for ITK-SNAP\n"
        "(labels.txt) and 3D Slicer (labels.ctbl). After an interruption, run the same command\n"
        "again: finished cases are kept. Exit code 3: some cases failed, all others are done.",
    )
    parser.add_flags(PREDICT)
    return parser


def demo_parser() -> Parser:
    """Return the parser of `demo.py`."""
    parser = Parser(
        prog="demo.py",
        description="Open a local page that segments scans, shows and corrects them.\n\n"
        "The newest run of train.py in a folder, or the network of `make quickstart`:\n"
        "  python demo.py --config output\n"
        "  python demo.py\n"
        "The page is on this computer alone (127.0.0.1) and sends nothing anywhere. What is\n"
        "dropped there is deleted when its tab is closed. Needs requirements-demo.txt.",
    )
    parser.add_flags(DEMO)
    return parser
