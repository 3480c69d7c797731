"""Random changes of an image's grey values: noise, blur and gamma, as nnU-Net draws them.

The probabilities and ranges are the defaults of nnU-Net v2 (`nnUNetTrainer.py`,
`get_training_transforms`; Isensee et al., Nature Methods 2021, supplementary note 4), in its order:

| change | probability | range |
| --- | --- | --- |
| Gaussian noise | 0.1 | standard deviation 0 to 0.1 of that of the image |
| Gaussian blur | 0.1 | sigma 0.5 to 1 pixels, for rows and columns on their own |
| gamma of the inverted image | 0.1 | 0.7 to 1 or 1 to 1.5, each half of the time |
| gamma | 0.3 | as above |

nnU-Net draws a blur with 0.2, and then for each channel with 0.5. Here the channels of an image
share blur and gamma. nnU-Net's images have standard deviation 1 and may have any values; here no
value leaves the range of the image, so the mean and deviation are not restored after gamma.
nnU-Net's brightness, contrast and low resolution are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

NOISE = (0.1, 0.0, 0.1)  # probability, smallest and largest value
BLUR = (0.1, 0.5, 1.0)
INVERTED_GAMMA, GAMMA = 0.1, 0.3  # probabilities
SMALLEST_GAMMA, LARGEST_GAMMA = 0.7, 1.5
BLUR_RADIUS = 4  # pixels, four times the largest sigma
SMALLEST_RANGE = 1e-6  # keeps a constant image from a division by 0


@dataclass(frozen=True)
class GreyValues:
    """The random choices for one image; the defaults change nothing."""

    noise: float | None = None  # standard deviation, in that of the image
    noise_seed: int = 0
    blur: tuple[float, float] | None = None  # sigma along rows' and columns' numbers, pixels
    inverted_gamma: float | None = None
    gamma: float | None = None

    def __call__(self, image: torch.Tensor) -> torch.Tensor:  # (H, W) or (3, H, W) float32
        """Change an image on its device, without waiting for it; no value leaves its range."""
        if self.noise is not None:
            image = add_noise(image, self.noise, self.noise_seed)
        if self.blur is not None:
            image = blur(image, self.blur)
        if self.inverted_gamma is not None:
            image = -apply_gamma(-image, self.inverted_gamma)
        if self.gamma is not None:
            image = apply_gamma(image, self.gamma)
        return image


def draw_grey_values(rng: np.random.Generator) -> GreyValues:
    """Draw the choices for one image, always by the same number of draws."""
    happens = rng.random(4) < (NOISE[0], BLUR[0], INVERTED_GAMMA, GAMMA)
    noise, blurs = rng.uniform(*NOISE[1:]), rng.uniform(*BLUR[1:], 2)
    gammas = [_draw_gamma(rng), _draw_gamma(rng)]
    seed = int(rng.integers(2**63))
    return GreyValues(
        noise=noise if happens[0] else None,
        noise_seed=seed,
        blur=tuple(blurs.tolist()) if happens[1] else None,
        inverted_gamma=gammas[0] if happens[2] else None,
        gamma=gammas[1] if happens[3] else None,
    )


def _draw_gamma(rng: np.random.Generator) -> float:
    darker, share = rng.random() > 0.5, rng.random()
    end = LARGEST_GAMMA if darker else SMALLEST_GAMMA
    return 1 + share * (end - 1)


def add_noise(image: torch.Tensor, deviation: float, seed: int) -> torch.Tensor:
    """Add Gaussian noise, different in each channel, within the range of the image.

    A CPU draws the noise, whatever the device: a GPU would draw other numbers, and each model of
    GPU its own. Pinned memory lets the copy to a GPU go on by itself.

    Args:
        deviation: standard deviation of the noise, in that of the image.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(image.shape, pin_memory=image.is_cuda).normal_(generator=generator)
    strength = deviation * image.std(correction=0)
    noisy = image + strength * noise.to(image.device, non_blocking=True)
    return noisy.clamp(image.amin(), image.amax())


def blur(image: torch.Tensor, sigmas: tuple[float, float]) -> torch.Tensor:
    """Blur (..., H, W) along rows' and columns' numbers; the borders repeat outwards."""
    blurred = image.reshape(1, -1, *image.shape[-2:])
    for axis, sigma in zip((-2, -1), sigmas, strict=True):
        offsets = range(-BLUR_RADIUS, BLUR_RADIUS + 1)
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in offsets]
        beyond = (
            [0, 0, BLUR_RADIUS, BLUR_RADIUS] if axis == -2 else [BLUR_RADIUS, BLUR_RADIUS, 0, 0]
        )
        padded = F.pad(blurred, beyond, mode="replicate")
        # Sums of shifted images are float32 on any device; a convolution may compute in TF32.
        size = blurred.shape[axis]
        blurred = sum(
            weight / sum(weights) * padded.narrow(axis, start, size)
            for start, weight in enumerate(weights)
        )
    # The weights' rounding would make a constant image a little brighter.
    return blurred.reshape(image.shape).clamp(image.amin(), image.amax())


def apply_gamma(image: torch.Tensor, gamma: float) -> torch.Tensor:
    """Raise the place of each value within the range of the image to the power `gamma`.

    The range is that of all channels together, and may lie anywhere: no power of a negative number
    is taken.
    """
    low, high = image.amin(), image.amax()
    spread = (high - low).clamp_min(SMALLEST_RANGE)
    return (((image - low) / spread) ** gamma * spread + low).clamp(low, high)
