"""SLPD: the second level of the hierarchy with prototypes of slides (Yu et al. 2023, arXiv 2307.08259).

    hf-pathology embed SLIDES --encoder OUT/encoder --regions 4096 --out FEATURES
    accelerate launch recipes/pretrain_slpd.py --config recipes/configs/slpd_nsclc.yaml --features FEATURES --out DIR

The same command goes on with a run that was interrupted, with its clusters. Both levels lie in OUT/encoder at the end:
`AutoModel.from_pretrained("OUT/encoder", trust_remote_code=True)`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_pathology.features.grid_crops import GridCropOptions, GridCrops
from hf_pathology.hub_upload.cards.card import CardOptions
from hf_pathology.modeling.configuration_slpd import SlpdConfig
from hf_pathology.modeling.modeling_slpd import SlpdForPreTraining
from hf_pathology.recipes.encoder_release import end_run
from hf_pathology.recipes.hipt_release import HiptRelease, TileEncoderOptions, find_tile_encoder
from hf_pathology.recipes.inputs import view_loader
from hf_pathology.recipes.pretrain_dino import DinoOptions
from hf_pathology.recipes.region_data import RegionData, crops_to_inputs, load_regions
from hf_pathology.recipes.slide_prototypes import ClusterOptions, SlidePrototypes
from hf_pathology.recipes.trunk import RegionTrunkOptions, make_method, new_region_trunk
from hf_pathology.training.config import deciding, parse_config
from hf_pathology.training.loop import TrainingLoop
from hf_pathology.training.options import TrainingOptions
from hf_pathology.training.start import run_recipe, start


@dataclass
class SlpdOptions:
    """The losses towards the prototypes; see `SlpdConfig` for what each number is."""

    own_weight: float = 1.0
    neighbour_weight: float = 1.0
    original_artefacts: bool = False


OPTIONS = (
    RegionData,
    GridCropOptions,
    RegionTrunkOptions,
    TileEncoderOptions,
    DinoOptions,
    SlpdOptions,
    ClusterOptions,
    TrainingOptions,
    CardOptions,
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_config(*OPTIONS, argv=argv)
    data, crops, trunk, tiles, numbers, weights, clusters, training, card = options
    accelerator = start(cpu=training.cpu, seed=training.seed)

    # Regions to views to loss.
    cohort = load_regions(data, accelerator)
    regions = cohort.source
    crops.check_grid(regions.kind.grid)
    clusters.check_regions(regions)
    tile_encoder = find_tile_encoder(tiles, regions)
    model = make_method(
        SlpdForPreTraining,
        lambda config: SlpdConfig(
            config,
            num_regions=len(regions),
            num_slides=len(regions.slides),
            num_clusters=clusters.num_clusters,
            num_neighbours=clusters.num_neighbours,
            **asdict(numbers),
            **asdict(weights),
        ),
        trunk,
        lambda: new_region_trunk(trunk, regions.kind.width, crops.global_size),
        accelerator,
    )
    loader = view_loader(cohort, GridCrops(crops, training.seed), data, training, accelerator)
    config = deciding(cohort, crops, trunk, numbers, weights, clusters, training, data)
    release = HiptRelease(
        "SLPD", lambda: model.encoder, tile_encoder, config, cohort, training, card, Path(data.out), options
    )
    prototypes = SlidePrototypes(
        model,
        regions,
        clusters,
        crop=crops.global_size,
        epoch=max(1, len(regions) // (training.batch_size * training.accumulation * accelerator.num_processes)),
        seed=training.seed,
        accelerator=accelerator,
    )
    to_inputs = crops_to_inputs(accelerator.device, regions)
    loop = TrainingLoop(
        model, loader, to_inputs, training, accelerator, release.out, config, export=release, before_step=prototypes
    )
    loop.run()

    # Loss to release.
    end_run(release, accelerator)


if __name__ == "__main__":
    run_recipe(main)
