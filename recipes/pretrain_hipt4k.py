"""The second level of HIPT: DINO on grids of tile features (Chen et al. 2022, arXiv 2206.02647).

    hf-pathology embed SLIDES --encoder OUT/encoder --regions 4096 --out FEATURES
    accelerate launch recipes/pretrain_hipt4k.py --config recipes/configs/hipt4k_xs.yaml --features FEATURES --out DIR

The same command goes on with a run that was interrupted. Both levels lie in OUT/encoder at the end:
`AutoModel.from_pretrained("OUT/encoder", trust_remote_code=True)`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hf_pathology.features.grid_crops import GridCropOptions, GridCrops
from hf_pathology.hub_upload.cards.card import CardOptions
from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.modeling_dino import DinoForPreTraining
from hf_pathology.recipes.encoder_release import end_run
from hf_pathology.recipes.hipt_release import HiptRelease, TileEncoderOptions, find_tile_encoder
from hf_pathology.recipes.inputs import view_loader
from hf_pathology.recipes.pretrain_dino import DinoOptions
from hf_pathology.recipes.region_data import RegionData, crops_to_inputs, load_regions
from hf_pathology.recipes.trunk import RegionTrunkOptions, make_method, new_region_trunk
from hf_pathology.training.config import deciding, parse_config
from hf_pathology.training.loop import TrainingLoop
from hf_pathology.training.options import TrainingOptions
from hf_pathology.training.start import run_recipe, start


OPTIONS = (
    RegionData,
    GridCropOptions,
    RegionTrunkOptions,
    TileEncoderOptions,
    DinoOptions,
    TrainingOptions,
    CardOptions,
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_config(*OPTIONS, argv=argv)
    data, crops, trunk, tiles, numbers, training, card = options
    accelerator = start(cpu=training.cpu, seed=training.seed)

    # Regions to views to loss.
    cohort = load_regions(data, accelerator)
    regions = cohort.source
    crops.check_grid(regions.kind.grid)
    tile_encoder = find_tile_encoder(tiles, regions)
    model = make_method(
        DinoForPreTraining,
        lambda config: DinoConfig(config, **asdict(numbers)),
        trunk,
        lambda: new_region_trunk(trunk, regions.kind.width, crops.global_size),
        accelerator,
    )
    loader = view_loader(cohort, GridCrops(crops, training.seed), data, training, accelerator)
    config = deciding(cohort, crops, trunk, numbers, training, data)
    release = HiptRelease(
        "HIPT-4K", lambda: model.encoder, tile_encoder, config, cohort, training, card, Path(data.out), options
    )
    to_inputs = crops_to_inputs(accelerator.device)
    TrainingLoop(model, loader, to_inputs, training, accelerator, release.out, config, export=release).run()

    # Loss to release.
    end_run(release, accelerator)


if __name__ == "__main__":
    run_recipe(main)
