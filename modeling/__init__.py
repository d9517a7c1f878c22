"""What a checkpoint needs: torch, transformers and files of this folder only, so that they can travel to the Hub.

Importing the folder makes transformers' Auto classes know our model types.
"""

from transformers import AutoConfig, AutoModel

from .configuration_abmil import AbmilConfig
from .configuration_deep_attn_misl import DeepAttnMislConfig
from .configuration_deep_graph_conv import DeepGraphConvConfig
from .configuration_dino import DinoConfig
from .configuration_dinov2 import Dinov2PreTrainingConfig
from .configuration_dsmil import DsmilConfig
from .configuration_hipt import HiptConfig, HiptRegionConfig
from .configuration_hipt_slide import HiptSlideConfig
from .configuration_ibot import IbotConfig
from .configuration_mae import MaeConfig
from .configuration_slpd import SlpdConfig
from .modeling_abmil import AbmilForSlideClassification
from .modeling_deep_attn_misl import DeepAttnMislForSlideClassification
from .modeling_deep_graph_conv import DeepGraphConvForSlideClassification
from .modeling_dino import DinoForPreTraining
from .modeling_dinov2 import Dinov2ForPreTraining
from .modeling_dsmil import DsmilForSlideClassification
from .modeling_hipt import HiptModel, HiptRegionModel
from .modeling_hipt_slide import HiptForSlideClassification
from .modeling_ibot import IbotForPreTraining
from .modeling_mae import MaeForPreTraining
from .modeling_slpd import SlpdForPreTraining


for _config, _model in (
    (AbmilConfig, AbmilForSlideClassification),
    (DeepAttnMislConfig, DeepAttnMislForSlideClassification),
    (DeepGraphConvConfig, DeepGraphConvForSlideClassification),
    (DinoConfig, DinoForPreTraining),
    (Dinov2PreTrainingConfig, Dinov2ForPreTraining),
    (DsmilConfig, DsmilForSlideClassification),
    (HiptConfig, HiptModel),
    (HiptRegionConfig, HiptRegionModel),
    (HiptSlideConfig, HiptForSlideClassification),
    (IbotConfig, IbotForPreTraining),
    (MaeConfig, MaeForPreTraining),
    (SlpdConfig, SlpdForPreTraining),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)

# Whoever saves or pushes one of these brings its code along, so that it loads where this package is not installed.
for _config, _model in (
    (AbmilConfig, AbmilForSlideClassification),
    (DeepAttnMislConfig, DeepAttnMislForSlideClassification),
    (DeepGraphConvConfig, DeepGraphConvForSlideClassification),
    (DsmilConfig, DsmilForSlideClassification),
    (HiptConfig, HiptModel),
    (HiptRegionConfig, HiptRegionModel),
    (HiptSlideConfig, HiptForSlideClassification),
):
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")

__all__ = [
    "AbmilConfig",
    "AbmilForSlideClassification",
    "DeepAttnMislConfig",
    "DeepAttnMislForSlideClassification",
    "DeepGraphConvConfig",
    "DeepGraphConvForSlideClassification",
    "DinoConfig",
    "DinoForPreTraining",
    "Dinov2ForPreTraining",
    "Dinov2PreTrainingConfig",
    "DsmilConfig",
    "DsmilForSlideClassification",
    "HiptConfig",
    "HiptForSlideClassification",
    "HiptModel",
    "HiptRegionConfig",
    "HiptRegionModel",
    "HiptSlideConfig",
    "IbotConfig",
    "IbotForPreTraining",
    "MaeConfig",
    "MaeForPreTraining",
    "SlpdConfig",
    "SlpdForPreTraining",
]
