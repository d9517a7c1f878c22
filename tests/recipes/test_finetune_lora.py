"""LoRA fine-tuning: what learns, what is written, and that what is written says what was trained."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from hf_pathology.errors import UserError
from hf_pathology.features.encoder import load_encoder
from hf_pathology.recipes import finetune_lora
from hf_pathology.recipes.finetune_lora import LoraOptions, TileClassifier, add_lora, main, save_models
from hf_pathology.tiles.folder import TileDataset, read_tile_folder


# peft asks transformers for a property that has been renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIGS = Path(finetune_lora.__file__).parent / "configs"


def write_release(folder, pooling="cls", mpp=0.5, pooler=True):
    """A tiny random ViT in the layout of a release."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        pooler_act="linear",
    )
    encoder = ViTModel(config, add_pooling_layer=pooler)
    if pooler:
        nn.init.eye_(encoder.pooler.dense.weight)
        nn.init.zeros_(encoder.pooler.dense.bias)
    encoder.save_pretrained(folder)
    statistics = {"image_mean": [0.7, 0.5, 0.6], "image_std": [0.2, 0.25, 0.2]}
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, resample=3, tile_size=32, pooling=pooling, mpp=mpp, **statistics).save_pretrained(
        folder
    )
    return folder


def write_textures(folder, tiles_per_class=64, tiles_per_group=4):
    """Fine and coarse noise in groups, with a manifest; half of every tile is dark, so colour says nothing."""
    rng, rows = np.random.default_rng(0), []
    for name, grain in (("coarse", 8), ("fine", 2)):
        (folder / name).mkdir(parents=True)
        for tile in range(tiles_per_class):
            cells = 48 // grain
            light = rng.permutation(cells * cells).reshape(cells, cells, 1) % 2
            pixels = np.array([120, 50, 90]) + 120 * light.repeat(grain, axis=0).repeat(grain, axis=1)  # (48, 48, 3)
            rows.append((f"{name}/{tile}.png", name, f"{name}_{tile // tiles_per_group}"))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / rows[-1][0])
    pd.DataFrame(rows, columns=["path", "class", "group"]).to_csv(folder / "manifest.csv", index=False)
    return folder


def options(encoder="", tiles="", out="", **numbers):
    tiny = {"rank": 4, "alpha": 8, "dropout": 0.0, "epochs": 1, "batch_size": 16, "workers": 0, "cpu": True}
    return LoraOptions(str(encoder), str(tiles), str(out), **{**tiny, **numbers})


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    return write_textures(tmp_path_factory.mktemp("textures"))


@pytest.fixture(scope="module")
def out(release, textures, tmp_path_factory):
    """What one run of the recipe from the command line leaves behind."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    paths = ["--encoder", str(release), "--tiles", str(textures), "--out", str(folder)]
    main(["--config", str(CONFIGS / "lora_tiny.yaml"), *paths])
    return folder


@pytest.fixture(scope="module")
def held_out(out, textures):
    """The tiles of predictions.csv through the release's processor, (N, 3, 32, 32), and the table."""
    table = pd.read_csv(out / "predictions.csv")
    images = [Image.open(textures / path) for path in table["path"]]
    processor = AutoImageProcessor.from_pretrained(out / "merged")
    return processor(images=images, return_tensors="pt")["pixel_values"], table


def load_whole(auto_class, folder):
    model, loading = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return model.eval()


def test_a_run_learns_textures_that_colour_cannot_tell(out):
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["colour_regression"]["roc_auc"] == 0.5
    assert metrics["lora"]["accuracy"] > 0.8
    assert metrics["lora"]["roc_auc"] > metrics["frozen_probe"]["roc_auc"] > 0.5
    assert set(metrics["frozen_probe"]) == {"accuracy", "balanced_accuracy", "roc_auc"}
    assert metrics["losses"][-1] < metrics["losses"][0]


def test_metrics_say_how_the_run_was_made(out, release, textures):
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["options"]["encoder"] == str(release)
    assert metrics["options"]["rank"] == 4 and metrics["options"]["epochs"] == 8
    assert metrics["options"]["mpp"] is None
    assert metrics["classes"] == ["coarse", "fine"]
    assert metrics["train_tiles"] + metrics["val_tiles"] == 128


def test_predictions_are_of_held_out_groups_and_agree_with_the_metrics(out, textures):
    table = pd.read_csv(out / "predictions.csv")
    manifest = pd.read_csv(textures / "manifest.csv")
    trained_on = manifest[~manifest["path"].isin(table["path"])]
    assert not set(table["group"]) & set(trained_on["group"])
    np.testing.assert_allclose(table[["prob_coarse", "prob_fine"]].sum(axis=1), 1, atol=1e-6)
    accuracy = (table["class"] == table["predicted"]).mean()
    assert accuracy == pytest.approx(json.loads((out / "metrics.json").read_text())["lora"]["accuracy"])


def test_adapter_over_base_equals_the_merged_encoder(out, release, held_out):
    pixels, _ = held_out
    merged = load_whole(AutoModel, out / "merged")
    by_transformers = AutoModel.from_pretrained(out / "adapter").eval()
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(release), out / "adapter").eval()
    with torch.no_grad():
        expected = merged(pixels).last_hidden_state
        for adapted in (by_transformers, by_peft):
            torch.testing.assert_close(adapted(pixels).last_hidden_state, expected, atol=1e-5, rtol=0)
        frozen = AutoModel.from_pretrained(release).eval()(pixels).last_hidden_state
    assert (frozen - expected).abs().max() > 0.1


def test_the_merged_encoder_is_a_plain_vit_that_keeps_its_identity_pooler(out, held_out):
    merged = load_whole(AutoModel, out / "merged")
    assert type(merged) is ViTModel
    with torch.no_grad():
        output = merged(held_out[0])
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0])


def test_the_classifier_gives_the_probabilities_of_the_run_and_knows_the_classes(out, held_out):
    pixels, table = held_out
    classifier = load_whole(AutoModelForImageClassification, out / "classifier")
    with torch.no_grad():
        probabilities = classifier(pixels).logits.softmax(dim=-1).numpy()
    np.testing.assert_allclose(probabilities, table[["prob_coarse", "prob_fine"]], atol=1e-5)
    assert classifier.config.id2label == {0: "coarse", 1: "fine"}


def test_the_adapter_names_its_base_as_the_user_gave_it(out, release):
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(release)
    assert "More Information Needed" not in (out / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("name", ["adapter", "merged", "classifier"])
def test_every_output_carries_the_processor_of_the_release(out, name):
    processor = AutoImageProcessor.from_pretrained(out / name)
    assert (processor.mpp, processor.tile_size, processor.pooling) == (0.5, 32, "cls")
    assert list(processor.image_mean) == [0.7, 0.5, 0.6]


def test_nothing_half_written_stays_behind(out):
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter",
        "classifier",
        "merged",
        "metrics.json",
        "predictions.csv",
    ]


def test_only_the_adapter_and_the_head_move(release, textures):
    encoder, chosen = load_encoder(release), options(tiles=textures)
    model = TileClassifier(add_lora(encoder.model, chosen), encoder, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune_lora.train(model, finetune_lora.read_tiles(chosen).subset("train"), chosen, Accelerator(cpu=True))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith("head.")}


def test_the_adapter_sits_on_query_and_value_and_not_on_the_pooler(release):
    adapted = add_lora(load_encoder(release).model, options())
    places = {name.split(".lora_")[0].split(".")[-1] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert places == {"q_proj", "v_proj"}


@pytest.mark.parametrize(("pooling", "width"), [("cls", 32), ("mean", 32), ("cls+mean", 64)])
def test_the_classifier_pools_as_the_release_says(tmp_path, pooling, width):
    encoder = load_encoder(write_release(tmp_path, pooling))
    tiles = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    logits, features = TileClassifier(encoder.model, encoder, 3)(tiles)
    torch.testing.assert_close(features.detach(), encoder(tiles))
    assert logits.shape == (2, 3) and features.shape == (2, width)


def lora_classifier(release):
    encoder = load_encoder(release)
    return TileClassifier(add_lora(encoder.model, options()), encoder, 2)


def test_another_pooling_saves_the_head_alone(tmp_path):
    model = lora_classifier(write_release(tmp_path / "release", "mean"))
    save_models(model, ["a", "b"], tmp_path)
    head = load_file(tmp_path / "classifier" / "head.safetensors")
    torch.testing.assert_close(head["weight"], model.head.weight.detach())


def test_an_encoder_without_a_pooler_is_merged_with_an_identity_pooler(tmp_path):
    save_models(lora_classifier(write_release(tmp_path / "release", pooler=False)), ["a", "b"], tmp_path)
    output = load_whole(AutoModel, tmp_path / "merged")(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0])


def test_an_encoder_of_another_architecture_is_adapted_too(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape)).save_pretrained(tmp_path / "release")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "release")
    model = lora_classifier(tmp_path / "release")
    assert any("lora_" in name for name, _ in model.named_parameters())
    save_models(model, ["a", "b"], tmp_path)
    assert type(load_whole(AutoModel, tmp_path / "merged")) is Dinov2WithRegistersModel


def test_an_unknown_resolution_is_stated_as_null_and_a_known_one_is_kept(tmp_path, textures):
    release = write_release(tmp_path / "release", mpp=None)
    for mpp in (None, 0.5):
        encoder = finetune_lora.load_for(read_tile_folder(textures, mpp=mpp), str(release))
        finetune_lora.save_release(encoder.model, encoder, tmp_path / "copy")
        assert json.loads((tmp_path / "copy" / "preprocessor_config.json").read_text())["mpp"] == mpp


def test_tiles_of_another_resolution_are_refused_with_both_numbers(release, textures):
    with pytest.raises(UserError, match="trained at 0.5 mpp and the tiles are at 1.0"):
        finetune_lora.load_for(read_tile_folder(textures, mpp=1.0), str(release))


def test_training_views_show_all_eight_orientations_and_plain_views_one(textures):
    tile = TileDataset(read_tile_folder(textures))[0]["tiles"]
    assert np.array_equal(finetune_lora.plain_view(48)(tile), tile)
    assert finetune_lora.plain_view(32)(tile).shape == (32, 32, 3)
    ramp = np.arange(0, 256, 8, dtype=np.uint8)
    slopes = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 0), axis=-1)  # red grows to the right, green downwards
    torch.manual_seed(0)
    views = [finetune_lora.random_view(32)(slopes).astype(int) for _ in range(100)]
    assert len({tuple(np.sign([*(view[0, -1] - view[0, 0]), *(view[-1, 0] - view[0, 0])])) for view in views}) == 8


def test_damaged_tiles_are_named_before_anything_is_trained(release, tmp_path):
    textures = write_textures(tmp_path / "textures", tiles_per_class=8)
    (textures / "fine" / "4.png").write_bytes(b"damaged")
    paths = ["--encoder", str(release), "--tiles", str(textures), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="4.png cannot be read"):
        main(["--config", str(CONFIGS / "lora_tiny.yaml"), *paths])
    assert not (tmp_path / "out").exists()
