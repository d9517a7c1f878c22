"""iBOT pretraining from slides (Zhou et al. 2022, arXiv 2111.07832; Phikon: Filiot et al. 2023).

    accelerate launch recipes/pretrain_ibot.py --config recipes/configs/ibot_vit_small.yaml --slides DIR --out DIR

The same command goes on with a run that was interrupted. The encoder lies in OUT/encoder at the end:
`AutoModel.from_pretrained("OUT/encoder")`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_pathology.hub_upload.cards.card import CardOptions
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.recipes.encoder_release import EncoderRelease, end_run
from hf_pathology.recipes.inputs import view_loader, views_to_inputs
from hf_pathology.recipes.judge import JudgeOptions, make_judge
from hf_pathology.recipes.slide_data import SlideData, load_tiles
from hf_pathology.recipes.trunk import TrunkOptions, make_method, new_trunk, patch_grid, views_for_release
from hf_pathology.slides.tiling import GridOptions
from hf_pathology.tiles.filters import FilterOptions
from hf_pathology.tiles.hidden import HiddenOptions, HiddenPatches
from hf_pathology.tiles.views import MultiCrop, ViewOptions
from hf_pathology.training.config import deciding, parse_config
from hf_pathology.training.loop import TrainingLoop
from hf_pathology.training.options import TrainingOptions
from hf_pathology.training.start import run_recipe, start


@dataclass
class IbotOptions:
    """The head and the teacher; see `IbotConfig` for what each number is."""

    out_dim: int = 8192
    patch_out_dim: int | None = None
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
    head_layers: int = 3
    head_norm: str | None = None
    unit_norm: bool = True
    drop_path_rate: float = 0.1
    teacher_temperature: float = 0.07
    teacher_patch_temperature: float = 0.07
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_patch_temperature: float = 0.04
    teacher_temperature_warmup_steps: int = 0
    center_momentum: float = 0.9
    patch_center_momentum: float = 0.9
    teacher_momentum: float = 0.996
    cls_loss_weight: float = 1.0
    patch_loss_weight: float = 1.0
    freeze_last_layer_steps: int = 0


OPTIONS = (
    SlideData,
    GridOptions,
    FilterOptions,
    ViewOptions,
    HiddenOptions,
    TrunkOptions,
    IbotOptions,
    TrainingOptions,
    JudgeOptions,
    CardOptions,
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_config(*OPTIONS, argv=argv)
    data, grid, filters, views, patches, trunk, numbers, training, judging, card = options
    accelerator = start(cpu=training.cpu, seed=training.seed)
    out = Path(data.out)

    # What is asked for is made, and mistakes are told, before any slide is read.
    views = views_for_release(views, trunk, grid.mpp)
    model = make_method(
        IbotForPreTraining,
        lambda config: IbotConfig(config, **asdict(numbers)),
        trunk,
        lambda: new_trunk(trunk, views.global_size),
        accelerator,
    )
    edge = patch_grid(model.config.encoder_config, views.global_size)
    views.check_tile_size(grid.tile_size)
    judge = make_judge(judging, views, training)

    # Tiles (of slides, of shards, of a folder) to views to loss.
    cohort = load_tiles(data, grid, filters, accelerator)
    loader = view_loader(
        cohort, MultiCrop(views, training.seed, HiddenPatches(patches, edge, edge)), data, training, accelerator
    )
    config = deciding(cohort, filters, views, patches, trunk, numbers, training, data)
    release = EncoderRelease("iBOT", lambda: model.encoder, views, config, cohort, training, card, out, options)
    to_inputs = views_to_inputs(views, accelerator.device)
    TrainingLoop(model, loader, to_inputs, training, accelerator, out, config, export=release, judge=judge).run()

    # Loss to release.
    end_run(release, accelerator)


if __name__ == "__main__":
    run_recipe(main)
