"""Finds tissue with a model for semantic segmentation from the Hub, for stains and artefacts that colour alone misjudges."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)

from ..errors import UserError
from ..slides.grid import tissue_fraction
from ..slides.reader import Slide
from ..slides.tissue import SATURATION_RANGE, Tissue, stain_saturation
from .encoder import ask_for_access, input_size


MASK_UM = 8.0  # of a mask pixel, or finer
MARGIN = 1 / 8  # of a window: what lies nearer to its edge is taken from the next window
OVERVIEW_EDGE = 2048  # pixels of the overview that glass is looked for on
NOT_TISSUE = frozenset(  # a label with one of these words is no tissue
    [
        "background",
        "glass",
        "blank",
        "void",
        "unlabeled",
        "unlabelled",
        "none",
        "outside",
        "slide",
        "artifact",
        "artifacts",
        "artefact",
        "artefacts",
        "pen",
        "marker",
        "ink",
        "marking",
        "bubble",
        "bubbles",
        "dust",
        "dirt",
        "foreign",
        "debris",
        "focus",
        "oof",
        "blur",
        "blurry",
        "blurred",
    ]
)


@dataclass(frozen=True)
class Segmenter:
    """A model with what has to be known for using it.

    Attributes:
        model: in eval mode, on its device.
        processor: resizes and normalises.
        size: edge of a window in pixels.
        mpp: microns per pixel of a window.
        tissue: indices of the labels that are tissue.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    size: int
    mpp: float
    tissue: list[int]

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray, pixel: int) -> np.ndarray:
        """The probability of tissue on squares of `pixel` by `pixel`, float32 (B, h, w), of uint8 `windows` (B, H, W, 3)."""
        inputs = self.processor(images=list(windows), return_tensors="pt").to(self.model.device)
        logits = self.model(**inputs).logits  # (B, labels, h', w')
        probability = logits.float().softmax(dim=1)[:, self.tissue].sum(dim=1, keepdim=True)
        full = F.interpolate(probability, windows.shape[1:3], mode="bilinear", align_corners=False)
        return F.avg_pool2d(full, pixel)[:, 0].cpu().numpy()


def find_tissue_by_model(
    slide: Slide,
    name: "str | Path | Segmenter",
    *,
    mpp: float | None = None,
    classes: Sequence[str] | None = None,
    skip_glass: bool = False,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
) -> Tissue:
    """The tissue of `slide` as the model `name`, a Hub id, a directory or one that is loaded, finds it, on pixels of 8 um or the next finer.

    A pixel is tissue when its labels that are tissue are together more probable than not. Each window gives its middle
    three quarters; what lies outside the slide is white.

    Args:
        mpp: microns per pixel that the model was trained on, for a processor that does not say.
        classes: the labels that are tissue; None takes those without one of the words `NOT_TISSUE`.
        skip_glass: leaves out windows that are all glass by their colour: faster, and blind to tissue without colour.

    Raises UserError for what `load_segmenter` does, SlideError when the slide cannot be read.
    """
    segmenter = name if isinstance(name, Segmenter) else load_segmenter(name, mpp=mpp, classes=classes, device=device)
    pixel = max(1, int(MASK_UM / segmenter.mpp + 1e-6))  # edge of a mask pixel in the model's pixels
    margin = max(1, round(MARGIN * segmenter.size / pixel))
    inner = segmenter.size // pixel - 2 * margin  # mask pixels that a window gives, along an edge
    if inner < 1:
        raise UserError(
            f"the model sees windows of {segmenter.size} px at {segmenter.mpp} mpp: too small to find tissue with"
        )
    extent = slide.extent(pixel, segmenter.mpp)
    width, height = (int(np.ceil(edge / own - 1e-6)) for edge, own in zip(slide.dimensions, extent))
    columns, rows = np.meshgrid(np.arange(0, width, inner), np.arange(0, height, inner))
    cells = np.stack([columns.ravel(), rows.ravel()], axis=1)  # (N, 2): the first mask pixel of each window's middle
    if skip_glass:
        cells = cells[_shows_colour(slide, cells * extent, (inner * extent[0], inner * extent[1]))]

    probability = np.zeros((height + inner, width + inner), np.float32)
    for start in range(0, len(cells), batch_size):
        batch = cells[start : start + batch_size]
        corners = ((batch - margin) * extent).tolist()
        windows = np.stack([slide.read(corner, (segmenter.size,) * 2, segmenter.mpp) for corner in corners])
        middle = segmenter(windows, pixel)[:, margin : margin + inner, margin : margin + inner]
        for (x, y), part in zip(batch.tolist(), middle):
            probability[y : y + inner, x : x + inner] = part
    return Tissue(probability[:height, :width] > 0.5, extent)


def load_segmenter(
    name: str | Path,
    *,
    mpp: float | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Segmenter:
    """The segmenter `name`, a Hub id or a directory; arguments as for `find_tissue_by_model`.

    Raises UserError when it cannot be loaded or lacks weights, when nothing says its resolution, when `mpp` contradicts
    the processor, and when its labels do not tell tissue from the rest.
    """
    only_here = {"local_files_only": not ask_for_access(str(name))}
    try:
        processor = AutoImageProcessor.from_pretrained(name, **only_here)
        model, loading = AutoModelForSemanticSegmentation.from_pretrained(name, output_loading_info=True, **only_here)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} cannot be loaded for segmentation ({reason}): pass a Hub id or a directory of a segmentation model"
        ) from error
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:5])
        raise UserError(f"{name} lacks the weights {missing}: it is no whole segmentation model")
    declared = getattr(processor, "mpp", None)
    if declared is None and mpp is None:
        raise UserError(f"{name} does not say its resolution: pass mpp, in microns per pixel, as its authors state it")
    if declared is not None and mpp is not None and abs(mpp / declared - 1) > 0.01:
        raise UserError(f"{name} was trained at {declared} mpp, not at {mpp}: leave mpp out")
    return Segmenter(
        model=model.eval().to(device),
        processor=processor,
        size=input_size(processor),
        mpp=float(declared or mpp),
        tissue=tissue_labels(str(name), model.config, classes),
    )


def tissue_labels(name: str, config: PretrainedConfig, classes: Sequence[str] | None = None) -> list[int]:
    """The indices of the labels that are tissue: `classes`, or those none of whose words is one of `NOT_TISSUE`.

    Raises UserError for a class that is no label of the model, and, without `classes`, when the labels are mere numbers
    or all on one side.
    """
    labels = dict(sorted(config.id2label.items()))
    listed = ", ".join(labels.values())
    for label in classes or ():
        if label not in labels.values():
            raise UserError(f"{name} has no label {label}: it has {listed}")
    if classes:
        return [index for index, label in labels.items() if label in classes]
    tissue = [index for index, label in labels.items() if not NOT_TISSUE & set(re.findall("[a-z]+", label.lower()))]
    nameless = all(re.fullmatch(r"LABEL_\d+", label) for label in labels.values())
    if nameless or len(tissue) in (0, len(labels)):
        raise UserError(f"the labels of {name} do not say which are tissue ({listed}): pass classes")
    return tissue


def _shows_colour(slide: Slide, xy: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """Whether each box (corner `xy` (N, 2), edge `extent`, level-0 pixels) has a pixel more saturated than glass, bool (N,)."""
    overview, overview_extent = slide.overview(OVERVIEW_EDGE)
    coloured = Tissue(stain_saturation(overview) > SATURATION_RANGE[0], overview_extent)
    return tissue_fraction(coloured, xy, extent) > 0
