"""A test script in the manner of the original's, volume by volume through a DataLoader.

Each volume is scored twice: by `utils.test_single_volume`, and by the script itself, slice by slice
with scipy, einops and medpy.
"""

import argparse
import os
from importlib import import_module

import numpy as np
import SimpleITK as sitk
import torch
from einops import repeat
from icecream import ic
from medpy import metric
from scipy.ndimage import zoom
from torch.utils.data import DataLoader
from tqdm import tqdm

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


def metric_percase(pred, gt):
    if pred.sum() > 0 and gt.sum() > 0:
        return metric.binary.dc(pred, gt), metric.binary.hd95(pred, gt)
    return (1, 0) if pred.sum() > 0 else (0, 0)


def score_slice_by_slice(image, label, net, classes, patch_size, input_size, path, case):
    image, label = image.squeeze(0).cpu().numpy(), label.squeeze(0).cpu().numpy()
    device = next(net.parameters()).device
    prediction = np.zeros_like(label)
    for ind in range(image.shape[0]):
        x, y = image[ind].shape
        small = zoom(image[ind], (input_size[0] / x, input_size[1] / y), order=3)
        factor = (patch_size[0] / input_size[0], patch_size[1] / input_size[1])
        inputs = torch.from_numpy(zoom(small, factor, order=3)).unsqueeze(0).unsqueeze(0).float()
        inputs = repeat(inputs, "b c h w -> b (repeat c) h w", repeat=3).to(device)
        with torch.no_grad():
            masks = net(inputs, True, patch_size[0])["masks"]
            out = torch.argmax(torch.softmax(masks, dim=1), dim=1).squeeze(0).cpu().numpy()
        out_h, out_w = out.shape
        prediction[ind] = zoom(out, (x / out_h, y / out_w), order=0)
    pred_itk = sitk.GetImageFromArray(prediction.astype(np.float32))
    pred_itk.SetSpacing((1, 1, 1))
    sitk.WriteImage(pred_itk, os.path.join(path, case + "_by_slices.nii.gz"))
    return [metric_percase(prediction == i, label == i) for i in range(1, classes + 1)]


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
    for _i_batch, sampled_batch in tqdm(enumerate(testloader)):
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
        by_slices = score_slice_by_slice(
            image, label, net, 8, [64, 64], [32, 32], args.output_dir, case_name
        )
        difference = float(np.abs(np.array(metric_i) - np.array(by_slices)).max())
        ic(case_name, difference)
        metric_list += np.array(metric_i)
        print(case_name, h, w, np.mean(metric_i, axis=0)[0], np.mean(metric_i, axis=0)[1])
    metric_list = metric_list / len(db_test)
    for i in range(1, 9):
        print(f"class {i} mean_dice {metric_list[i - 1][0]} mean_hd95 {metric_list[i - 1][1]}")
