"""`hf-pathology heatmap`: where a slide classifier looks, or a hierarchy."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import SlideError, UserError
from ..features.bags import feature_keys
from ..features.store import SlideFeatures, features_path
from ..progress import ProgressBar
from ..recipes.predict_slides import check_kind, load_head, whole_slide
from ..record import RunRecord
from ..report.heatmap import attention_picture
from ..slides.cohort import CohortSlide, slide_names
from ..slides.tiling import OVERVIEW_EDGE, save_picture
from .attention import attention
from .cohort import chosen_slides


def heatmap(
    *,
    slides: Path,
    head: Path | None,
    features: Path | None,
    encoder: str | None,
    out: Path,
    slide_mpp: float | None,
    limit: int | None,
    **drawing: Any,
) -> int:
    """Paints a slide classifier's attention, or, by `attention`, a hierarchy's own; returns the exit code."""
    by_head = head is not None and features is not None
    if by_head == (encoder is not None) or (encoder is not None and (head or features)):
        raise UserError(
            "say whose attention: a slide classifier's by --head and --features, or a hierarchy's by --encoder"
        )
    if encoder is not None:
        return attention(slides=slides, encoder=encoder, out=out, slide_mpp=slide_mpp, limit=limit, **drawing)
    return head_attention(slides, head, features, out, slide_mpp, limit)


def head_attention(
    slides: Path, head: Path, features: Path, out: Path, slide_mpp: float | None, limit: int | None
) -> int:
    """Writes one picture for each slide that has features; returns the exit code."""
    record = RunRecord("heatmap", {"slides": slides, "head": head, "features": features})
    loaded = load_head(head)
    names = slide_names(feature_keys(features))
    chosen = chosen_slides(slides, None, slide_mpp, limit, record)
    with ProgressBar("painting", len(chosen)) as progress:
        for slide in chosen:
            try:
                if slide.key not in names:
                    raise SlideError(f"{slide.path} has no features in {features}: run `hf-pathology embed`")
                bag = SlideFeatures.load(features_path(features, names[slide.key]))
                check_kind(loaded, bag)
                picture, predicted = paint(slide, bag, loaded)
                save_picture(out / f"{slide.key}.jpg", picture)
                record.did(slide.key, predicted=predicted)
            except SlideError as error:
                record.failed(str(error))
            progress.advance()
    if not record.done:
        raise UserError(f"no slide of {slides} has features in {features}")
    record.save(out / "report.json")
    print(f"{len(record.done)} of {len(chosen)} slides painted: {out}")
    return record.exit_code


def paint(slide: CohortSlide, bag: SlideFeatures, head: torch.nn.Module) -> tuple[np.ndarray, str]:
    """The slide beside its attention, uint8 (h, w, 3), and the class that `head` predicts for it."""
    output = whole_slide(head, bag)
    predicted = head.config.id2label[int(output.logits.argmax())]
    with slide.open() as opened:
        overview, extent = opened.overview(OVERVIEW_EDGE)
        scores = output.tile_scores[0].numpy()
        picture = attention_picture(overview, extent, bag.xy[bag.valid], bag.extent, scores, mpp=opened.mpp)
    return picture, predicted
