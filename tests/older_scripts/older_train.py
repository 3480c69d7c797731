"""A training script in the manner of the original's: its flags, its imports, its calls."""

import argparse
import os
from importlib import import_module

import torch

from sam_lora_image_encoder import LoRA_Sam  # noqa: F401  as such scripts import it
from segment_anything import sam_model_registry
from trainer import trainer_synapse

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=str, default=None)
parser.add_argument("--root_path", type=str)
parser.add_argument("--output", type=str)
parser.add_argument("--dataset", type=str, default="Synapse")
parser.add_argument("--list_dir", type=str)
parser.add_argument("--num_classes", type=int, default=8)
parser.add_argument("--max_iterations", type=int, default=30000)
parser.add_argument("--max_epochs", type=int, default=1)
parser.add_argument("--stop_epoch", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=3)
parser.add_argument("--n_gpu", type=int, default=1)
parser.add_argument("--deterministic", type=int, default=1)
parser.add_argument("--base_lr", type=float, default=0.005)
parser.add_argument("--img_size", type=int, default=64)
parser.add_argument("--seed", type=int, default=1234)
parser.add_argument("--vit_name", type=str, default="vit_tiny")
parser.add_argument("--ckpt", type=str)
parser.add_argument("--lora_ckpt", type=str, default=None)
parser.add_argument("--rank", type=int, default=4)
parser.add_argument("--warmup", action="store_true")
parser.add_argument("--warmup_period", type=int, default=250)
parser.add_argument("--AdamW", action="store_true")
parser.add_argument("--module", type=str, default="sam_lora_image_encoder")
parser.add_argument("--dice_param", type=float, default=0.8)
args = parser.parse_args()

if __name__ == "__main__":
    torch.manual_seed(args.seed)
    os.makedirs(args.output, exist_ok=True)
    sam, img_embedding_size = sam_model_registry[args.vit_name](
        image_size=args.img_size,
        num_classes=args.num_classes,
        checkpoint=args.ckpt,
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
    )
    net = import_module(args.module).LoRA_Sam(sam, args.rank)
    net = net.cuda() if torch.cuda.is_available() else net
    if args.lora_ckpt is not None:
        net.load_lora_parameters(args.lora_ckpt)
    multimask_output = args.num_classes > 1
    low_res = img_embedding_size * 4
    trainer = {"Synapse": trainer_synapse}
    print(trainer["Synapse"](args, net, args.output, multimask_output, low_res))
