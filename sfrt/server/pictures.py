"""A picture that somebody sent, to begin a stream from."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from torch import Tensor

from sfrt.errors import MediaError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 50_000_000


def pixels_of(data: bytes, *, height: int, width: int) -> Tensor:
    """Float32 [1, 3, height, width] in [0, 1], upright, cut around its centre. Raises MediaError.

    Only Pillow reads it: a video library would follow a playlist to other files and machines.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if image.width * image.height > MOST_PIXELS:
                raise MediaError(f"the picture has {image.width}×{image.height} pixels; send one of up to 50 million")
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = np.array(ImageOps.fit(upright, (width, height), method=Image.Resampling.LANCZOS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise MediaError(f"what was sent is no picture that can be read; send one of: {', '.join(FORMATS)}") from None
    return torch.from_numpy(fitted).permute(2, 0, 1).float().div(255).unsqueeze(0)
