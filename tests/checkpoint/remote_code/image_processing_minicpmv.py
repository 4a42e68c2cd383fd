"""A checkpoint's own code, as far as its interface goes: how it takes pictures and what it returns."""

import numpy as np
import torch
from transformers import BaseImageProcessor
from transformers.image_processing_utils import BatchFeature

from foveate.media.slicing import plan_slices
from foveate.vision.preprocess import cut


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Cuts pictures up and leaves the patches of a slice side by side, [3, patch, patches * patch]."""

    def preprocess(self, images, return_tensors=None):
        """Take one conversation's pictures."""
        pixels, sizes = [], []
        for picture in images:
            plan = plan_slices(*picture.size)
            for piece in cut(picture, plan):
                values = (np.asarray(piece, dtype=np.float32).transpose(2, 0, 1) / 255 - 0.5) / 0.5
                _, height, width = values.shape
                patches = values.reshape(3, height // 14, 14, width // 14, 14).transpose(0, 2, 1, 3, 4)
                pixels.append(torch.from_numpy(patches.reshape(3, 14, -1).astype(np.float32)))
            sizes += plan.tgt_sizes
        return BatchFeature({"pixel_values": [pixels], "tgt_sizes": [torch.tensor(sizes)]})
