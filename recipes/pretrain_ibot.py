"""iBOT pretraining from slides (Zhou et al. 2022, arXiv 2111.07832; Phikon: Filiot et al. 2023).

    accelerate launch recipes/pretrain_ibot.py --config recipes/configs/ibot_vit_small.yaml --slides DIR --out DIR

The same command goes on with a run that was interrupted. The encoder lies in OUT/encoder at the end:
`AutoModel.from_pretrained("OUT/encoder")`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import ViTConfig

from hf_pathology.errors import UserError
from hf_pathology.features.embed import check_resolution
from hf_pathology.features.encoder import load_encoder
from hf_pathology.hub_upload.cards import encoder_card
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.modeling_ibot import IbotForPreTraining
from hf_pathology.recipes.slide_data import SlideData, load_tiles
from hf_pathology.slides.tiling import GridOptions
from hf_pathology.tiles.filters import FilterOptions
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.tiles.photometric import Photometric
from hf_pathology.tiles.views import MultiCrop, ViewOptions
from hf_pathology.training.config import parse_config
from hf_pathology.training.loop import TrainingLoop, TrainingOptions
from hf_pathology.training.start import run_recipe, start


@dataclass
class ModelOptions:
    """The trunk and the head; see `IbotConfig` for what each number is. `encoder` starts from a release instead."""

    encoder: str | None = None
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    patch_size: int = 16
    initializer_range: float = 0.02
    out_dim: int = 8192
    patch_out_dim: int | None = None
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
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


def main(argv: Sequence[str] | None = None) -> None:
    data, grid, filters, views, numbers, training = parse_config(
        SlideData, GridOptions, FilterOptions, ViewOptions, ModelOptions, TrainingOptions, argv=argv
    )
    accelerator = start(cpu=training.cpu, seed=training.seed)
    out = Path(data.out)

    # Slides (or shards) to tiles to views.
    cohort = load_tiles(data, grid, filters, accelerator)
    if numbers.encoder is not None:
        views = views_for_release(views, numbers.encoder, grid.mpp)
    model = build_model(numbers, views.global_size)
    loader = TileLoader(
        cohort.source,
        MultiCrop(views, model.config.encoder_config.patch_size, training.seed),
        batch_size=training.batch_size,
        window=data.window,
        seed=training.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=data.workers,
    )
    colours = Photometric(views.mean, views.std).to(accelerator.device)

    def to_inputs(batch: dict) -> dict[str, torch.Tensor]:
        moved = {
            name: value.to(accelerator.device) for name, value in batch.items() if isinstance(value, torch.Tensor)
        }
        return {
            "global_views": colours(moved["global_views"], moved["global_colours"]),
            "hidden": moved["hidden"].transpose(0, 1),
            "local_views": colours(moved["local_views"], moved["local_colours"]) if views.local_views else None,
        }

    # Views to loss.
    config = {
        **cohort.options,
        **asdict(filters),
        **asdict(views),
        **asdict(numbers),
        **training.deciding(),
        **data.deciding(),
    }
    config["tiles"] = cohort.fingerprint
    trained = TrainingLoop(model, loader, to_inputs, training, accelerator, out, config).run()

    # Loss to release.
    if accelerator.is_main_process:
        card = encoder_card(method="iBOT", config=config, log=out / "log.jsonl", cohort=cohort, training=training)
        export_encoder(
            trained.encoder,
            out / "encoder",
            tile_size=views.global_size,
            mpp=grid.mpp,
            mean=views.mean,
            std=views.std,
            card=card,
        )
        accelerator.print(f"encoder: {out / 'encoder'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if cohort.problems:
        raise UserError(
            f"{len(cohort.problems)} slides were left out, see above; the encoder was trained on the others"
        )


def build_model(numbers: ModelOptions, image_size: int) -> IbotForPreTraining:
    """The untrained method, the same on every rank; or one whose trunks start from the release `numbers.encoder`."""
    if image_size < 1 or image_size % numbers.patch_size:
        raise UserError(f"global_size is {image_size}: it must be a multiple of patch_size, {numbers.patch_size}")
    if numbers.hidden_size % numbers.num_attention_heads:
        raise UserError(
            f"hidden_size is {numbers.hidden_size}: it must be a multiple of num_attention_heads, "
            f"{numbers.num_attention_heads}"
        )
    trunk = ViTConfig(
        hidden_size=numbers.hidden_size,
        num_hidden_layers=numbers.num_hidden_layers,
        num_attention_heads=numbers.num_attention_heads,
        intermediate_size=4 * numbers.hidden_size,
        patch_size=numbers.patch_size,
        image_size=image_size,
        initializer_range=numbers.initializer_range,
        layer_norm_eps=1e-6,
    )
    own = {"encoder", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "initializer_range"}
    config = IbotConfig(trunk, **{name: value for name, value in asdict(numbers).items() if name not in own})
    if numbers.encoder is None:
        return IbotForPreTraining(config)
    try:
        return IbotForPreTraining.from_encoder(numbers.encoder, config)
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder {numbers.encoder}: {error}") from error


def views_for_release(views: ViewOptions, encoder: str, mpp: float) -> ViewOptions:
    """The views with the mean and standard deviation of the release that training starts from.

    Raises UserError when the release was made for tiles of another resolution or size.
    """
    release = load_encoder(encoder)
    check_resolution(release, mpp)
    if release.size != views.global_size:
        raise UserError(f"--encoder {encoder} takes views of {release.size} px: choose --global_size {release.size}")
    return replace(views, mean=list(release.mean), std=list(release.std))


if __name__ == "__main__":
    run_recipe(main)
