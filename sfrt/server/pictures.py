"""Pictures that somebody sent, to begin a stream from or to go by."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
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


def camera_picture(data: bytes, *, height: int, width: int) -> NDArray[np.uint8]:
    """A camera's frame, a JPEG of just this size, as uint8 [height, width, 3]. Raises MediaError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.size != (width, height):
                raise MediaError(
                    f"the camera's frame has {image.width}×{image.height} pixels; the model takes {width}×{height}"
                )
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise MediaError("the camera's frame is no JPEG that can be read; it is left out") from None
