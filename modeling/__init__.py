"""What a checkpoint needs: torch, transformers and files of this folder only, so that they can travel to the Hub."""

from .modeling_ibot import IbotForPreTraining  # noqa: F401
