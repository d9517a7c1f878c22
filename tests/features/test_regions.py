"""The levels of a hierarchy from slides: what `embed` writes of tiles, regions and slides is what the model says of pixels."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hierarchies import REGION, TILE, release_hierarchy
from programs import run_command
from transformers import AutoImageProcessor, AutoModel

from hf_pathology.features.encoder import load_encoder
from hf_pathology.features.regions import read_slide_level, region_features
from hf_pathology.features.store import SlideFeatures
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide


@pytest.fixture(scope="module")
def hierarchy(tmp_path_factory) -> Path:
    return release_hierarchy(tmp_path_factory.mktemp("release") / "hierarchy")


@pytest.fixture(scope="module")
def embedded(hierarchy, tmp_path_factory) -> Path:
    """A folder with `slides`, and what `embed` made of them in `out`."""
    folder = tmp_path_factory.mktemp("embedded")
    for number, label in enumerate(("glandular", "solid")):
        write_aperio(folder / "slides" / f"{number}.svs", draw_slide(number, label, 512)[0], 0.5)
    done = run_command("embed", folder / "slides", "--encoder", hierarchy, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder


@torch.no_grad()
def test_regions_have_the_features_that_the_model_makes_of_their_pixels(hierarchy, embedded):
    model, processor = AutoModel.from_pretrained(hierarchy), AutoImageProcessor.from_pretrained(hierarchy)
    tiles = SlideFeatures.load(embedded / "out" / "tile_level" / "0.svs.features.safetensors")
    regions = SlideFeatures.load(embedded / "out" / "region_level" / "0.svs.features.safetensors")
    assert (tiles.region, len(tiles)) == (REGION, len(regions) * REGION**2) and len(regions) > 1
    assert (regions.size, regions.pooling, regions.features.shape[1]) == (REGION * TILE, "region", 12)
    with Slide(embedded / "slides" / "0.svs") as slide:
        pixels, _ = slide.read_tiles(regions.xy, regions.size, regions.extent)
    output = model(**processor(list(pixels), return_tensors="pt"))
    np.testing.assert_allclose(regions.features, output.pooler_output, atol=1e-4)
    grid = tiles.features.reshape(-1, REGION, REGION, 16).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(grid, output.tile_features, atol=1e-4)


def test_a_slide_is_the_mean_of_its_regions(embedded):
    slides, embeddings = read_slide_level(embedded / "out" / "slide_level.safetensors")
    assert slides == ["0.svs", "1.svs"] and embeddings.shape == (2, 12)
    for slide, embedding in zip(slides, embeddings):
        bag = SlideFeatures.load(embedded / "out" / "region_level" / f"{slide}.features.safetensors")
        np.testing.assert_allclose(embedding, bag.features.mean(axis=0), atol=1e-6)


def test_what_is_there_is_kept_and_what_is_damaged_is_made_again(hierarchy, embedded):
    folder = embedded / "out" / "region_level"
    files = [folder / f"{number}.svs.features.safetensors" for number in (0, 1)]
    times, content = [file.stat().st_mtime_ns for file in files], files[1].read_bytes()
    files[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = run_command("embed", embedded / "slides", "--encoder", hierarchy, "--out", embedded / "out")
    assert done.returncode == 0 and "nothing to embed" in done.stdout
    assert files[0].stat().st_mtime_ns == times[0] and files[1].read_bytes() == content


@torch.no_grad()
def test_unreadable_tiles_are_not_attended_to_and_a_region_of_nothing_else_is_invalid(hierarchy, embedded):
    encoder = load_encoder(hierarchy)
    bag = SlideFeatures.load(embedded / "out" / "tile_level" / "0.svs.features.safetensors", mapped=False)
    bag.valid[:5] = False
    bag.features[:5] = np.nan
    bag.valid[REGION**2 : 2 * REGION**2] = False
    made = region_features(bag, encoder)
    assert made.valid[:2].tolist() == [True, False]
    assert np.isfinite(made.features[0]).all() and np.isnan(made.features[1]).all()
    mask = torch.from_numpy(bag.valid[: REGION**2]).view(1, REGION, REGION)
    grid = torch.from_numpy(np.nan_to_num(bag.features[: REGION**2])).view(1, REGION, REGION, -1).permute(0, 3, 1, 2)
    np.testing.assert_allclose(
        made.features[:1], encoder.hierarchy.region_encoder(grid, mask).pooler_output, atol=1e-5
    )


def test_the_second_level_alone_makes_the_same_of_features_that_are_there(hierarchy, embedded, tmp_path):
    done = run_command("regions", embedded / "out" / "tile_level", "--encoder", hierarchy, "--out", tmp_path)
    assert done.returncode == 0 and "of 2 slides" in done.stdout, done.stderr
    for name in ("region_level/0.svs.features.safetensors", "slide_level.safetensors"):
        assert (tmp_path / name).read_bytes() == (embedded / "out" / name).read_bytes()


def test_the_second_level_refuses_features_that_its_first_did_not_make(hierarchy, embedded, tmp_path):
    def refused(features, encoder) -> str:
        done = run_command("regions", features, "--encoder", encoder, "--out", tmp_path / "out")
        assert done.returncode == 1 and not (tmp_path / "out").exists()
        return done.stderr

    tiles = tmp_path / "tiles_only"
    half = [0.5, 0.5, 0.5]
    model = AutoModel.from_pretrained(hierarchy).tile_encoder
    export_encoder(model, tiles, tile_size=TILE, mpp=0.5, mean=half, std=half)
    assert "encodes tiles alone: pass a hierarchy" in refused(embedded / "out" / "tile_level", tiles)
    assert "holds no features" in refused(embedded / "slides", hierarchy)
    assert "features (region, 128 px)" in refused(embedded / "out" / "region_level", hierarchy)
    words = ["embed", embedded / "slides", "--encoder", tiles]
    for region in ([], ["--regions", 4 * TILE]):
        assert run_command(*words, "--out", tmp_path / f"by_tiles{len(region)}", *region).returncode == 0
    other = refused(tmp_path / "by_tiles2", hierarchy)  # the same weights, but nothing says so
    assert f"the first level of {hierarchy} (cls, 32 px) is of no known revision: embed the slides with it" in other

    config = tmp_path / "knows" / "config.json"
    shutil.copytree(hierarchy, config.parent)
    said = json.loads(config.read_text()) | {"tile_revision": load_encoder(tiles).revision}
    config.write_text(json.dumps(said))
    assert "has features of single tiles: embed it with --regions" in refused(tmp_path / "by_tiles0", config.parent)
    done = run_command("regions", tmp_path / "by_tiles2", "--encoder", config.parent, "--out", tmp_path / "levels")
    assert done.returncode == 0, done.stderr
    made, wanted = (
        SlideFeatures.load(folder / "region_level" / "1.svs.features.safetensors").features
        for folder in (tmp_path / "levels", embedded / "out")
    )
    np.testing.assert_allclose(made, wanted, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 17])
def test_what_is_no_whole_regions_is_refused_by_name(hierarchy, embedded, tmp_path, kept):
    bag = SlideFeatures.load(embedded / "out" / "tile_level" / "0.svs.features.safetensors", mapped=False)
    cut = replace(bag, **{name: getattr(bag, name)[:kept] for name in ("features", "xy", "valid")})
    cut.save(tmp_path / "cut" / "0.svs.features.safetensors")
    done = run_command("regions", tmp_path / "cut", "--encoder", hierarchy, "--out", tmp_path / "out")
    assert done.returncode == 1 and f"0.svs has {kept} tiles, no whole regions of 16: embed it again" in done.stderr


def test_any_encoder_embeds_the_tiles_of_regions(embedded, hierarchy, tmp_path):
    tile_encoder = tmp_path / "tiles_only"
    export_encoder(AutoModel.from_pretrained(hierarchy).tile_encoder, tile_encoder, tile_size=TILE, mpp=0.5)
    words = ["embed", embedded / "slides", "--encoder", tile_encoder, "--out", tmp_path / "out"]
    done = run_command(*words, "--regions", 2 * TILE)
    assert done.returncode == 0, done.stderr
    assert SlideFeatures.load(tmp_path / "out" / "0.svs.features.safetensors").region == 2
    refused = run_command(*words, "--regions", 2 * TILE + 1)
    assert (
        refused.returncode == 1
        and "--regions is 65: it must be a multiple of the size of a tile, 32 px" in refused.stderr
    )
    cut = ["--mpp", 0.5, "--size", TILE, "--region", 2]
    assert run_command("tile", embedded / "slides", "--out", tmp_path / "tiles", *cut).returncode == 0
    other = run_command(*words, "--regions", 4 * TILE, "--tiles", tmp_path / "tiles")
    assert other.returncode == 1 and "the tiling folder has regions of 64 px" in other.stderr


def test_slides_and_tissue_smaller_than_a_region_are_not_lost(embedded, hierarchy, tmp_path):
    tile_encoder = tmp_path / "tiles_only"
    export_encoder(AutoModel.from_pretrained(hierarchy).tile_encoder, tile_encoder, tile_size=TILE, mpp=0.5)
    words = [
        "embed",
        embedded / "slides",
        "--encoder",
        tile_encoder,
        "--regions",
        32 * TILE,
        "--out",
        tmp_path / "out",
    ]
    refused = run_command(*words)
    assert refused.returncode == 1 and "smaller than one region" in refused.stderr and "--partial" in refused.stderr
    done = run_command(*words, "--partial", "--min-tissue", 0.01)
    assert done.returncode == 0, done.stderr
    bag = SlideFeatures.load(tmp_path / "out" / "0.svs.features.safetensors")
    assert (bag.region, len(bag)) == (32, 32 * 32)


def test_a_hierarchy_refuses_single_tiles(embedded, hierarchy, tmp_path):
    size = ["--mpp", 0.5, "--size", TILE]
    assert run_command("tile", embedded / "slides", "--out", tmp_path / "tiles", *size).returncode == 0
    words = ["embed", embedded / "slides", "--encoder", hierarchy, "--out", tmp_path / "out"]
    done = run_command(*words, "--tiles", tmp_path / "tiles")
    assert done.returncode == 1 and "encodes regions, and the tiling folder has single tiles" in done.stderr
