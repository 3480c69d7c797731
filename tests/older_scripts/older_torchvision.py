"""A script of the field that composes transforms and draws a grid of slices with torchvision."""

import argparse

import torch
from tensorboardX import SummaryWriter
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.utils import make_grid

from datasets.dataset_synapse import RandomGenerator, Synapse_dataset

parser = argparse.ArgumentParser()
parser.add_argument("--root_path", type=str)
parser.add_argument("--list_dir", type=str)
parser.add_argument("--output", type=str)
args = parser.parse_args()

if __name__ == "__main__":
    torch.manual_seed(1234)
    db_train = Synapse_dataset(
        base_dir=args.root_path,
        list_dir=args.list_dir,
        split="train",
        transform=transforms.Compose([RandomGenerator(output_size=[64, 64], low_res=[16, 16])]),
    )
    sampled_batch = next(iter(DataLoader(db_train, batch_size=4, shuffle=True)))
    grid = make_grid(sampled_batch["image"], nrow=2, normalize=True)
    writer = SummaryWriter(args.output)
    writer.add_image("train/Image", grid, 1)
    writer.close()
    print(tuple(grid.shape))
