"""The configurations of DINO, iBOT and DINOv2: each makes the model it says, at the cost it says; the small ones run."""

import math
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModel

from hf_pathology.errors import UserError
from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.configuration_dinov2 import Dinov2PreTrainingConfig
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.modeling.modeling_dinov2 import Dinov2ForPreTraining
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.modeling.teacher_student import TeacherStudent
from hf_pathology.modeling.trunk import has_class_token, trunk_tokens
from hf_pathology.recipes import pretrain_dino, pretrain_dinov2, pretrain_ibot
from hf_pathology.recipes.slide_data import SlideData
from hf_pathology.recipes.trunk import TRANSFORMERS, TrunkOptions, new_trunk, patch_grid
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import GridOptions
from hf_pathology.tiles.hidden import HiddenOptions, HiddenPatches
from hf_pathology.tiles.views import ViewOptions
from hf_pathology.training.config import parse_config, read_yaml
from hf_pathology.training.log import read_log
from hf_pathology.training.options import TrainingOptions
from hf_pathology.training.schedules import scaled_rate


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
RECIPES = {  # by the first word of a configuration's name: the recipe, its options of the method, its configuration
    "dino": (pretrain_dino, pretrain_dino.DinoOptions, DinoConfig, DinoForPreTraining),
    "ibot": (pretrain_ibot, pretrain_ibot.IbotOptions, IbotConfig, IbotForPreTraining),
    "dinov2": (pretrain_dinov2, pretrain_dinov2.Dinov2Options, Dinov2PreTrainingConfig, Dinov2ForPreTraining),
}
WEIGHTS = {  # of the trunk; what the published models have, but for the size of the table of positions
    "dino_vit_small": 21_665_664,
    "dino_vit_small_boost": 21_665_664,
    "dino_hipt_vit256": 21_665_664,
    "dino_patchtcga_vit_small": 21_665_664,
    "dino_vit_base": 85_798_656,
    "dino_vit_large": 303_301_632,
    "dino_resnet50": 23_508_032,  # torchvision's, without the classifier
    "ibot_vit_small": 21_665_664,
    "ibot_vit_base": 85_798_656,
    "ibot_vit_large": 303_301_632,
    "dinov2_vit_large": 303_350_784,
    "dinov2_vit_giant": 1_136_486_912 - 1536 - (37**2 - 16**2) * 1536,  # DINOv2's own, but for mask token and 518 px
    "dinov2_vit_huge": 631_234_304,
    "dino_tiny": 32_224,
    "ibot_tiny": 32_224,
    "dinov2_tiny": 32_480,
    "ibot_demo": 357_888,
}
SMALL = ("dino_tiny", "ibot_tiny", "dinov2_tiny", "ibot_demo")  # which nobody published
RATES = {  # published peak learning rates: of how many tiles a step
    "dino_vit_small": (512, 1e-3),
    "dino_vit_small_boost": (1024, 2e-3),
    "dino_hipt_vit256": (256, 5e-4),
    "dino_vit_base": (1024, 3e-3),
    "dino_resnet50": (512, 0.06),
    "ibot_vit_small": (1024, 2e-3),
    "dinov2_vit_large": (4096, 8e-3),
    "dinov2_vit_giant": (384, 3e-4 * math.sqrt(0.375)),
}

each_config = pytest.mark.parametrize("name", sorted(WEIGHTS))
each_published = pytest.mark.parametrize("name", sorted(set(WEIGHTS) - set(SMALL)))


def options_of(recipe, argv: list[str]) -> dict[type, Any]:
    """The recipe's options, by their type, for the command line `argv`."""
    return {type(options): options for options in parse_config(*recipe.OPTIONS, argv=argv)}


@dataclass
class Read:
    """A configuration as its recipe reads it."""

    header: str
    options: dict[type, Any]
    method: TeacherStudent  # on the meta device: without any numbers

    def __getitem__(self, kind: type) -> Any:
        return self.options[kind]


@pytest.fixture(scope="module")
def read():
    """Reads a configuration once; later the same object."""
    known: dict[str, Read] = {}

    def reader(name: str) -> Read:
        if name not in known:
            recipe, kind_of_numbers, kind_of_config, kind = RECIPES[name.split("_")[0]]
            path = CONFIGS / f"{name}.yaml"
            options = options_of(recipe, ["--config", str(path), "--slides", "s", "--out", "o"])
            trunk = new_trunk(options[TrunkOptions], options[ViewOptions].global_size)
            config = kind_of_config(trunk, **asdict(options[kind_of_numbers]))
            with init_empty_weights():
                method = kind(config).to("meta")  # the buffers too
            lines = path.read_text(encoding="utf-8").splitlines()
            header = " ".join(line.lstrip("# ") for line in lines[: next(i for i in range(99) if lines[i][0] != "#")])
            known[name] = Read(header, options, method)
        return known[name]

    return reader


def test_every_configuration_of_these_recipes_is_looked_at_here():
    files = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {name for name in files if name.split("_")[0] in RECIPES} == set(WEIGHTS)


@each_config
def test_a_configuration_makes_a_trunk_with_the_published_number_of_weights(name, read):
    assert sum(weight.numel() for weight in read(name).method.encoder.parameters()) == WEIGHTS[name]


@each_published
def test_the_first_lines_say_what_is_made_at_what_cost_and_where_the_numbers_come_from(name, read):
    header = read(name).header
    assert header.startswith("Makes: ")
    for heading in (" Cost: ", " From: ", " Not published"):
        assert heading in header, heading
    assert f"{read(name)[TrainingOptions].steps:,}" in header


@each_published
def test_the_stated_weights_and_cost_are_those_of_the_model(name, read):
    """The cost of a tile: the teacher sees the global views, the student all, at three times the cost of the teacher.

    Where samples that drop out of a layer are left out, that part of the student's cost is saved.
    """
    header, method, views = read(name).header, read(name).method, read(name)[ViewOptions]
    stated = re.search(r"\(([\d,.]+)( M)? weights", header)
    weights = float(stated[1].replace(",", "")) * (1e6 if stated[2] else 1)
    assert weights == pytest.approx(WEIGHTS[name], rel=2e-3)

    def flops(compute) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
            compute()
        return counter.get_total_flops()

    method.encoder.set_attn_implementation("eager")
    whole, local = (
        flops(lambda size=size: trunk_tokens(method.encoder.eval(), torch.empty(1, 3, size, size)))
        for size in (views.global_size, views.local_size)
    )
    head = method.student_head
    scores = flops(lambda: head.prototypes(head.embed(torch.empty(1, head.mlp[0].in_features))))
    seen = views.global_views + views.local_views
    numbers = read(name)[RECIPES[name.split("_")[0]][1]]
    computed = 1 - numbers.drop_path_rate if getattr(numbers, "drop_path_subset", False) else 1
    student = computed * 3 * (views.global_views * whole + views.local_views * local)
    cost = views.global_views * whole + student
    cost += (views.global_views + 3 * seen) * scores
    stated = float(re.search(r"images of ([\d,.]+) GFLOP", header)[1].replace(",", ""))
    assert stated == pytest.approx(cost / 1e9, rel=0.03)


@each_config
def test_schedules_end_within_the_run_and_views_fit_patches_and_tiles(name, read):
    options, training = read(name).options, read(name)[TrainingOptions]
    views, trunk = options[ViewOptions], options[TrunkOptions]
    numbers = options[RECIPES[name.split("_")[0]][1]]
    assert training.warmup_steps < training.steps
    assert numbers.teacher_temperature_warmup_steps < training.steps
    assert name == "ibot_demo" or numbers.freeze_last_layer_steps < training.steps / 5
    views.check_tile_size(options[GridOptions].tile_size)
    if trunk.trunk in TRANSFORMERS:
        assert views.global_size % trunk.patch_size == views.local_size % trunk.patch_size == 0
    else:
        assert numbers.drop_path_rate == 0  # such a trunk has none
    if HiddenOptions in options:
        edge = patch_grid(read(name).method.config.encoder_config, views.global_size)
        HiddenPatches(options[HiddenOptions], edge, edge)


@pytest.mark.parametrize("name", sorted(RATES))
def test_the_rate_is_the_published_one_for_the_published_step(name, read):
    training = read(name)[TrainingOptions]
    tiles, rate = RATES[name]
    found = scaled_rate(training.learning_rate, tiles, training.reference_batch, training.batch_scaling)
    assert found == pytest.approx(rate)


@pytest.mark.parametrize("name", ["dinov2_vit_giant", "dinov2_vit_huge"])
def test_tiles_are_drawn_in_the_stated_shares_of_resolutions(name, read):
    data, mpp = read(name)[SlideData], read(name)[GridOptions].mpp
    scales = {mpp: 1.0, **dict(zip(data.more_mpp, data.more_weights))}
    drawn = {each: weight / each**2 for each, weight in scales.items()}  # a slide has 1 / mpp ** 2 as many tiles
    shares = {each: round(100 * value / sum(drawn.values())) for each, value in drawn.items()}
    stated = {0.5: 40, 0.25: 20, 1.0: 20, 2.0: 20} if "huge" in name else dict.fromkeys(scales, 25)
    assert shares == stated


@pytest.mark.parametrize("name", ["dinov2_vit_large", "dinov2_vit_giant", "dinov2_vit_huge"])
def test_the_blur_of_dinov2_is_turned_round_as_in_its_code(name, read):
    published = [1.0, 0.1, 0.5]
    assert read(name)[ViewOptions].blur == [1 - probability for probability in published]


def test_a_resnet_is_refused_by_the_methods_that_hide_patches():
    with pytest.raises(UserError, match="a resnet has no patches to hide"):
        patch_grid(new_trunk(TrunkOptions(trunk="resnet"), 224), 224)


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_aperio(folder / "a.svs", draw_slide(0, "glandular", 512)[0], 0.5)
    return folder


@pytest.mark.parametrize("name", ["dino_tiny", "ibot_tiny", "dinov2_tiny"])
def test_the_smallest_configurations_train_and_release_an_encoder_that_loads_whole(name, read, slides, tmp_path):
    recipe = RECIPES[name.split("_")[0]][0]
    run = tmp_path / "run"
    recipe.main(
        ["--config", str(CONFIGS / f"{name}.yaml"), "--slides", str(slides), "--out", str(run), "--steps", "2"]
    )
    losses = [record["loss"] for record in read_log(run / "log.jsonl")]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    encoder, loading = AutoModel.from_pretrained(run / "encoder", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(encoder).__module__.startswith("transformers.models.") and has_class_token(encoder)
    processor = AutoImageProcessor.from_pretrained(run / "encoder")
    assert (processor.mpp, processor.tile_size, processor.pooling) == (1.0, 32, "cls")
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = encoder(pixels).pooler_output
    assert features.shape == (3, 32) and features.std(0).min() > 0


def test_activation_checkpointing_draws_the_same_and_changes_no_loss(slides, tmp_path):
    argv = ["--config", str(CONFIGS / "dinov2_tiny.yaml"), "--slides", str(slides), "--steps", "2"]
    losses = []
    for checkpointing in ("false", "true"):
        run = str(tmp_path / checkpointing)
        options = ["--out", run, "--drop_path_rate", "0.4", "--activation_checkpointing", checkpointing]
        pretrain_dinov2.main([*argv, *options])
        losses.append([record["loss"] for record in read_log(Path(run) / "log.jsonl")])
    assert losses[0] == losses[1]


PAGES = sorted((ROOT / "docs" / "pretraining").glob("*.md"))
OURS = [page for page in PAGES if page.stem in ("README", *RECIPES)]


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command in the page's bash blocks, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def recipe_call(words: list[str]) -> tuple[Any, list[str]] | None:
    """The recipe that a command starts, with its options; None when it starts none of these."""
    for i, word in enumerate(words):
        name = re.fullmatch(r"(?:recipes/|hf_pathology\.recipes\.)pretrain_(\w+?)(?:\.py)?", word)
        if name and name[1] in RECIPES:
            return RECIPES[name[1]][0], words[i + 1 :]
    return None


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.stem)
def test_the_recipes_understand_every_command_of_the_pages(page):
    calls = [call for call in map(recipe_call, commands_of(page)) if call]
    assert calls
    for recipe, argv in calls:
        options = options_of(recipe, argv)
        given = {word.removeprefix("--").split("=")[0] for word in argv if word.startswith("--")} - {"config"}
        assert given <= {name for each in options.values() for name in vars(each)}


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.stem)
def test_files_and_links_of_the_pages_exist_and_their_configurations_are_named(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for word in re.findall(r"recipes/[\w/]+\.(?:py|yaml)", text):
        assert (ROOT / word).is_file(), word


def test_the_pages_name_every_configuration():
    text = "".join(page.read_text(encoding="utf-8") for page in OURS)
    assert not [name for name in WEIGHTS if name not in text]


def test_the_first_command_of_the_index_does_what_it_says(slides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = next(words for words in commands_of(ROOT / "docs" / "pretraining" / "README.md") if recipe_call(words))
    recipe, argv = recipe_call(command)
    argv = [str(slides) if word == "SLIDES" else str(ROOT / word) if word.endswith(".yaml") else word for word in argv]
    recipe.main(argv)
    recipe.main([*argv, "--log_every", "2"])  # the same command goes on: here nothing is left to do
    assert AutoModel.from_pretrained(tmp_path / "run" / "encoder").config.model_type in TRANSFORMERS
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == read_yaml(CONFIGS / "dino_tiny.yaml")["steps"]
