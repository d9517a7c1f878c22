import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

from hf_pathology.errors import UserError
from hf_pathology.features.colour import MeanColour
from hf_pathology.features.embed import check_resolution, embed_cohort
from hf_pathology.features.encoder import load_encoder
from hf_pathology.features.pooling import pool, pooling_of
from hf_pathology.features.store import SlideFeatures, features_path, load_cohort_features
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import CohortSlide
from hf_pathology.slides.grid import tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    folder = tmp_path_factory.mktemp("release") / "encoder"
    return export_encoder(ViTModel(config, add_pooling_layer=False), folder, tile_size=32, mpp=0.5)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "noise.svs"
    pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3)).astype(np.uint8)
    write_aperio(path, pixels, 0.5)
    return path


def embed(path, size, encoder, out):
    """The features of a slide's tiles of `size` px, edge to edge at 0.5 mpp."""
    tissue = Tissue(np.ones((8, 8), bool), (64.0, 64.0))
    grid = tile_grid(Slide(path), tissue, key=path.name, size=size, mpp=0.5)
    ((_, result),) = embed_cohort([(CohortSlide(path.name, path, "p"), grid)], encoder, out)
    assert (result.tiles, result.unreadable, result.found) == (len(grid), 0, False)
    return grid, SlideFeatures.load(features_path(out, path.name))


def test_features_are_those_of_the_image_processor_and_the_model(release, slide, tmp_path):
    grid, bag = embed(slide, 32, load_encoder(release), tmp_path)
    tiles, _ = Slide(slide).read_tiles(grid.xy, 32, grid.extent)
    processor, model = ViTImageProcessor.from_pretrained(release), ViTModel.from_pretrained(release).eval()
    with torch.inference_mode():
        expected = model(**processor(list(tiles), return_tensors="pt")).pooler_output
    assert bag.features.shape == (256, 32) and bag.valid.all()
    np.testing.assert_allclose(bag.features, expected.numpy(), atol=1e-5)


def test_tiles_of_another_size_are_resized_to_the_encoders_input(release, slide, tmp_path):
    _, bag = embed(slide, 64, load_encoder(release), tmp_path)
    assert bag.features.shape == (64, 32) and np.isfinite(bag.features).all()


def test_another_resolution_is_refused_with_the_remedy(release):
    encoder = load_encoder(release)
    check_resolution(encoder, 0.502)
    with pytest.raises(
        UserError, match=r"was trained at 0.5 mpp and the tiles are at 0.25: tile again with --mpp 0.5"
    ):
        check_resolution(encoder, 0.25)


def test_an_encoder_that_is_not_there_or_not_whole_is_refused_in_one_line(release, tmp_path):
    with pytest.raises(UserError, match="nowhere cannot be loaded"):
        load_encoder(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "half" / name).write_bytes((release / name).read_bytes())
    (tmp_path / "half" / "model.safetensors").write_bytes((release / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="half cannot be loaded as an encoder"):
        load_encoder(tmp_path / "half")


def test_the_revision_of_a_directory_follows_its_weights(release, tmp_path):
    torch.manual_seed(1)
    other = ViTModel(load_encoder(release).model.config, add_pooling_layer=False)
    export_encoder(other, tmp_path / "other", tile_size=32, mpp=0.5)
    revisions = [load_encoder(folder).revision for folder in (release, release, tmp_path / "other")]
    assert revisions[0] == revisions[1] != revisions[2]


def test_a_convolutional_encoder_is_pooled_by_its_global_average(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.pooling == "gap"
    tiles = torch.randint(0, 255, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = encoder.model(encoder.pixels(tiles)).pooler_output.flatten(1)
    torch.testing.assert_close(encoder(tiles), expected)


def test_pooling_rules():
    tokens = torch.arange(24.0).view(1, 4, 6)
    assert torch.equal(pool(tokens, "cls"), tokens[:, 0])
    assert torch.equal(pool(tokens, "mean", prefix_tokens=2), tokens[:, 2:].mean(1))
    assert pool(tokens, "cls+mean").shape == (1, 12)
    with pytest.raises(ValueError, match="does not fit an output of shape"):
        pool(tokens, "gap")
    assert pooling_of("mean", "any", "vit") == "mean"
    assert pooling_of(None, "some/thing", "vit") == "cls"
    with pytest.raises(ValueError, match="does not say how to pool"):
        pooling_of(None, "some/thing", "unheard_of")
    with pytest.raises(ValueError, match="asks for pooling 'max'"):
        pooling_of("max", "some/thing", "vit")


def bag(slide="sub/a.svs", encoder="e", features=None):
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32) if features is None else features
    xy = np.arange(2 * len(features)).reshape(-1, 2)
    valid = np.ones(len(features), bool)
    return SlideFeatures(slide, encoder, "r", "cls", 224, 0.5, (448.0, 448.0), (1000, 900), features, xy, valid)


def test_a_saved_bag_comes_back_the_same(tmp_path):
    path = features_path(tmp_path, "sub/a.svs")
    bag().save(path)
    copy = SlideFeatures.load(path)
    assert path == tmp_path / "sub" / "a.svs.features.safetensors"
    for name in ("features", "xy", "valid"):
        assert np.array_equal(getattr(copy, name), getattr(bag(), name))
    assert (copy.slide, copy.encoder, copy.mpp, copy.extent) == ("sub/a.svs", "e", 0.5, (448.0, 448.0))


def test_a_cohort_of_features_reports_what_is_missing_and_refuses_a_mixture(tmp_path):
    bag("a.svs").save(features_path(tmp_path, "a.svs"))
    bags, missing = load_cohort_features(tmp_path, ["a.svs", "b.svs"])
    assert len(bags) == 1 and "b.svs has no features" in missing[0]
    bag("b.svs", encoder="other").save(features_path(tmp_path, "b.svs"))
    with pytest.raises(UserError, match="mixes features of 2 encoders"):
        load_cohort_features(tmp_path, ["a.svs", "b.svs"])


def test_a_truncated_feature_file_is_named(tmp_path):
    path = features_path(tmp_path, "a.svs")
    bag("a.svs").save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="a.svs.features.safetensors cannot be read"):
        SlideFeatures.load(path)


def test_mean_colour_is_mean_and_deviation_of_the_channels():
    tiles = torch.randint(0, 255, (4, 8, 8, 3), dtype=torch.uint8)
    numbers = MeanColour()(tiles)
    pixels = tiles.view(4, 64, 3).float() / 255
    torch.testing.assert_close(numbers, torch.cat([pixels.mean(1), pixels.std(1)], 1))
