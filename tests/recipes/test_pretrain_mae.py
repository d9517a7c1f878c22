"""The MAE recipe as a user runs it: it learns, is killed and goes on, on one process and on two, and starts from releases."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from launched_runs import assert_a_killed_run_ends_as_one_that_was_not, launcher
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTMAEForPreTraining, ViTModel

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.mae_start import sincos_table
from hf_pathology.modeling.modeling_mae import MaeForPreTraining, hidden_count
from hf_pathology.recipes import pretrain_mae
from hf_pathology.recipes.trunk import new_trunk
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.tiles.views import MultiCrop
from hf_pathology.training.config import parse_config
from hf_pathology.training.log import read_log


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
SHORT = ["--steps", "8", "--warmup_steps", "2", "--log_every", "1", "--panel_every", "4", "--checkpoint_every", "2"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for index, label in enumerate(("glandular", "solid")):
        write_aperio(folder / f"{label}.svs", draw_slide(index, label, 768)[0], 0.5)
    return folder


def command(launched, slides, out, *options) -> list[str]:
    config = str(CONFIGS / "mae_tiny.yaml")
    return [*launched, "--config", config, "--slides", str(slides), "--out", str(out), *options]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits(slides, tmp_path, processes):
    launched = launcher("pretrain_mae.py", processes)
    assert_a_killed_run_ends_as_one_that_was_not(lambda out: command(launched, slides, out, *SHORT), tmp_path)


def test_the_tiny_configuration_learns_and_leaves_an_encoder_and_an_autoencoder_behind(slides, tmp_path):
    pretrain_mae.main(command([], slides, tmp_path / "run", "--workers", "0"))
    panels = [record for record in read_log(tmp_path / "run" / "log.jsonl") if "unexplained" in record]
    assert panels[0]["unexplained"] > 1  # a new decoder draws worse than the mean patch
    assert sum(record["unexplained"] for record in panels[-5:]) / 5 < 0.8
    assert panels[-1]["effective_rank"] > 2

    encoder, loading = AutoModel.from_pretrained(tmp_path / "run" / "encoder", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(encoder) is ViTModel
    assert torch.equal(encoder.embeddings.position_embeddings[0], sincos_table(64, 4).float())
    card = (tmp_path / "run" / "encoder" / "README.md").read_text()
    assert "MAE" in card and "slides: 2; cases: not recorded" in card and "`mask_ratio`: 0.75" in card

    folder = tmp_path / "run" / "autoencoder"
    autoencoder, loading = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    for name, value in encoder.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(value, autoencoder.vit.state_dict()[name]), name


def test_the_learning_rate_and_the_decay_are_those_of_mae(slides, tmp_path):
    pretrain_mae.main(command([], slides, tmp_path / "run", *SHORT, "--workers", "0"))
    records = read_log(tmp_path / "run" / "log.jsonl")
    peak = 3.2e-2 * 16 / 256
    assert [records[step]["learning_rate"] for step in range(3)] == pytest.approx([0.0, peak / 2, peak])
    assert {record["weight_decay"] for record in records} == {0.05}


def test_training_goes_on_from_a_release_with_its_statistics_and_its_table(slides, tmp_path):
    torch.manual_seed(0)
    trunk = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8
    )
    vit = ViTModel(trunk, add_pooling_layer=False)
    half = [0.5, 0.5, 0.5]
    export_encoder(vit, tmp_path / "release", tile_size=32, mpp=0.5, mean=half, std=half)
    start = ["--encoder", str(tmp_path / "release"), "--steps", "2", "--workers", "0"]
    pretrain_mae.main(command([], slides, tmp_path / "run", *start))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "encoder")
    assert list(processor.image_mean) == half and list(processor.image_std) == half
    encoder = AutoModel.from_pretrained(tmp_path / "run" / "encoder")
    # Of two steps, the first at a learning rate of 0, the table has not moved and everything else has.
    assert torch.equal(encoder.embeddings.position_embeddings, vit.embeddings.position_embeddings)
    assert 0 < (encoder.layernorm.weight - vit.layernorm.weight).abs().max() < 1e-3
    with pytest.raises(UserError, match="takes views of 32 px: choose --global_size 32"):
        pretrain_mae.main(command([], slides, tmp_path / "other", *start, "--global_size", "64"))
    processor = tmp_path / "release" / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("32", "64"))
    with pytest.raises(UserError, match="has positions for views of 32 px only"):
        pretrain_mae.main(command([], slides, tmp_path / "third", *start, "--global_size", "64"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--local_views", "2"], "local_views is 2: MAE has no use for them, set it to 0"),
        (["--trunk", "resnet"], "--trunk resnet: MAE's encoder must be able to leave patches out"),
        (["--mask_ratio", "1.0"], "--trunk vit: mask_ratio is 1.0: of 16 patches it must hide some and leave some"),
        (["--decoder_hidden_size", "30"], "--trunk vit: decoder_hidden_size is 30: it must be a multiple of 4"),
        (["--global_size", "50"], "global_size is 50: it must be a multiple of patch_size, 8"),
    ],
)
def test_a_mistake_is_named_before_training(slides, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        pretrain_mae.main(command([], slides, tmp_path / "run", *options))


@pytest.mark.parametrize("mask_ratio", [0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("edge", [4, 5, 14, 16])
def test_as_many_patches_are_drawn_as_the_model_wants_hidden(mask_ratio, edge):
    patches = pretrain_mae.hidden_patches(mask_ratio, edge)
    drawn = np.stack([patches.draw(np.random.default_rng(seed)) for seed in range(200)])
    assert set(drawn.sum(axis=(1, 2))) == {hidden_count(edge * edge, mask_ratio)}
    share = hidden_count(edge * edge, mask_ratio) / edge**2
    spread = (share * (1 - share) / 200) ** 0.5
    assert np.abs(drawn.mean(axis=0) - share).max() < 4.5 * spread  # no patch is hidden more often than another


def test_what_is_hidden_depends_on_the_tile_and_the_seed_alone():
    views = options_of("mae_tiny")[3]
    tile = {"tile": np.zeros((32, 32, 3), np.uint8), "slide": "a", "xy": (32, 64), "epoch": 0}
    patches = pretrain_mae.hidden_patches(0.75, 4)
    first, again, other = (MultiCrop(views, seed, patches)(dict(tile))["hidden"] for seed in (0, 0, 1))
    assert first.shape == (1, 4, 4) and np.array_equal(first, again) and not np.array_equal(first, other)


def options_of(name: str) -> tuple:
    """The options of the recipe as the YAML file `name` has them."""
    return parse_config(
        *pretrain_mae.OPTIONS, argv=["--config", str(CONFIGS / f"{name}.yaml"), "--slides", "s", "--out", "o"]
    )


def published_model(name: str) -> MaeForPreTraining:
    """The model of the YAML file `name`, without any numbers."""
    _, _, _, views, trunk, numbers, *_ = options_of(name)
    with torch.device("meta"):
        return MaeForPreTraining(MaeConfig(new_trunk(trunk, views.global_size), **asdict(numbers)))


@pytest.mark.parametrize(
    ("name", "encoder", "both"),
    [
        ("mae_vit_base", 85_798_656, 111_907_840),
        ("mae_vit_large", 303_301_632, 329_541_888),
        ("mae_vit_huge", 630_764_800, 657_074_508),
    ],
)
def test_the_published_configurations_make_the_published_models_at_the_published_rates(name, encoder, both):
    _, _, _, views, trunk, numbers, training, *_ = options_of(name)
    model = published_model(name)
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == encoder
    assert sum(parameter.numel() for parameter in model.parameters()) == both
    assert model.autoencoder.config.intermediate_size == 4 * trunk.hidden_size
    assert training.batch_size * training.accumulation * 8 == 4096
    assert (training.learning_rate, training.min_learning_rate, training.reference_batch) == (1.5e-4, 0.0, 256)
    assert (training.beta1, training.beta2, training.clip_gradient) == (0.9, 0.95, 0.0)
    assert (training.weight_decay, training.final_weight_decay) == (0.05, 0.05)
    assert training.warmup_steps * 20 == training.steps and not training.warmup_includes_end
    assert (numbers.mask_ratio, numbers.norm_pix_loss, views.global_scale) == (0.75, True, [0.2, 1.0])
    assert (views.global_views, views.local_views) == (1, 0)


@pytest.mark.parametrize("name", ["mae_vit_base", "mae_vit_large", "mae_vit_huge"])
def test_the_stated_cost_is_that_of_the_model_and_the_run(name):
    autoencoder, training = published_model(name).autoencoder, options_of(name)[6]
    autoencoder.set_attn_implementation("eager")
    autoencoder.decoder.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        autoencoder(torch.empty(1, 3, 224, 224))
    cost = 3 * counter.get_total_flops()  # backward costs twice what forward does
    header = (CONFIGS / f"{name}.yaml").read_text()
    stated = re.search(r"Cost: ([\d,]+) M images of (\d+) GFLOP: about (\d+) hours", header)
    images, gflop, hours = (float(number.replace(",", "")) for number in stated.groups())
    assert images == pytest.approx(training.steps * 4096 / 1e6, rel=1e-3)
    assert gflop == pytest.approx(cost / 1e9, rel=0.01)
    assert hours == pytest.approx(training.steps * 4096 * cost / (0.3 * 989e12) / 3600, rel=0.01)
    assert f"{training.steps:,}" in header and f"{training.warmup_steps:,}" in header


PAGE = ROOT / "docs" / "pretraining" / "mae.md"


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_recipe_understands_every_command_of_its_page():
    lines = "\n".join(blocks_of("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    calls = [words[words.index("recipes/pretrain_mae.py") + 1 :] for words in commands if "accelerate" in words]
    assert len(calls) == 4
    for argv in calls:
        parse_config(*pretrain_mae.OPTIONS, argv=[str(ROOT / word) if ".yaml" in word else word for word in argv])


def test_the_files_that_the_page_names_exist():
    text = PAGE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (PAGE.parent / link).exists(), link
    for word in re.findall(r"(?:recipes|tests)/[\w/]+\.(?:py|yaml)", text):
        assert (ROOT / word).is_file(), word


def test_the_page_shows_how_to_look_at_what_is_drawn(slides, tmp_path, monkeypatch):
    pretrain_mae.main(command([], slides, tmp_path / "run", "--steps", "2", "--workers", "0"))
    tile = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(tile).save(tmp_path / "tile.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    (snippet,) = blocks_of("python")
    exec(snippet, names)
    seen = ~names["hidden"].expand_as(names["patches"])
    assert int(seen[0, :, 0].sum()) == 4
    assert torch.equal(names["model"].patchify(names["picture"])[seen], names["patches"][seen])
    drawn = names["model"].patchify(names["picture"])[~seen].view(12, -1)
    spread = names["std"][names["hidden"][..., :1]].flatten()
    expected = names["drawn"].logits[~seen].view(12, -1).std(dim=1) * spread
    assert torch.allclose(drawn.std(dim=1), expected, rtol=1e-4)
