"""Writes an encoder as a directory that plain transformers loads anywhere, with all that is needed to use it rightly."""

from pathlib import Path

import torch
from torch import nn
from transformers import ViTImageProcessor, ViTModel

from hf_pathology.atomic import atomic_directory


IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def release_model(encoder: ViTModel) -> ViTModel:
    """A copy of `encoder` as it is released: no mask token, and a pooler that hands on the class token unchanged.

    `AutoModel` builds a pooler for every ViT; a checkpoint without one would get random weights and a warning.
    """
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    config.pooler_act, config.pooler_output_size = "linear", config.hidden_size
    model = ViTModel(config)
    weights = {key: value for key, value in encoder.state_dict().items() if key != "embeddings.mask_token"}
    weights["pooler.dense.weight"] = torch.eye(config.hidden_size)
    weights["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    model.load_state_dict(weights)
    return model.eval()


def release_processor(
    *, tile_size: int, mpp: float | None, mean: list[float], std: list[float], pooling: str = "cls"
) -> ViTImageProcessor:
    """The image processor of a release: statistics, and as further keys of its JSON `mpp`, `tile_size` and `pooling`."""
    return ViTImageProcessor(
        do_resize=True,
        size={"height": tile_size, "width": tile_size},
        resample=3,  # bicubic
        do_rescale=True,
        do_normalize=True,
        image_mean=mean,
        image_std=std,
        mpp=mpp,
        tile_size=tile_size,
        pooling=pooling,
    )


def export_encoder(
    encoder: ViTModel,
    directory: str | Path,
    *,
    tile_size: int,
    mpp: float | None,
    mean: list[float] = IMAGENET_MEAN,
    std: list[float] = IMAGENET_STD,
    card: str | None = None,
) -> Path:
    """Writes `encoder` with its image processor, and the text of its model card, to `directory`; returns it.

    Raises ValueError when the weights are not all finite, and RuntimeError when what was written does not load whole.
    """
    broken = [name for name, weight in encoder.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"the encoder has weights that are not finite: {', '.join(broken[:5])}")
    with atomic_directory(directory) as partial:
        release_model(encoder).save_pretrained(partial)
        release_processor(tile_size=tile_size, mpp=mpp, mean=mean, std=std).save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        check_release(partial, encoder)
    return Path(directory)


@torch.no_grad()
def check_release(directory: Path, encoder: nn.Module) -> None:
    """Loads `directory` again and compares it with `encoder` on a random image; raises RuntimeError on any difference."""
    model, loading = ViTModel.from_pretrained(directory, output_loading_info=True)
    leftover = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if leftover:
        raise RuntimeError(f"{directory} does not load whole: {', '.join(sorted(leftover)[:5])}")
    size = model.config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    copy = ViTModel(model.config, add_pooling_layer=False).eval()
    copy.load_state_dict({k: v.cpu() for k, v in encoder.state_dict().items() if k != "embeddings.mask_token"})
    if not torch.equal(model.eval()(pixels).pooler_output, copy(pixels).last_hidden_state[:, 0]):
        raise RuntimeError(f"{directory} does not give the encoder's features again")
