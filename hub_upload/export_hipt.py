"""Writes a hierarchy of tile encoder and region encoder as a release that loads where this package is not installed."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModel, ViTImageProcessor

from hf_pathology.atomic import atomic_directory
from hf_pathology.hub_upload.cards.card import write_card
from hf_pathology.hub_upload.export import release_model, release_processor, write_fingerprint, write_release
from hf_pathology.modeling.configuration_hipt import HiptConfig, HiptRegionConfig
from hf_pathology.modeling.modeling_hipt import HiptModel, HiptRegionModel


def export_hipt(
    model: HiptModel,
    directory: str | Path,
    *,
    region: int,
    mpp: float | None,
    mean: list[float],
    std: list[float],
    card: str | None = None,
) -> Path:
    """Writes `model` with its code, its image processor and the text of its card to `directory`; returns it.

    Args:
        region: tiles along an edge of the regions that it was trained on.
        mpp: microns per pixel of the tiles.
        mean, std: of the channels, for pixels between 0 and 1.

    Raises ValueError when the weights are not all finite, and RuntimeError when what was written does not load whole.
    """
    broken = [name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"the encoder has weights that are not finite: {', '.join(broken[:5])}")
    with atomic_directory(directory) as partial:
        write_release(plain_hipt(model), hipt_processor(model.config.tile_size, region, mpp, mean, std), partial, card)
        check_hipt_release(partial, model)
    return Path(directory)


def export_region_encoder(model: HiptRegionModel, directory: str | Path, card: str | None = None) -> Path:
    """Writes the second level alone, for features of tiles (B, D, h, w), with its code; returns `directory`."""
    with atomic_directory(directory) as partial:
        copy = HiptRegionModel(HiptRegionConfig.from_dict(model.config.to_dict()))
        copy.load_state_dict({name: weight.cpu() for name, weight in model.state_dict().items()})
        copy.save_pretrained(partial)
        if card is not None:
            write_card(partial, card)
        write_fingerprint(partial)
    return Path(directory)


def plain_hipt(model: HiptModel) -> HiptModel:
    """A copy of `model` on the CPU, in eval mode, whose configuration has nothing of training."""
    config = HiptConfig.from_dict(model.config.to_dict())
    config.tile_config = release_model(model.tile_encoder).config
    config.tile_config.name_or_path = config.region_config.name_or_path = (
        ""  # transformers would publish where they lay
    )
    copy = HiptModel(config)
    copy.load_state_dict({name: weight.cpu() for name, weight in model.state_dict().items()})
    return copy.eval()


def hipt_processor(
    tile_size: int, region: int, mpp: float | None, mean: list[float], std: list[float]
) -> ViTImageProcessor:
    """The image processor of a release: regions are normalised, and not resized."""
    processor = release_processor(tile_size=tile_size, mpp=mpp, mean=mean, std=std)
    processor.do_resize = False
    processor.size = {"height": tile_size * region, "width": tile_size * region}
    processor.region = region
    return processor


@torch.no_grad()
def check_hipt_release(directory: Path, model: HiptModel) -> None:
    """Loads `directory` again and compares it with `model` on a small region; raises RuntimeError on any difference."""
    loaded, loading = AutoModel.from_pretrained(directory, output_loading_info=True)
    leftover = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if leftover:
        raise RuntimeError(f"{directory} does not load whole: {', '.join(sorted(leftover)[:5])}")
    size = model.config.tile_size
    pixels = torch.randn(1, 3, size, 2 * size, generator=torch.Generator().manual_seed(0))
    original = deepcopy(model).cpu().eval()
    original.set_attn_implementation(loaded.config._attn_implementation)
    if not torch.equal(loaded.eval()(pixels).last_hidden_state, original(pixels).last_hidden_state):
        raise RuntimeError(f"{directory} does not give the encoder's features again")
