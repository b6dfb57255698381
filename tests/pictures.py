"""Pictures as browsers send them."""

from fractions import Fraction

import av
import numpy as np


def jpeg(image):
    """u8[H, W, 3] as a JPEG of good quality."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *image.shape[:2], "yuvj444p", Fraction(1, 2)
    codec.qmin = codec.qmax = 2
    packets = codec.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
    return b"".join(bytes(packet) for packet in [*packets, *codec.encode(None)])
