"""What a checkpoint needs: torch, transformers and files of this folder only, so that they can travel to the Hub.

Importing the folder makes transformers' Auto classes know our model types.
"""

from transformers import AutoConfig, AutoModel

from .configuration_abmil import AbmilConfig
from .configuration_ibot import IbotConfig
from .modeling_abmil import AbmilForSlideClassification
from .modeling_ibot import IbotForPreTraining


for _config, _model in ((AbmilConfig, AbmilForSlideClassification), (IbotConfig, IbotForPreTraining)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)

__all__ = ["AbmilConfig", "AbmilForSlideClassification", "IbotConfig", "IbotForPreTraining"]
