"""Outlines of tissue and annotations: polygons made of a mask, drawn into one, and exchanged with QuPath as GeoJSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..atomic import atomic_path
from ..errors import UserError
from .grid import tissue_fraction
from .tissue import Tissue


UNCLASSIFIED = "Unclassified"  # the class of features that name none
WITHOUT_AREA = frozenset(["Point", "MultiPoint", "LineString", "MultiLineString"])
TISSUE_COLOUR = (0, 160, 90)  # in QuPath
ANNOTATION_EDGE = 4096  # longer edge in pixels of the masks that tiles are compared with


@dataclass(frozen=True)
class Polygon:
    """One piece in level-0 pixels, whose (0, 0) is the upper left corner of the first pixel.

    Attributes:
        outline: (P, 2), its corners (x, y), of which the last is joined to the first.
        holes: (P, 2) each, likewise.
    """

    outline: np.ndarray
    holes: tuple[np.ndarray, ...] = ()


def write_geojson(path: str | Path, tissue: Tissue) -> None:
    """Writes each piece of `tissue` as a QuPath annotation of class "Tissue", whole or not at all."""
    features = [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[*ring, ring[0]] for ring in map(_rounded, (polygon.outline, *polygon.holes))],
            },
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "Tissue", "color": TISSUE_COLOUR},
            },
        }
        for polygon in polygons_of(tissue)
    ]
    with atomic_path(path) as partial:
        partial.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def read_geojson(
    path: str | Path, slide_size: tuple[int, int], max_edge: int = 2048, classes: Sequence[str] | None = None
) -> Tissue:
    """The area of the polygons in a GeoJSON file, of `classes` or of all, as a mask like that of `find_tissue`.

    Args:
        slide_size: width and height of level 0.
        max_edge: longer edge in pixels of the mask.

    Raises UserError as `read_annotations` does, and for a class that the file does not have.
    """
    annotations = read_annotations(path, slide_size)
    for name in classes or ():
        if name not in annotations:
            raise UserError(f"{path} has no class {name}: it has {', '.join(sorted(annotations)) or 'none'}")
    chosen = annotations if classes is None else classes
    return draw_polygons([polygon for name in chosen for polygon in annotations[name]], slide_size, max_edge)


def read_annotations(path: str | Path, slide_size: tuple[int, int] | None = None) -> dict[str, list[Polygon]]:
    """The polygons of a GeoJSON file by the name of their class, `UNCLASSIFIED` for those that name none.

    Reads what QuPath exports and its kin: a FeatureCollection, a list of features, or one feature or geometry; a ring may
    be closed or not. Points and lines have no area and are passed over. A file with an empty list has no classes.

    Args:
        slide_size: width and height of level 0: a polygon that lies wholly outside is then an error.

    Raises UserError, with the number of the feature, for what is no GeoJSON, corners that are no finite numbers, rings of
    fewer than three corners, and a file of points and lines only.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as GeoJSON ({error}): export the annotations again") from error
    annotations: dict[str, list[Polygon]] = {}
    features = _features(path, content)
    for number, feature in enumerate(features):
        try:
            name, polygons = _class_name(feature), list(_polygons(feature.get("geometry", feature)))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: feature {number} is damaged ({error}): mend it, or export again") from error
        for polygon in polygons:
            if slide_size is not None and _lies_outside(polygon, slide_size):
                raise UserError(
                    f"{path}: feature {number} lies outside the slide of {slide_size[0]}x{slide_size[1]} px, around "
                    f"{tuple(polygon.outline[0].tolist())}: is it of this slide, and in pixels of its largest level?"
                )
        if polygons:
            annotations.setdefault(name, []).extend(polygons)
    if features and not annotations:
        raise UserError(f"{path} holds {len(features)} features but no polygon: draw areas, not points or lines")
    return annotations


def class_fractions(
    annotations: dict[str, list[Polygon]],
    classes: Sequence[str],
    slide_size: tuple[int, int],
    xy: np.ndarray,
    extent: tuple[float, float],
) -> np.ndarray:
    """The share of each tile (corner `xy` (N, 2), edge `extent`, level-0 pixels) that each class covers, float32 (N, C).

    Exact on masks of `ANNOTATION_EDGE` pixels; a class without polygons covers nothing, and classes may overlap.
    """
    shares = np.zeros((len(xy), len(classes)), np.float32)
    for column, name in enumerate(classes):
        mask = draw_polygons(annotations.get(name, []), slide_size, ANNOTATION_EDGE)
        shares[:, column] = tissue_fraction(mask, xy, extent)
    return shares


def polygons_of(tissue: Tissue) -> list[Polygon]:
    """The pieces of `tissue` with their holes, along the edges of its pixels, so that drawing them gives the mask again."""
    twice = np.repeat(np.repeat(tissue.mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    # Contours run through the centres of pixels; those of pixels split in four tell a pixel's left edge from its right.
    rings, tree = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not rings:
        return []
    corners = [_without_straight((ring[:, 0] + 1) // 2) * tissue.extent for ring in rings]
    holes: dict[int, list[np.ndarray]] = {}
    parents = tree[0, :, 3].tolist()
    for ring, parent in zip(corners, parents):
        holes.setdefault(parent, []).append(ring)
    return [Polygon(ring, tuple(holes.get(index, ()))) for index, ring in enumerate(corners) if parents[index] < 0]


def draw_polygons(polygons: Sequence[Polygon], slide_size: tuple[int, int], max_edge: int) -> Tissue:
    """The area of `polygons` as a mask of the slide whose longer edge is at most `max_edge`.

    A mask pixel is tissue when its centre lies in a polygon, by the even-odd rule within one polygon.
    """
    full = np.asarray(slide_size)
    width, height = np.maximum(1, np.ceil(full / max(1.0, full.max() / max_edge)).astype(int)).tolist()
    extent = (float(full[0] / width), float(full[1] / height))
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        left, top = np.clip(np.floor(polygon.outline.min(axis=0) / extent), 0, (width, height)).astype(int)
        right, bottom = np.clip(np.ceil(polygon.outline.max(axis=0) / extent), 0, (width, height)).astype(int)
        row, x = crossings((polygon.outline, *polygon.holes), (np.arange(top, bottom) + 0.5) * extent[1])
        column = np.clip(np.ceil(x / extent[0] - 0.5).astype(int), left, right) - left  # first centre right of x
        shape = (bottom - top, right - left + 1)
        turns = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1]).reshape(shape)
        mask[top:bottom, left:right] |= np.cumsum(turns, axis=1)[:, :-1] % 2 == 1
    return Tissue(mask, extent)


def crossings(rings: Sequence[np.ndarray], y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines at heights `y` (sorted, (R,)) cross `rings`, (P, 2) each: indices into `y` (K,), and x (K,).

    An edge owns its upper end and not its lower one, so that a line through a corner crosses once or, at a tip, twice or
    never; horizontal edges are not crossed.
    """
    start = np.concatenate(rings).astype(float)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]).astype(float)
    upward = start[:, 1] > end[:, 1]
    start[upward], end[upward] = end[upward], start[upward]
    first, last = np.searchsorted(y, start[:, 1]), np.searchsorted(y, end[:, 1])
    count = last - first
    edge = np.repeat(np.arange(len(start)), count)
    row = np.arange(len(edge)) + np.repeat(first - (np.cumsum(count) - count), count)
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    return row, x0 + (y[row] - y0) * (x1 - x0) / (y1 - y0)


def _features(path: str | Path, content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and isinstance(content.get("features"), list):
        return content["features"]
    if isinstance(content, dict) and ("geometry" in content or "coordinates" in content or "geometries" in content):
        return [content]
    raise UserError(f"{path} is JSON but no GeoJSON: expected a FeatureCollection, or a list of features")


def _class_name(feature: dict) -> str:
    """The class that QuPath wrote (`classification`: a name, or an object with one), or the property `class`."""
    properties = feature.get("properties") or {}
    named = properties.get("classification") or properties.get("class") or UNCLASSIFIED
    return str(named["name"] if isinstance(named, dict) else named)


def _polygons(geometry: dict | None) -> Iterator[Polygon]:
    kind = None if geometry is None else geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)
    elif kind in ("Polygon", "MultiPolygon"):
        coordinates = geometry["coordinates"]
        for rings in coordinates if kind == "MultiPolygon" else [coordinates]:
            if rings:  # an empty list is how GeoJSON writes an empty polygon
                outline, *holes = map(_ring, rings)
                yield Polygon(outline, tuple(holes))
    elif kind is not None and kind not in WITHOUT_AREA:
        raise ValueError(f"there is no geometry {kind}")


def _ring(coordinates: list) -> np.ndarray:
    """The corners (P, 2) of a ring, whether its last repeats the first or not."""
    corners = np.asarray(coordinates)
    if corners.ndim != 2 or corners.shape[1] < 2 or corners.dtype.kind not in "iuf" or not np.isfinite(corners).all():
        raise ValueError("its corners are not pairs of finite numbers")
    corners = corners[:, :2].astype(float)
    if (corners[0] == corners[-1]).all():
        corners = corners[:-1]
    if len(corners) < 3:
        raise ValueError(f"a ring of {len(corners)} corners has no area")
    return corners


def _lies_outside(polygon: Polygon, slide_size: tuple[int, int]) -> bool:
    return bool((polygon.outline.max(axis=0) <= 0).any() or (polygon.outline.min(axis=0) >= slide_size).any())


def _without_straight(ring: np.ndarray) -> np.ndarray:
    """`ring` (P, 2) without repeated corners and without those where it does not turn."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _rounded(ring: np.ndarray) -> list[list[float]]:
    return np.round(ring, 2).tolist()
