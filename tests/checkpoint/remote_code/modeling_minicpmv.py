"""A checkpoint's own code, as far as its interface goes: the published attributes and signatures, with our encoder."""

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel, Qwen2ForCausalLM

from foveate.checkpoint.load import load_model

from .configuration_minicpm import MiniCPMVConfig


class MiniCPMV(PreTrainedModel):
    """A language model of transformers' own, with an encoder that is loaded when it is first used."""

    config_class = MiniCPMVConfig

    def __init__(self, config):
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config)
        self.post_init()

    @property
    def tower(self):
        """Encoder and resampler, as this project loads them."""
        if "_tower" not in self.__dict__:
            folder = Path(self.config.name_or_path)
            self.__dict__["_tower"] = load_model(folder, torch.device("cpu"), torch.float32, part="vision").vision
        return self.__dict__["_tower"]

    def vpm(self, pixel_values, patch_attention_mask, tgt_sizes):
        """Encode slices, [slices, 3, patch, patches * patch]."""
        assert patch_attention_mask.dtype == torch.bool
        assert patch_attention_mask.shape == (len(tgt_sizes), 1, pixel_values.shape[-1] // 14)
        [pixels], [size] = pixel_values, tgt_sizes.tolist()
        patches = pixels.reshape(3, 14, -1, 14).permute(2, 0, 1, 3).reshape(-1, 588)
        return SimpleNamespace(last_hidden_state=self.tower.encoder(patches, [tuple(size)])[None])

    def resampler(self, features, tgt_sizes):
        """Sum up slices, [slices, patches, size]."""
        return self.tower.resampler(features[0], [tuple(size) for size in tgt_sizes.tolist()])
