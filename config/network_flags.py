"""The flags that decide which network is built, one row each; an adapter file records them."""

from __future__ import annotations

from config.parser import Flag
from config.shared_flags import SCRATCH
from lora.form import KINDS
from sam_lora_image_encoder import ALL_BLOCKS, PUBLISHED_TARGETS, TARGETS
from sam_lora_image_encoder_mask_decoder import DECODER
from segment_anything import ENCODERS

# Side of the network's input. At 4096 the attention of one block has 4 billion weights a head.
LARGEST_IMAGE = 4096
# No layer is wider than 5120, and a larger rank than its width adds nothing.
LARGEST_RANK = 4096
LORA = (
    Flag(
        "lora_targets",
        "linear layers that get an update: q, k, v, proj, lin1, lin2 of the encoder's blocks. "
        "decoder beside them adds SAMed_s's updates of the mask decoder (the same as --module "
        "sam_lora_image_encoder_mask_decoder without decoder), by itself it leaves the encoder "
        "without updates. The order means nothing",
        default=list(PUBLISHED_TARGETS),
        choices=(*TARGETS, DECODER),
        takes_list=True,
        in_adapter=True,
        in_name=lambda args: (
            "-".join(args.lora_targets) if args.lora_targets != [*PUBLISHED_TARGETS] else None
        ),
    ),
    Flag(
        "lora_blocks",
        "blocks of the encoder that get updates: all, first_half, last_half, every_N (from block "
        "0), or numbers from 0",
        default=[ALL_BLOCKS],
        takes_list=True,
        in_adapter=True,
        in_name=lambda args: (
            f"blocks-{'-'.join(args.lora_blocks)}" if args.lora_blocks != [ALL_BLOCKS] else None
        ),
    ),
    Flag(
        "lora_kind",
        "form of the updates: lora (scale alpha / rank), rslora (alpha / square root of the rank, "
        "arXiv 2312.03732), dora (lora, and a trained length of every updated weight row, arXiv "
        "2402.09353)",
        default="lora",
        choices=KINDS,
        in_adapter=True,
        in_name=lambda args: args.lora_kind if args.lora_kind != "lora" else None,
    ),
    Flag(
        "lora_alpha",
        "alpha in the scale of the updates, as in PEFT; default: the rank, so that lora and dora "
        "have scale 1, as published, and rslora the square root of the rank. To compare ranks, "
        "give rslora one alpha for all",
        type=float,
        above=0,
        high=1e6,
        in_adapter=True,
        in_name=lambda args: f"alpha{args.lora_alpha:g}" if args.lora_alpha is not None else None,
    ),
)
INPUT_AND_DECODER = (
    Flag(
        "input_slices",
        "slices that the network sees at once: 1, as three equal channels, as published; 3: the "
        "slice and its neighbours (2.5-D), of which those beyond the ends repeat the end",
        type=int,
        default=1,
        choices=(1, 3),
        in_adapter=True,
        in_name=lambda args: "2.5d" if args.input_slices != 1 else None,
    ),
    Flag(
        "decoder_depth",
        "layers of the mask decoder's transformer; with base weights, those beyond SAM's two start "
        "as copies of the second",
        type=int,
        default=2,
        choices=(2, 4, 6),
        in_adapter=True,
        in_name=lambda args: f"dec{args.decoder_depth}" if args.decoder_depth != 2 else None,
    ),
    Flag(
        "logits",
        "side of the logits: 1: a quarter of the input's side, as published; 2: a half, by one "
        "more upscaling layer, which starts by repeating each pixel",
        type=int,
        default=1,
        choices=(1, 2),
        in_adapter=True,
        in_name=lambda args: f"logits{args.logits}" if args.logits != 1 else None,
    ),
)
NETWORK = (
    Flag(
        "img_size",
        "side of the network's input in pixels",
        type=int,
        default=512,
        low=1,
        high=LARGEST_IMAGE,
        multiple_of=16,
        hint="16 is the patch size of the encoder",
        in_adapter=True,
        in_name=lambda args: str(args.img_size),
    ),
    Flag(
        "vit_name",
        "image encoder",
        default="vit_b",
        choices=tuple(ENCODERS),
        in_adapter=True,
        in_name=lambda args: args.vit_name,
    ),
    Flag(
        "module",
        "LoRA variant: sam_lora_image_encoder (SAMed), sam_lora_image_encoder_mask_decoder "
        "(SAMed_s), or a module of your own beside them",
        default="sam_lora_image_encoder",
        in_adapter=True,
        in_name=lambda args: args.module.removeprefix("sam_lora_image_"),
    ),
    Flag(
        "rank",
        "rank of the LoRA updates",
        type=int,
        default=4,
        low=1,
        high=LARGEST_RANK,
        in_adapter=True,
        in_name=lambda args: f"r{args.rank}",
    ),
    *LORA,
    *INPUT_AND_DECODER,
    Flag(
        "ckpt",
        "file of SAM's base weights; default: the encoder's public file in checkpoints/; 'none': "
        "no base weights, so every weight is trained, and stands in the adapter",
        changes_numbers=False,
        in_name=lambda args: "scratch" if args.ckpt == SCRATCH else None,
    ),
    Flag(
        "lora_ckpt",
        "adapter file to start from",
        changes_numbers=False,
        in_name=lambda args: "tuned" if args.lora_ckpt else None,
    ),
    Flag("device", "auto, cpu, cuda or cuda:N", default="auto", changes_numbers=False),
)
