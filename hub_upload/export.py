"""Writes an encoder as a directory that plain transformers loads anywhere, with all that is needed to use it rightly."""

import json
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModel, BaseImageProcessor, PreTrainedModel, ViTImageProcessor

from hf_pathology.atomic import atomic_directory, write_json
from hf_pathology.hub_upload import fingerprint
from hf_pathology.hub_upload.cards.card import write_card


IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def release_model(encoder: PreTrainedModel) -> PreTrainedModel:
    """A copy of `encoder` as `AutoModel` will build it: what is only of use in training is left out.

    `AutoModel` builds a pooler for every ViT; a checkpoint without one would get random weights and a warning. So a ViT
    gets one that hands on the class token unchanged. A mask token that a type always has is released as zeros.
    """
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    if config.model_type == "vit":
        config.pooler_act, config.pooler_output_size = "linear", config.hidden_size
    if hasattr(config, "use_mask_token"):
        config.use_mask_token = False
    model = AutoModel.from_config(config)
    weights = trunk_weights(encoder)
    for name, built in model.state_dict().items():
        if name == "pooler.dense.weight":
            weights[name] = torch.eye(config.hidden_size)
        elif name in ("pooler.dense.bias", "embeddings.mask_token"):
            weights[name] = torch.zeros_like(built)
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


def write_release(
    model: PreTrainedModel, processor: BaseImageProcessor, folder: Path, card: str | None = None
) -> None:
    """Writes model, image processor, the text of a card and the fingerprint into the existing `folder`.

    transformers leaves out of the processor what is None; a resolution that is not known is stated all the same.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    write_json(file, {"mpp": None, **json.loads(file.read_text(encoding="utf-8"))})
    if card is not None:
        write_card(folder, card)
    if (folder / "config.json").is_file():  # an adapter has none: what it gives is its base model's doing too
        write_fingerprint(folder)


def write_fingerprint(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Writes the fingerprint of the release in `folder`, which is loaded for it, as `fingerprint.json`.

    Raises ValueError when it does not load whole, or its weights are not all finite.
    """
    write_json(folder / fingerprint.NAME, fingerprint.fingerprint_of(folder, trust_remote_code=trust_remote_code))


def export_encoder(
    encoder: PreTrainedModel,
    directory: str | Path,
    *,
    tile_size: int,
    mpp: float | None,
    mean: list[float] = IMAGENET_MEAN,
    std: list[float] = IMAGENET_STD,
    pooling: str = "cls",
    card: str | None = None,
) -> Path:
    """Writes `encoder` with its image processor, and the text of its model card, to `directory`; returns it.

    Raises ValueError when the weights are not all finite, and RuntimeError when what was written does not load whole.
    """
    broken = [name for name, weight in encoder.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"the encoder has weights that are not finite: {', '.join(broken[:5])}")
    processor = release_processor(tile_size=tile_size, mpp=mpp, mean=mean, std=std, pooling=pooling)
    with atomic_directory(directory) as partial:
        write_release(release_model(encoder), processor, partial, card)
        check_release(partial, encoder)
    return Path(directory)


@torch.no_grad()
def check_release(directory: Path, encoder: PreTrainedModel) -> None:
    """Loads `directory` again and compares it with `encoder` on a random image; raises RuntimeError on any difference."""
    model, loading = AutoModel.from_pretrained(directory, output_loading_info=True)
    leftover = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if leftover:
        raise RuntimeError(f"{directory} does not load whole: {', '.join(sorted(leftover)[:5])}")
    size = getattr(model.config, "image_size", 224)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    original = deepcopy(encoder).cpu().eval()
    original.set_attn_implementation(model.config._attn_implementation)
    if not torch.equal(model.eval()(pixels).last_hidden_state, original(pixels).last_hidden_state):
        raise RuntimeError(f"{directory} does not give the encoder's features again")
    if model.config.model_type == "vit" and not torch.equal(
        model(pixels).pooler_output, original(pixels).last_hidden_state[:, 0]
    ):
        raise RuntimeError(f"{directory} has a pooler that changes the class token")


def trunk_weights(encoder: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of `encoder` on the CPU, without its mask token and the weights of a pooler."""
    left_out = ("embeddings.mask_token", "pooler.")
    return {name: weight.cpu() for name, weight in encoder.state_dict().items() if not name.startswith(left_out)}
