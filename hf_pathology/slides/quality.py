"""What may be wrong with a slide, seen on its overview: ink, blur, dark folds and pixels that hold nothing."""

from dataclasses import asdict, dataclass

import cv2
import numpy as np

from .tissue import SATURATION_RANGE, Tissue, find_pen, glass_colour, stain_saturation


FOCUS_WINDOW = 17  # edge in overview pixels of the neighbourhoods whose sharpness is compared
BLURRED = 0.08  # of the slide's median sharpness; what is less is called blurred
DARK = 70  # of 255: the grey value of folds, and of pigment
FOLD_UM = 20.0  # the width of the narrowest fold; nuclei are narrower
COLOURS = {  # RGB
    "tissue": (0, 140, 80),
    "pen": (220, 40, 200),
    "blurred": (240, 140, 0),
    "dark": (20, 60, 230),
    "blank": (150, 110, 60),
}
LEGEND_HEIGHT = 28  # pixels


@dataclass(frozen=True)
class Artefacts:
    """Where something is wrong, bool (h, w) each, on the pixels of the overview; see `QualityNumbers`."""

    tissue: np.ndarray
    pen: np.ndarray
    blurred: np.ndarray
    dark: np.ndarray
    blank: np.ndarray


@dataclass(frozen=True)
class QualityNumbers:
    """What the overview of a slide shows: hints which slides to look at, no measures of diagnostic quality.

    Attributes:
        tissue_share: of the slide's area, what the tissue mask holds. Right only if the mask is.
        pen_share: of the slide's area, strokes of red, green, blue and black ink. Ink of the hue of a stain is missed.
        blurred_share: of the tissue, where the overview shows far less detail than the slide's median. A pixel of an
            overview is many microns wide, so this finds what is grossly out of focus, or even by nature (mucin,
            necrosis, keratin, blood); nuclei may be unsharp where it finds nothing, and a slide that is blurred as a whole is
            its own median.
        dark_share: of the tissue, what is nearly black: folds, and pigment, keratin or crowded nuclei as well. Pale folds are missed.
        blank_share: of the slide's area, pixels that are pure white or pure black: not scanned, or overexposed.
        background: median red, green and blue of the glass; None where the overview shows too little of it.
    """

    tissue_share: float
    pen_share: float
    blurred_share: float
    dark_share: float
    blank_share: float
    background: tuple[int, int, int] | None


def find_artefacts(
    overview: np.ndarray, extent: tuple[float, float], tissue: Tissue, *, mpp: tuple[float, float]
) -> Artefacts:
    """What may be wrong with a slide.

    Args:
        overview: uint8 RGB (h, w, 3) of the whole slide; `extent` its pixel's edge (x, y) in level-0 pixels.
        tissue: of the same slide, on pixels of any size.
        mpp: microns per level-0 pixel (x, y).
    """
    size = overview.shape[1::-1]
    mask = cv2.resize(tissue.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    smooth = cv2.medianBlur(np.ascontiguousarray(overview), 5)
    um_per_pixel = float(np.sqrt(extent[0] * mpp[0] * extent[1] * mpp[1]))
    blend = max(1, round(FOLD_UM / um_per_pixel))
    brightness = cv2.blur(cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY), (blend, blend))
    lumen = stain_saturation(smooth) <= SATURATION_RANGE[0]
    return Artefacts(
        tissue=mask,
        pen=find_pen(smooth, um_per_pixel),
        blurred=find_blur(overview, mask) & ~lumen,
        dark=mask & (brightness < DARK),
        blank=(overview == 255).all(axis=2) | (overview == 0).all(axis=2),
    )


def find_blur(overview: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Where `tissue` (bool (h, w)) shows little detail in `overview` (uint8 RGB (h, w, 3)), bool (h, w).

    Detail is the mean square of the Laplacian of the optical density (so that pale tissue counts as dark tissue does)
    over a window, its tissue alone; little is less than `BLURRED` of the median over the tissue.
    """
    inside = cv2.erode(
        tissue.astype(np.uint8), np.ones((3, 3), np.uint8)
    )  # the edge of the tissue is detail of its own
    if not inside.any():
        return np.zeros_like(tissue)
    density = -np.log((cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY).astype(np.float32) + 1) / 256)
    detail = cv2.Laplacian(density, cv2.CV_32F) ** 2 * inside
    window = (FOCUS_WINDOW, FOCUS_WINDOW)
    share = cv2.blur(inside.astype(np.float32), window, borderType=cv2.BORDER_CONSTANT)
    detail = cv2.blur(detail, window, borderType=cv2.BORDER_CONSTANT) / np.maximum(share, 1e-6)
    measured = tissue & (share > 0.1)
    return measured & (detail < BLURRED * np.median(detail[measured])) if measured.any() else measured


def quality_numbers(overview: np.ndarray, artefacts: Artefacts) -> QualityNumbers:
    """The numbers of a slide's quality, of what was found on its `overview`, uint8 RGB (h, w, 3)."""
    area = max(1, np.count_nonzero(artefacts.tissue))
    glass = glass_colour(overview)
    return QualityNumbers(
        tissue_share=float(artefacts.tissue.mean()),
        pen_share=float(artefacts.pen.mean()),
        blurred_share=float(artefacts.blurred.sum() / area),
        dark_share=float(artefacts.dark.sum() / area),
        blank_share=float(artefacts.blank.mean()),
        background=None if glass is None else tuple(glass.astype(int).tolist()),
    )


def quality_picture(overview: np.ndarray, artefacts: Artefacts) -> np.ndarray:
    """The slide with the outline of its tissue, beside a map of what may be wrong, with a legend, uint8 (h', w', 3)."""
    slide = _with_outline(overview, artefacts.tissue)
    grey = cv2.cvtColor(cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    found = grey.copy()
    for name in ("blank", "blurred", "dark", "pen"):
        found[getattr(artefacts, name)] = COLOURS[name]
    found = _with_outline(cv2.addWeighted(found, 0.6, grey, 0.4, 0), artefacts.tissue)
    gap = np.full((len(overview), 8, 3), 255, np.uint8)
    picture = np.hstack([slide, gap, found])
    return np.vstack([picture, draw_legend(picture.shape[1], quality_numbers(overview, artefacts))])


def draw_legend(width: int, numbers: QualityNumbers) -> np.ndarray:
    """A line of colours with the share of each, uint8 RGB (`LEGEND_HEIGHT` * rows, `width`, 3), in as many rows as it takes."""
    shares = asdict(numbers)
    rows, left = [np.full((LEGEND_HEIGHT, width, 3), 255, np.uint8)], 8
    for name, colour in COLOURS.items():
        text = f"{name} {shares[f'{name}_share']:.1%}" + (" of tissue" if name in ("blurred", "dark") else "")
        length = 40 + cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0]
        if left + length > width and left > 8:
            rows.append(np.full((LEGEND_HEIGHT, width, 3), 255, np.uint8))
            left = 8
        cv2.rectangle(rows[-1], (left, 8), (left + 12, 20), colour, cv2.FILLED)
        cv2.putText(rows[-1], text, (left + 18, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        left += length
    return np.vstack(rows)


def _with_outline(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(picture.copy(), outlines, -1, COLOURS["tissue"], 2)
