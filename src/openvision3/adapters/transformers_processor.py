"""The transformers processor: image processor and tokenizer in one object."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class OpenVision3Processor(ProcessorMixin):
    """`processor(text=..., images=...)` -> input_ids, attention_mask and pixel_values. Texts are padded to the longest and cut at the model's length."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)
