"""A checkpoint's own code, as far as its interface goes: its configuration."""

from transformers import Qwen2Config


class MiniCPMVConfig(Qwen2Config):
    """The whole model's."""

    model_type = "minicpmv"
