"""Pictures and plots as data URIs, which make a page self-contained."""

import base64
import io

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


# Okabe and Ito's colours, which colour-blind readers can tell apart (jfly.uni-koeln.de/color), the main result first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT = "#1c2430", "#5a6472", "#d5dae1"
PLOT_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that a plot looks the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "hf_pathology",  # the same data give the same file
}


def plot_style():
    """A context, and a decorator, in which plots are drawn: fonts, colours and lines of the report."""
    return matplotlib.rc_context(PLOT_STYLE)


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
