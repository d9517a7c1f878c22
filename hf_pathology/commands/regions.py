"""`hf-pathology regions`: the second level of a hierarchy alone, over features of tiles that have been made before."""

from pathlib import Path

from ..errors import UserError, require_at_least
from ..features.bags import feature_keys
from ..features.encoder import load_encoder
from ..features.regions import (
    REGION_LEVEL,
    SLIDE_LEVEL,
    check_tile_features,
    write_region_features,
    write_slide_level,
)
from ..features.store import SlideFeatures, features_path
from ..progress import ProgressBar
from ..record import RunRecord


def regions(*, features: Path, encoder: str, out: Path, limit: int | None) -> int:
    """Writes the features of regions and of slides to `out`; returns the exit code."""
    record = RunRecord("regions", {"features": features, "encoder": encoder, "limit": limit})
    hierarchy = load_encoder(encoder)
    if hierarchy.hierarchy is None:
        raise UserError(f"{encoder} encodes tiles alone: pass a hierarchy, as `pretrain_hipt4k.py` makes it")
    require_at_least(1, limit=limit)
    slides = feature_keys(features)[:limit]
    for slide in slides:  # before anything is written
        check_tile_features(SlideFeatures.load(features_path(features, slide), verify=False), hierarchy)
    with ProgressBar("regions", len(slides), "regions") as progress:
        for slide in slides:
            made = write_region_features(features, out / REGION_LEVEL, slide, hierarchy)
            record.did(slide, regions=made)
            progress.advance(units=made)
    write_slide_level(out / SLIDE_LEVEL, out / REGION_LEVEL, slides, hierarchy)
    record.save(out / "report.json")
    print(f"{sum(facts['regions'] for facts in record.done.values()):,} regions of {len(slides)} slides: {out}")
    return record.exit_code
