"""Loading SAM's public weights for another image size and number of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from common.errors import InputError, MissingFileError, first_few
from common.state_dicts import unwrapped
from common.tensors import load_safetensors, load_tensors, plain_tensors

from .modeling import ImageEncoderViT, Sam

# The number or the shape of these tensors depends on the classes.
MASK_HEADS = (
    "mask_decoder.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.",
    "mask_decoder.iou_prediction_head.",
)
NECK = "image_encoder.neck."
DECODER_LAYERS = "mask_decoder.transformer.layers."
SAM_DEPTH = 2  # of SAM's mask decoder, in layers
# The mask decoder's third upscaling, which doubles the side of the logits.
FINER = "mask_decoder.output_upscaling.5."
HALF = 16  # digits of one half of a fingerprint
# Statistics that some programs save with the weights. Here the caller gives them.
NO_WEIGHTS = ("pixel_mean", "pixel_std")
# Networks that are taken for SAM's, by the start of a tensor's name.
RELATIVES = {
    "vision_encoder.": "SAM under the names of Hugging Face transformers",
    "shared_image_embedding.": "SAM under the names of Hugging Face transformers",
    "image_encoder.trunk.": "SAM 2, another network",
    "image_encoder.patch_embed.seq.": "MobileSAM, whose encoder is another network",
    "image_encoder.blocks.0.attn.qkv.qkv.": "a whole network with LoRA layers inside",
}


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

    It may be a `.pth` or `.safetensors` file, and a state dict or a checkpoint around one
    (`common.state_dicts.unwrapped`).

    Args:
        widths: (width, depth) of every known encoder, to recognise the one in the file.
        public: the file to download if there is none.

    Raises:
        MissingFileError: there is no such file; the message says what to download.
        InputError: the file holds another encoder, an adapter, no SAM checkpoint, or entries that
            are no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"base weights {path} do not exist; {_how_to_get(public, path)}")
    is_safe = path.suffix.lower() == ".safetensors"
    state = unwrapped(load_safetensors(path)[0] if is_safe else load_tensors(path))
    _require_encoder(state, path, name, widths, public)
    weights = {
        key: value
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in NO_WEIGHTS
    }
    return plain_tensors(weights, path)


def fill_base_weights(
    sam: Sam,
    state: dict[str, torch.Tensor],
    *,
    source: str | Path,
    keep_mask_heads: bool | None = None,
) -> None:
    """Fill `sam` from a checkpoint of any image size; all but the mask heads strictly.

    Layers of the mask decoder beyond SAM's two become copies of the second, and a third upscaling
    stays as it is (`mask_decoder.repeat_pixels`), unless the file was merged from a network that
    has them.

    Args:
        source: the file that `state` was read from, for messages.
        keep_mask_heads: True: all heads, strictly; False: none of them; None: every tensor whose
            shape fits. The original tries to load the whole file first. That fails, but not before
            all fitting tensors are copied, so its published adapters were trained from these. With
            the 3 masks of SAM and 8 classes, 28 of 31 tensors fit.

    Raises:
        InputError: keys or shapes do not fit.
    """
    _require_same_decoder(sam, state, source)
    own = sam.state_dict()
    heads = {key for key in own.keys() | state.keys() if key.startswith(MASK_HEADS)}
    common = heads & own.keys() & state.keys()
    fit = {key for key in common if own[key].shape == state[key].shape}
    left_out = {None: heads - fit, True: set(), False: heads}[keep_mask_heads]
    sam.head_start = _head_start(own, heads & own.keys() - left_out, len(heads & state.keys()))
    state = {key: value for key, value in state.items() if key not in left_out}
    own = {key: value for key, value in own.items() if key not in left_out}
    sam.base_fingerprint = fingerprint(state)  # of the file: the same for decoders of any depth
    state |= _start_beyond_sam(state, own)
    fit_image_size(state, sam.image_encoder)
    _require_same_tensors(own, state, source)
    sam.load_state_dict(state, strict=False)


def decoder_depth(keys: Iterable[str]) -> int:
    """Return how many layers of the mask decoder have tensors of these names."""
    names = {key.removeprefix(DECODER_LAYERS) for key in keys if key.startswith(DECODER_LAYERS)}
    return len({name.split(".")[0] for name in names})


def logits_side(keys: Iterable[str]) -> int:
    """Return the value of `--logits` of a network that has tensors of these names: 1 or 2."""
    return 2 if any(key.startswith(FINER) for key in keys) else 1


def _start_beyond_sam(
    state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return how those parts of the mask decoder start that a network has, but not its file."""
    second = f"{DECODER_LAYERS}{SAM_DEPTH - 1}."
    start = {
        f"{DECODER_LAYERS}{layer}.{key.removeprefix(second)}": value
        for layer in range(decoder_depth(state), decoder_depth(own))
        for key, value in state.items()
        if key.startswith(second)
    }
    if logits_side(state) == 1:
        start |= {key: value for key, value in own.items() if key.startswith(FINER)}
    return start


def _require_same_decoder(sam: Sam, state: dict[str, torch.Tensor], source: str | Path) -> None:
    """Refuse a file that was merged from a network of another mask decoder."""
    own = sam.state_dict()
    for what, flag, found, expected, of_sam in (
        ("depth", "--decoder_depth", decoder_depth(state), decoder_depth(own), SAM_DEPTH),
        ("logits", "--logits", logits_side(state), logits_side(own), 1),
    ):
        if found > of_sam and found != expected:
            raise InputError(
                f"{source} holds a mask decoder of {what} {found}, this network was built with "
                f"{expected}; pass {flag} {found}, or SAM's own file"
            )


def _head_start(own: dict[str, torch.Tensor], taken: set[str], in_file: int) -> str:
    """Say in one line which tensors of the mask heads come from the base file."""
    fresh = [key for key in own if key.startswith(MASK_HEADS) and key not in taken]
    names = dict.fromkeys(
        # The number of a mask stands for the six tensors of its network.
        (key.split(".layers.")[0] if "hypernetworks" in key else key).removeprefix("mask_decoder.")
        for key in fresh
    )
    return (
        f"{len(taken)} of {in_file} tensors from the base file; fresh: {', '.join(names) or 'none'}"
    )


def _require_same_tensors(
    own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], source: str | Path
) -> None:
    """Refuse a checkpoint that lacks a tensor, has one too many, or one of another shape."""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        remedy = (
            "it was saved from a network with other layers; pass SAM's own file"
            if unexpected
            else "it is incomplete; fetch or save it again"
        )
        raise InputError(
            f"{source} is not a complete SAM checkpoint: missing {first_few(missing) or 'nothing'};"
            f" unexpected {first_few(unexpected) or 'nothing'}; {remedy}"
        )
    wrong = [key for key in sorted(own) if state[key].shape != own[key].shape]
    if wrong:
        found = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in wrong]
        raise InputError(f"{source} has tensors of another shape: {first_few(found)}")


def fit_image_size(state: dict[str, torch.Tensor], encoder: ImageEncoderViT) -> None:
    """Interpolate position embeddings in `state` to the encoder's image size, in place.

    The absolute embedding is interpolated bilinearly to the new grid. The relative embeddings of
    the *global* blocks are interpolated linearly to the new length, as their offsets span the grid.
    Windows have the same size at any image size, so the embeddings of window blocks stay.
    """
    key = "image_encoder.pos_embed"
    grid = encoder.pos_embed.shape[1]
    if key in state and _differs_only_in((1, 2), state[key], encoder.pos_embed):
        channels_first = rearrange(state[key], "b h w c -> b c h w")
        resized = F.interpolate(channels_first, (grid, grid), mode="bilinear", align_corners=False)
        state[key] = rearrange(resized, "b c h w -> b h w c")
    for block in encoder.global_blocks:
        for axis in ("h", "w"):
            key = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            own = getattr(encoder.blocks[block].attn, f"rel_pos_{axis}")
            if key in state and _differs_only_in((0,), state[key], own):
                channels_first = rearrange(state[key], "offsets d -> 1 d offsets")
                resized = F.interpolate(
                    channels_first, 2 * grid - 1, mode="linear", align_corners=False
                )
                state[key] = rearrange(resized, "1 d offsets -> offsets d").contiguous()


def _differs_only_in(axes: tuple[int, ...], found: torch.Tensor, own: torch.Tensor) -> bool:
    """Return whether two tensors have different sizes in some of these axes and in no others."""
    if found.ndim != own.ndim:
        return False
    differ = {axis for axis in range(own.ndim) if found.shape[axis] != own.shape[axis]}
    return bool(differ) and differ <= {*axes}


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Return 32 hexadecimal digits that identify base weights.

    The first half is the SHA-256 of the neck, which earlier versions recorded alone. The second
    half is that of all weights with their names and shapes, but for the mask heads: which of them
    are taken depends on the classes, and an adapter or a state holds them.
    """
    neck, whole = hashlib.sha256(), hashlib.sha256()
    for key in sorted(key for key in state if not key.startswith(MASK_HEADS)):
        values = state[key].detach().cpu().float().contiguous().numpy()
        whole.update(f"{key} {values.shape} ".encode())
        for digest in (neck, whole) if key.startswith(NECK) else (whole,):
            digest.update(values)
    return neck.hexdigest()[:HALF] + whole.hexdigest()[:HALF]


def same_base(one: str | None, other: str | None) -> bool:
    """Return whether two fingerprints mean the same base weights, as far as both can tell."""
    if one is None or other is None or min(len(one), len(other)) != HALF:
        return one == other
    return one[:HALF] == other[:HALF]


def _require_encoder(
    state: object,
    path: Path,
    name: str,
    widths: dict[str, tuple[int, int]],
    public: PublicWeights | None,
) -> None:
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, expected a SAM state dict")
    if "w_a_000" in state:
        raise InputError(
            f"{path} is a LoRA adapter, not base weights; pass it by --lora_ckpt and SAM's own "
            "file by --ckpt"
        )
    keys = [key for key in state if isinstance(key, str)]
    for start, what in RELATIVES.items():
        if any(key.startswith(start) for key in keys):
            instead = f"; {_how_to_get(public, path.parent / public.file)}" if public else ""
            raise InputError(f"{path} holds {what}, expected SAM's own {name}{instead}")
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if not isinstance(patches, torch.Tensor):
        raise InputError(
            f"{path} holds no SAM image encoder (no image_encoder.patch_embed.proj.weight, but "
            f"{first_few(sorted(keys), 3) or 'nothing'}); expected a SAM checkpoint"
        )
    plain_tensors({"image_encoder.patch_embed.proj.weight": patches}, path)
    depth = len({key.split(".")[2] for key in keys if key.startswith("image_encoder.blocks.")})
    found = (patches.shape[0] if patches.ndim else 0, depth)
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
