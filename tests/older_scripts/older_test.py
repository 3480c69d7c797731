"""A test script in the manner of the original's, volume by volume through a DataLoader."""

import argparse
import os
from importlib import import_module

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets.dataset_synapse import Synapse_dataset
from segment_anything import sam_model_registry
from utils import test_single_volume

parser = argparse.ArgumentParser()
parser.add_argument("--volume_path", type=str)
parser.add_argument("--list_dir", type=str)
parser.add_argument("--output_dir", type=str)
parser.add_argument("--ckpt", type=str)
parser.add_argument("--lora_ckpt", type=str)
args = parser.parse_args()

if __name__ == "__main__":
    sam, _ = sam_model_registry["vit_tiny"](
        image_size=64,
        num_classes=8,
        checkpoint=args.ckpt,
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
    )
    net = import_module("sam_lora_image_encoder").LoRA_Sam(sam, 4)
    net = net.cuda() if torch.cuda.is_available() else net
    net.load_lora_parameters(args.lora_ckpt)
    os.makedirs(args.output_dir, exist_ok=True)
    db_test = Synapse_dataset(base_dir=args.volume_path, list_dir=args.list_dir, split="test_vol")
    testloader = DataLoader(db_test, batch_size=1, shuffle=False, num_workers=1)
    net.eval()
    metric_list = 0.0
    for sampled_batch in testloader:
        h, w = sampled_batch["image"].shape[2:]
        image, label = sampled_batch["image"], sampled_batch["label"]
        case_name = sampled_batch["case_name"][0]
        metric_i = test_single_volume(
            image,
            label,
            net,
            classes=8,
            multimask_output=True,
            patch_size=[64, 64],
            input_size=[32, 32],
            test_save_path=args.output_dir,
            case=case_name,
            z_spacing=1,
        )
        metric_list += np.array(metric_i)
        print(case_name, h, w, np.mean(metric_i, axis=0)[0], np.mean(metric_i, axis=0)[1])
    metric_list = metric_list / len(db_test)
    for i in range(1, 9):
        print(f"class {i} mean_dice {metric_list[i - 1][0]} mean_hd95 {metric_list[i - 1][1]}")
