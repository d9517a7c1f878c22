"""MAE: an encoder that learns by drawing the patches it was not shown (He et al. 2021, arXiv 2111.06377)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ModelOutput

from .collapse import effective_rank, feature_std
from .configuration_mae import MaeConfig
from .mae_start import position_tables, start_as_mae
from .trunk import start_trunk, trunk_depths, trunk_weights


SHARED_FIELDS = (  # what the configurations of a vit and a vit_mae both have
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
DECODER_FIELDS = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)


@dataclass
class MaeOutput(ModelOutput):
    """`loss` to go downhill on."""

    loss: torch.Tensor | None = None


class MaeForPreTraining(PreTrainedModel):
    """transformers' `ViTMAEForPreTraining`, started as MAE starts it, with the contract of the training loop.

    Which patches are hidden comes with the views, so that it depends on the tile and not on the batch. Its `save_pretrained`
    writes the names of the published files behind the prefix `autoencoder.`; `save_vit_mae` writes them without.
    """

    config_class = MaeConfig
    base_model_prefix = "mae"
    main_input_name = "global_views"

    def __init__(self, config: MaeConfig):
        super().__init__(config)
        self.autoencoder = ViTMAEForPreTraining(vit_mae_config(config))
        self._last: dict[str, torch.Tensor] = {}  # of the last micro-batch, for the panel
        self.post_init()
        start_as_mae(self.autoencoder)

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves every module as the constructor made it."""

    @classmethod
    def from_encoder(cls, encoder: str, config: MaeConfig) -> "MaeForPreTraining":
        """A model whose encoder starts from the released `encoder`, a vit or vit_mae by Hub id or directory.

        The release's position table is kept, and stays as it is; the decoder is new. `config.encoder_config` is replaced by
        the release's. Raises ValueError when it is of another type or lacks weights.
        """
        released = AutoConfig.from_pretrained(encoder)
        if released.model_type == "vit_mae":
            released = ViTConfig(**{name: getattr(released, name) for name in SHARED_FIELDS})
        config.encoder_config = released
        model = cls(config)
        start_trunk(model.autoencoder.vit, trunk_weights(encoder))
        return model

    @property
    def encoder(self) -> ViTModel:
        """The part that outlives training: the encoder as a plain ViT, which sees all patches.

        Made when asked for; it shares its tensors with this model and is not to be trained.
        """
        with torch.device("meta"):
            encoder = ViTModel(ViTConfig.from_dict(self.config.encoder_config.to_dict()), add_pooling_layer=False)
        encoder.load_state_dict(self.autoencoder.vit.state_dict(), assign=True)
        return encoder.requires_grad_(False).eval()

    @property
    def trunks(self) -> list[PreTrainedModel]:
        """What is computed at each step."""
        return [self.autoencoder]

    def get_input_embeddings(self) -> None:
        """None: no table of embeddings is shared with an output, which is what accelerate asks before it shards."""

    @property
    def encoder_part(self) -> nn.Module:
        """The module that holds the encoder's weights."""
        return self.autoencoder.vit

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer layers of the encoder and of the decoder."""
        return [*self.autoencoder.vit.layers, *self.autoencoder.decoder.decoder_layers]

    def train(self, mode: bool = True) -> "MaeForPreTraining":
        """The position tables stay as they are; transformers forgets it of a model that it loads."""
        super().train(mode)
        for table in position_tables(self.autoencoder):
            table.requires_grad_(False)
        return self

    def suit(self, device: torch.device) -> None:
        """Chooses how to compute on `device`, which changes no result: fused attention on a GPU, explicit on a CPU."""
        attention = "sdpa" if device.type == "cuda" else "eager"
        self.autoencoder.set_attn_implementation(attention)
        # The decoder has a configuration of its own, a copy, of which transformers does not think.
        self.autoencoder.decoder.config._attn_implementation = attention

    def forward(self, global_views: torch.Tensor, hidden: torch.Tensor) -> MaeOutput:
        """The loss of one micro-batch.

        Args:
            global_views: normalised pixels (V, B, 3, H, W), of the size in the configuration.
            hidden: bool (V, B, h, w), True for the patches that the encoder does not see, as many in each view as
                `hidden_count` says.

        Raises ValueError for another number of patches or of hidden ones.
        """
        pixels = global_views.flatten(0, 1)  # (V * B, 3, H, W)
        hidden = hidden.flatten(0, 1).flatten(1)  # (V * B, patches)
        self._check_hidden(hidden)
        # The encoder keeps the patches with the least noise, in that order: here the visible ones, row after row.
        noise = hidden * hidden.shape[1] + torch.arange(hidden.shape[1], device=hidden.device)
        seen = self.autoencoder.vit(pixels, noise=noise)
        latent = seen.last_hidden_state  # (V * B, 1 + visible, D)
        predicted = self.autoencoder.decoder(latent, seen.ids_restore).logits  # (V * B, patches, values of a patch)
        with torch.autocast(pixels.device.type, enabled=False):
            loss = hidden_pixel_loss(predicted.float(), self._targets(pixels), hidden)
        self._last = {"latent": latent.detach(), "pixels": pixels, "hidden": hidden, "loss": loss.detach()}
        return MaeOutput(loss=loss)

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing follows the weights."""

    def discard_step(self) -> None:
        """Nothing is gathered."""

    def frozen_parameters(self, step: int) -> list[nn.Parameter]:
        """None: the position tables, which never move, are not trained at all."""
        return []

    def schedule_values(self, step: int, total_steps: int) -> dict[str, float]:
        """None: the method has no scheduled numbers of its own."""
        return {}

    def depths(self) -> dict[str, int]:
        """The depth of each trained parameter, for layer-wise decay of the learning rate; the decoder stands above all."""
        encoder = {f"autoencoder.vit.{name}": depth for name, depth in trunk_depths(self.autoencoder.vit).items()}
        top = max(encoder.values())
        return {name: encoder.get(name, top) for name, weight in self.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def collapse_panel(self) -> dict[str, float]:
        """Signs of collapse in the last micro-batch of this rank: of the class token, and of the mean visible patch.

        `unexplained` is the loss over that of always drawing the mean hidden patch: 1 where nothing was learned of a tile.
        """
        latent, pixels, hidden = (self._last[name] for name in ("latent", "pixels", "hidden"))
        targets = self._targets(pixels)
        mean_patch = (targets * hidden[..., None]).sum(dim=(0, 1)) / hidden.sum()  # (values of a patch,)
        class_token, mean_visible = latent[:, 0], latent[:, 1:].mean(dim=1)  # (V * B, D)
        panel = {
            "feature_std": feature_std(class_token),
            "effective_rank": effective_rank(class_token),
            "patch_feature_std": feature_std(mean_visible),
            "patch_effective_rank": effective_rank(mean_visible),
            "unexplained": self._last["loss"] / hidden_pixel_loss(mean_patch, targets, hidden),
        }
        return {name: float(value) for name, value in panel.items()}

    def save_vit_mae(self, directory: str | Path) -> None:
        """Writes encoder and decoder as a `vit_mae`, under the names of the published ones, for `ViTMAEForPreTraining`."""
        # By its own `save_pretrained` the decoder's layers would be called `decoder.decoder_encoder.layer`, which no other
        # version of transformers knows.
        weights = revert_weight_conversion(self, self.state_dict())
        weights = {name.removeprefix("autoencoder."): weight for name, weight in weights.items()}
        self.autoencoder.save_pretrained(directory, state_dict=weights, save_original_format=False)

    def _targets(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is to be drawn of each patch, (images, patches, values of a patch)."""
        patches = self.autoencoder.patchify(pixels.float())
        return standardised(patches) if self.config.norm_pix_loss else patches

    def _check_hidden(self, hidden: torch.Tensor) -> None:
        patches = self.autoencoder.vit.embeddings.patch_embeddings.num_patches
        if hidden.shape[1] != patches:
            raise ValueError(f"hidden speaks of {hidden.shape[1]} patches, but a view has {patches}")
        wanted = hidden_count(patches, self.config.mask_ratio)
        found = hidden.sum(dim=1)
        if not bool((found == wanted).all()):
            some = found[found != wanted][0]
            raise ValueError(
                f"a view has {int(some)} hidden patches, but a mask_ratio of {self.config.mask_ratio} hides {wanted} of {patches}"
            )


def vit_mae_config(config: MaeConfig) -> ViTMAEConfig:
    """transformers' configuration of encoder and decoder. Raises ValueError for what MAE cannot be made of."""
    encoder = config.encoder_config
    if encoder.model_type != "vit":
        raise ValueError(f"MAE's encoder must be able to leave patches out: a {encoder.model_type} cannot, take a vit")
    size, patch_size = encoder.image_size, encoder.patch_size
    if not isinstance(size, int) or not isinstance(patch_size, int) or size % patch_size:
        raise ValueError(f"image_size is {size}: it must be square and a multiple of patch_size, {patch_size}")
    patches = (size // patch_size) ** 2
    if not 0 < hidden_count(patches, config.mask_ratio) < patches:
        raise ValueError(f"mask_ratio is {config.mask_ratio}: of {patches} patches it must hide some and leave some")
    for name, width, heads in (
        ("hidden_size", encoder.hidden_size, encoder.num_attention_heads),
        ("decoder_hidden_size", config.decoder_hidden_size, config.decoder_num_attention_heads),
    ):
        if width % 4 or width % heads:
            raise ValueError(f"{name} is {width}: it must be a multiple of 4 and of its number of heads, {heads}")
    return ViTMAEConfig(
        **{name: getattr(encoder, name) for name in SHARED_FIELDS},
        **{name: getattr(config, name) for name in DECODER_FIELDS},
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
    )


def hidden_count(patches: int, mask_ratio: float) -> int:
    """How many of a view's `patches` are hidden: all but the whole part of the share that stays."""
    return patches - int(patches * (1 - mask_ratio))


def standardised(patches: torch.Tensor) -> torch.Tensor:
    """`patches` (..., values) less their mean, over their standard deviation, with one degree of freedom less."""
    centred = patches - patches.mean(dim=-1, keepdim=True)
    variance = centred.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)  # `var` is far slower on a CPU
    return centred / (variance + 1e-6).sqrt()


def hidden_pixel_loss(predicted: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The mean squared error of the values of all hidden patches, a scalar.

    Args:
        predicted: what broadcasts to (images, patches, values).
        targets: (images, patches, values).
        hidden: bool (images, patches).
    """
    errors = (predicted - targets).square().mean(dim=-1)  # (images, patches)
    return (errors * hidden).sum() / hidden.sum()
