"""Pictures and plots as data URIs, which make a page self-contained."""

import base64
import io

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .style import plot_style


@plot_style()
def svg_uri(figure: Figure) -> str:
    """The plot as SVG, its letters turned into outlines."""
    with io.BytesIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        return data_uri("image/svg+xml", file.getvalue())


def jpeg_uri(picture: np.ndarray, quality: int = 85) -> str:
    """The RGB `picture`, uint8 (h, w, 3), as JPEG."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return data_uri("image/jpeg", encoded.tobytes())


def data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def pixels_of(figure: Figure) -> np.ndarray:
    """The figure drawn at its own resolution, uint8 (h, w, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def shrunk(picture: np.ndarray, max_edge: int) -> np.ndarray:
    """`picture` (h, w, 3) with its longer edge at most `max_edge` pixels; never enlarged."""
    scale = max_edge / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = tuple(max(1, round(edge * scale)) for edge in picture.shape[1::-1])
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
