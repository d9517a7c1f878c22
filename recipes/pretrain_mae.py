"""MAE pretraining from slides (He et al. 2021, arXiv 2111.06377; PatchTCGA's ViT-L: arXiv 2303.15693).

    accelerate launch recipes/pretrain_mae.py --config recipes/configs/mae_vit_base.yaml --slides DIR --out DIR

The same command goes on with a run that was interrupted. The encoder lies in OUT/encoder at the end:
`AutoModel.from_pretrained("OUT/encoder")`; encoder and decoder together in OUT/autoencoder, for `ViTMAEForPreTraining`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_pathology.atomic import atomic_directory
from hf_pathology.errors import UserError
from hf_pathology.hub_upload.cards.card import CardOptions
from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining, hidden_count
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
class MaeOptions:
    """The decoder, and what is hidden; see `MaeConfig` for what each number is."""

    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True


OPTIONS = (
    SlideData,
    GridOptions,
    FilterOptions,
    ViewOptions,
    TrunkOptions,
    MaeOptions,
    TrainingOptions,
    JudgeOptions,
    CardOptions,
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_config(*OPTIONS, argv=argv)
    data, grid, filters, views, trunk, numbers, training, judging, card = options
    if views.local_views:
        raise UserError(
            f"local_views is {views.local_views}: MAE has no use for them, set it to 0 (and global_views to 1)"
        )
    accelerator = start(cpu=training.cpu, seed=training.seed)
    out = Path(data.out)

    # What is asked for is made, and mistakes are told, before any slide is read.
    views = views_for_release(views, trunk, grid.mpp)
    model = make_method(
        MaeForPreTraining,
        lambda config: MaeConfig(config, **asdict(numbers)),
        trunk,
        lambda: new_trunk(trunk, views.global_size),
        accelerator,
    )
    size = model.config.encoder_config.image_size
    if size != views.global_size:
        raise UserError(
            f"--encoder {trunk.encoder} has positions for views of {size} px only: choose --global_size {size}"
        )
    edge = patch_grid(model.config.encoder_config, views.global_size)
    views.check_tile_size(grid.tile_size)
    judge = make_judge(judging, views, training)

    # Tiles (of slides, of shards, of a folder) to views to loss.
    cohort = load_tiles(data, grid, filters, accelerator)
    loader = view_loader(
        cohort, MultiCrop(views, training.seed, hidden_patches(numbers.mask_ratio, edge)), data, training, accelerator
    )
    config = deciding(cohort, filters, views, trunk, numbers, training, data)
    release = EncoderRelease("MAE", lambda: model.encoder, views, config, cohort, training, card, out, options)
    to_inputs = views_to_inputs(views, accelerator.device)
    TrainingLoop(model, loader, to_inputs, training, accelerator, out, config, export=release, judge=judge).run()

    # Loss to release.
    if accelerator.is_main_process:
        with atomic_directory(out / "autoencoder") as partial:
            model.save_vit_mae(partial)
    end_run(release, accelerator)


def hidden_patches(mask_ratio: float, edge: int) -> HiddenPatches:
    """Draws single patches, as many in every view of `edge` x `edge` as the model wants hidden."""
    patches = edge * edge
    share = (hidden_count(patches, mask_ratio) + 0.5) / patches  # of which `HiddenPatches` takes the whole part
    return HiddenPatches(HiddenOptions(hidden_shares=[share], hidden_spreads=[0.0], hidden_shape="random"), edge, edge)


if __name__ == "__main__":
    run_recipe(main)
