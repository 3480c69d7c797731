"""A training script in the manner of the original's: its flags, its imports, its calls.

It trains once with `trainer_synapse` and once with a loop of its own, as scripts of the field do.
"""

import argparse
import logging
import os
import random
from importlib import import_module

import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
from einops import repeat
from icecream import ic
from scipy.ndimage import zoom
from tensorboardX import SummaryWriter
from torch.nn.modules.loss import CrossEntropyLoss
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.dataset_synapse import RandomGenerator, Synapse_dataset
from sam_lora_image_encoder import LoRA_Sam  # noqa: F401  as such scripts import it
from segment_anything import sam_model_registry
from trainer import trainer_synapse
from utils import DiceLoss, Focal_loss  # noqa: F401

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


class GreySlice:
    """A transform that resizes with scipy and makes three channels with einops."""

    def __init__(self, output_size, low_res):
        self.output_size, self.low_res = output_size, low_res

    def __call__(self, sample):
        image, label = np.asarray(sample["image"]), np.asarray(sample["label"])
        if random.random() > 0.5:
            image, label = np.flipud(image), np.flipud(label)
        factor = [self.output_size[0] / image.shape[0], self.output_size[1] / image.shape[1]]
        image, label = zoom(image, factor, order=3), zoom(label, factor, order=0)
        factor = [self.low_res[0] / label.shape[0], self.low_res[1] / label.shape[1]]
        low_res_label = zoom(label, factor, order=0)
        image = torch.from_numpy(image.astype(np.float32)).unsqueeze(0)
        return {
            "image": repeat(image, "c h w -> (repeat c) h w", repeat=3),
            "label": torch.from_numpy(label.astype(np.float32)).long(),
            "low_res_label": torch.from_numpy(low_res_label.astype(np.float32)).long(),
        }


def trainer_of_the_script(args, model, snapshot_path, multimask_output, low_res, transform):
    db_train = Synapse_dataset(
        base_dir=args.root_path, list_dir=args.list_dir, split="train", transform=transform
    )
    trainloader = DataLoader(db_train, batch_size=args.batch_size, shuffle=True)
    device = next(model.parameters()).device
    model.train()
    ce_loss, dice_loss = CrossEntropyLoss(), DiceLoss(args.num_classes + 1)
    trainable = filter(lambda p: p.requires_grad, model.parameters())
    optimizer = optim.AdamW(trainable, lr=args.base_lr, betas=(0.9, 0.999), weight_decay=0.1)
    writer = SummaryWriter(snapshot_path + "/log")
    iter_num = 0
    for _epoch_num in tqdm(range(args.max_epochs), ncols=70):
        for sampled_batch in trainloader:
            image_batch = sampled_batch["image"].to(device)
            low_res_label_batch = sampled_batch["low_res_label"].to(device)
            outputs = model(image_batch, multimask_output, args.img_size)
            low_res_logits = outputs["low_res_logits"]
            loss_ce = ce_loss(low_res_logits, low_res_label_batch[:].long())
            loss_dice = dice_loss(low_res_logits, low_res_label_batch, softmax=True)
            loss = (1 - args.dice_param) * loss_ce + args.dice_param * loss_dice
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            iter_num += 1
            writer.add_scalar("info/total_loss", loss, iter_num)
            masks = torch.argmax(torch.softmax(outputs["masks"], dim=1), dim=1, keepdim=True)
            writer.add_image("train/Prediction", masks[0] * 50, iter_num)
            logging.info("iteration %d : loss : %f", iter_num, loss.item())
    save_mode_path = os.path.join(snapshot_path, "of_the_script.pth")
    model.save_lora_parameters(save_mode_path)
    ic(iter_num, low_res)
    writer.close()
    return "Training Finished!"


if __name__ == "__main__":
    random.seed(args.seed)
    np.random.seed(args.seed)
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

    sizes = {"output_size": [args.img_size, args.img_size], "low_res": [low_res, low_res]}
    for transform in (RandomGenerator(**sizes), GreySlice(**sizes)):
        print(trainer_of_the_script(args, net, args.output, multimask_output, low_res, transform))
