"""Loading SAM's public weights for another image size and number of classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from common.errors import InputError, MissingFileError, first_few
from common.files import load_tensors

from .modeling import ImageEncoderViT, Sam

# The shape of these heads depends on the classes. They start fresh in a fine-tuned network.
MASK_HEADS = (
    "mask_decoder.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.",
    "mask_decoder.iou_prediction_head.",
)


@dataclass(frozen=True)
class PublicWeights:
    """A file of Meta's public SAM weights (Apache-2.0)."""

    file: str
    sha256: str

    @property
    def url(self) -> str:
        """The address to download the file from."""
        return f"https://dl.fbaipublicfiles.com/segment_anything/{self.file}"


def read_base_weights(
    path: str | Path,
    *,
    name: str,
    widths: dict[str, tuple[int, int]],
    public: PublicWeights | None,
) -> dict[str, torch.Tensor]:
    """Read a SAM checkpoint, which must hold the encoder `name`.

    Args:
        widths: (width, depth) of every known encoder, to recognise the one in the file.
        public: the file to download if there is none.

    Raises:
        MissingFileError: there is no such file; the message says what to download.
        InputError: the file holds another encoder, an adapter, or no SAM checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"base weights {path} do not exist; {_how_to_get(public, path)}")
    state = load_tensors(path)
    _require_encoder(state, path, name, widths)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def fill_base_weights(
    sam: Sam, state: dict[str, torch.Tensor], *, source: str | Path, keep_mask_heads: bool = False
) -> None:
    """Fill `sam` from a checkpoint of any image size, strictly.

    Args:
        source: the file that `state` was read from, for messages.
        keep_mask_heads: load the mask heads too; by default they keep their fresh values.

    Raises:
        InputError: keys or shapes do not fit.
    """
    skipped = () if keep_mask_heads else MASK_HEADS
    state = {key: value for key, value in state.items() if not key.startswith(skipped)}
    sam.base_fingerprint = fingerprint(state)
    fit_image_size(state, sam.image_encoder)

    own = {key: value for key, value in sam.state_dict().items() if not key.startswith(skipped)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise InputError(
            f"{source} is not a complete SAM checkpoint: missing {first_few(missing) or 'nothing'};"
            f" unexpected {first_few(unexpected) or 'nothing'}; fetch the file again"
        )
    wrong = [key for key in sorted(own) if state[key].shape != own[key].shape]
    if wrong:
        found = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in wrong]
        raise InputError(f"{source} has tensors of another shape: {first_few(found)}")
    sam.load_state_dict(state, strict=False)


def fit_image_size(state: dict[str, torch.Tensor], encoder: ImageEncoderViT) -> None:
    """Interpolate position embeddings in `state` to the encoder's image size, in place.

    The absolute embedding is interpolated bilinearly to the new grid. The relative embeddings of
    the *global* blocks are interpolated linearly to the new length, as their offsets span the grid.
    Windows have the same size at any image size, so the embeddings of window blocks stay.
    """
    key = "image_encoder.pos_embed"
    grid = encoder.pos_embed.shape[1]
    if key in state and state[key].shape[1:3] != (grid, grid):
        channels_first = rearrange(state[key], "b h w c -> b c h w")
        resized = F.interpolate(channels_first, (grid, grid), mode="bilinear", align_corners=False)
        state[key] = rearrange(resized, "b c h w -> b h w c")
    for block in encoder.global_blocks:
        for axis in ("h", "w"):
            key = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            if key in state and len(state[key]) != 2 * grid - 1:
                channels_first = rearrange(state[key], "offsets d -> 1 d offsets")
                resized = F.interpolate(
                    channels_first, 2 * grid - 1, mode="linear", align_corners=False
                )
                state[key] = rearrange(resized, "1 d offsets -> offsets d").contiguous()


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Return sixteen hexadecimal digits that identify base weights (SHA-256 of the neck)."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.startswith("image_encoder.neck."):
            digest.update(state[key].detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_encoder(
    state: object, path: Path, name: str, widths: dict[str, tuple[int, int]]
) -> None:
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, expected a SAM state dict")
    if "w_a_000" in state:
        raise InputError(
            f"{path} is a LoRA adapter, not base weights; pass it by --lora_ckpt and SAM's own "
            "file by --ckpt"
        )
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if not isinstance(patches, torch.Tensor):
        raise InputError(
            f"{path} holds no SAM image encoder (no image_encoder.patch_embed.proj.weight); "
            "expected a SAM checkpoint"
        )
    depth = len({key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")})
    found = (len(patches), depth)
    if found != widths[name]:
        names = [other for other, sizes in widths.items() if sizes == found]
        holds = names[0] if names else f"an encoder of width {found[0]} and depth {found[1]}"
        remedy = f"pass --vit_name {names[0]} or another file" if names else "pass another file"
        raise InputError(f"{path} holds {holds}, expected {name}; {remedy}")


def _how_to_get(public: PublicWeights | None, path: Path) -> str:
    if public is None:
        return (
            "there are no public weights of this encoder: train it from scratch by --ckpt none, "
            "or pass --vit_name of another"
        )
    return (
        f"download {public.url} (SHA-256 {public.sha256}) to {path}, "
        "or train every weight from scratch by --ckpt none"
    )
