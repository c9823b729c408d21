"""A model as a folder for transformers: `AutoModel.from_pretrained(folder, trust_remote_code=True)` opens it where openvision3 is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openvision3.export.folder import card, new_folder, write_legal
from openvision3.export.modules import write_modules
from openvision3.pipeline import Pipeline

MODULES = {
    "adapters.transformers_config": "configuration_openvision3",
    "adapters.transformers_model": "modeling_openvision3",
    "adapters.transformers_images": "image_processing_openvision3",
    "adapters.transformers_processor": "processing_openvision3",
}
CLASSES = {
    "AutoConfig": "configuration_openvision3.OpenVision3Config",
    "AutoModel": "modeling_openvision3.OpenVision3Model",
    "AutoModelForZeroShotImageClassification": "modeling_openvision3.OpenVision3Model",
}
TOWER = {"AutoConfig": "configuration_openvision3.OpenVision3VisionConfig", "AutoModel": "modeling_openvision3.OpenVision3VisionModel"}
PROCESSORS = {"AutoProcessor": "processing_openvision3.OpenVision3Processor", "AutoImageProcessor": "image_processing_openvision3.OpenVision3ImageProcessor"}

USAGE = """
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder = "THIS FOLDER"
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=["a cat", "a dog"], images=[Image.open("image.jpg")], padding=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(-1))
tokens = model.vision_model(inputs["pixel_values"]).last_hidden_state  # (1, N, D)
"""


def export(pipeline: Pipeline, out: str | Path, fit: str = "crop") -> list[str]:
    """Write encoder and text encoder with their code -> the names of the files. `fit` is how the processor makes images square, see OpenVision3ImagesKwargs.

    Raises:
        ValueError: transformers is not installed; there is something of that name; an unknown `fit`.
    """
    try:
        from openvision3.adapters.transformers import dual_encoder, processor
    except ImportError as error:
        raise ValueError(f"transformers is missing ({error}); pip install 'openvision3[transformers]'") from error
    from openvision3.adapters.transformers_images import check_fit

    check_fit(fit)
    model: Any = dual_encoder(pipeline)
    both: Any = processor(pipeline, fit)
    model.config.auto_map, model.config.vision_config.auto_map = CLASSES, TOWER
    for part in (both, both.image_processor):
        part.auto_map = PROCESSORS
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        both.save_pretrained(folder)
        both.image_processor.save_pretrained(folder)
        write_modules(MODULES, folder)
        write_legal(pipeline, folder)
        text = card(pipeline, "transformers", "OpenVision 3 encoder for transformers", USAGE)
        (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        return sorted(path.name for path in folder.iterdir())
