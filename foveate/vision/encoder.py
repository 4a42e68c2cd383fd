"""Pixels in, embeddings out: the model part of the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.models.minicpmv import VisionTower
from foveate.vision.preprocess import Pixels


class VisionEncoder:
    """Runs encoder and resampler on slices of any number of pictures.

    Args:
        tower: the model, on its device.
        mean: subtracted from each channel of pixels scaled to 0 to 1.
        std: each channel is then divided by this.
        batch_size: slices in one step; more are encoded in several.
    """

    def __init__(self, tower: VisionTower, *, mean: Sequence[float], std: Sequence[float], batch_size: int) -> None:
        self.tower = tower
        self.batch_size = batch_size
        weight = tower.encoder.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._mean = torch.tensor(mean, device=self.device)[:, None]
        self._std = torch.tensor(std, device=self.device)[:, None]

    def normalize(self, patches: Tensor) -> Tensor:
        """uint8 [patches, 3 * patch_size**2] → the encoder's input of that shape, rounded as the reference rounds."""
        channels = patches.to(self.device).float().unflatten(1, (3, -1))
        return ((channels / 255 - self._mean) / self._std).flatten(1).to(self.dtype)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Encode pictures together.

        Returns:
            for each picture its embeddings, [slices * query_num, hidden_size] on the device
        """
        sizes = [size for pixels in pictures for size in pixels.tgt_sizes]
        patches = [torch.from_numpy(pixels.patches) for pixels in pictures]
        packed = patches[0] if len(patches) == 1 else torch.cat(patches)
        outputs = []
        start = 0
        for first in range(0, len(sizes), self.batch_size):
            chunk = sizes[first : first + self.batch_size]
            end = start + sum(rows * columns for rows, columns in chunk)
            features = self.tower.encoder(self.normalize(packed[start:end]), chunk)
            outputs.append(self.tower.resampler(features, chunk))
            start = end
        embeddings = torch.cat(outputs).flatten(0, 1)
        queries = outputs[0].shape[1]
        return list(embeddings.split([len(pixels.tgt_sizes) * queries for pixels in pictures]))
