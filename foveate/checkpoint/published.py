"""The published model as it is published: run by transformers, with the code that its checkpoint brings along.

Nothing else in this project runs code from a checkpoint, and this only where the user has asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.checkpoint.sample import SamplePicture
from foveate.errors import CheckpointError, ConfigError

_FAILURES = (
    ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, NotImplementedError,
)  # fmt: skip
"""What foreign code, written for one version of a library and run with another, ends with."""


class PublishedModel:
    """A checkpoint's own model and picture processor (a :class:`foveate.checkpoint.verify.Runnable`).

    Args:
        folder: a published checkpoint with its code; it is executed.
        device: where it goes.
        dtype: what its weights become.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: there is no code in the folder, or it does not run with what is installed.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        if not any(folder.glob("modeling_*.py")):
            raise CheckpointError(f"{folder}: has no modeling_*.py; download the checkpoint with its code")
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError as error:
            raise ConfigError(
                f"--trust-remote-code: needs the transformers package ({error}); install it, or leave the flag out"
            ) from error
        self.folder, self.device, self.dtype = folder, device, dtype
        try:
            model: Any = AutoModel.from_pretrained(str(folder), trust_remote_code=True, torch_dtype=dtype)
            self.model: Any = model.eval().to(device)
            load_processor: Any = AutoImageProcessor.from_pretrained
            self.processor: Any = load_processor(str(folder), trust_remote_code=True)
        except _FAILURES as error:
            raise self._failed("cannot be loaded", error) from error

    def preprocess(self, picture: Image.Image) -> SamplePicture:
        """Have the checkpoint's processor cut a picture up, in our layout."""
        try:
            found = self.processor([picture], return_tensors="pt")
            slices = [np.asarray(piece, dtype=np.float32) for piece in found["pixel_values"][0]]
            sizes = tuple((int(rows), int(columns)) for rows, columns in found["tgt_sizes"][0])
        except _FAILURES as error:
            raise self._failed("does not take a picture", error) from error
        # Theirs are [3, patch, patches * patch]: all patches of a slice side by side.
        rows = []
        for piece in slices:
            channels, side, _ = piece.shape
            patches = piece.reshape(channels, side, -1, side).transpose(2, 0, 1, 3)
            rows.append(patches.reshape(len(patches), -1))
        return SamplePicture(np.concatenate(rows), sizes)

    def look(self, picture: SamplePicture) -> tuple[Tensor, Tensor]:
        """See :meth:`foveate.checkpoint.verify.Runnable.look`; a slice at a time, so that nothing is padded."""
        features, rows, start = [], [], 0
        side = round((picture.pixels.shape[1] // 3) ** 0.5)
        try:
            for size in picture.tgt_sizes:
                count = size[0] * size[1]
                patches = torch.from_numpy(picture.pixels[start : start + count]).to(self.device, self.dtype)
                pixels = patches.view(count, 3, side, side).permute(1, 2, 0, 3).reshape(1, 3, side, count * side)
                mask = torch.ones(1, 1, count, dtype=torch.bool, device=self.device)
                sizes = torch.tensor([size], dtype=torch.int32, device=self.device)
                seen = self.model.vpm(pixels, patch_attention_mask=mask, tgt_sizes=sizes).last_hidden_state
                features.append(seen[0])
                rows.append(self.model.resampler(seen, sizes)[0])
                start += count
        except _FAILURES as error:
            raise self._failed("does not encode a picture", error) from error
        return torch.cat(features), torch.cat(rows)

    def logits(self, token_ids: Sequence[int], positions: Sequence[int], rows: Tensor, last: int) -> Tensor:
        """See :meth:`foveate.checkpoint.verify.Runnable.logits`."""
        try:
            x = self.model.llm.get_input_embeddings()(torch.tensor(token_ids, device=self.device))
            if positions:
                x[torch.tensor(positions, device=self.device)] = rows.to(self.device, x.dtype)
            scores: Tensor = self.model.llm(inputs_embeds=x[None], use_cache=False).logits[0, -last:]
        except _FAILURES as error:
            raise self._failed("does not read a prompt", error) from error
        return scores.float().cpu()

    def _failed(self, what: str, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())
        return CheckpointError(
            f"{self.folder}: its own code {what} with the installed transformers ({type(error).__name__}: {reason}); "
            "install the version that the checkpoint asks for, or leave --trust-remote-code out"
        )
