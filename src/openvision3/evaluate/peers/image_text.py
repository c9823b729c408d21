"""Image-text models of transformers that answer questions, such as LlavaForConditionalGeneration, as one function.

Nothing is downloaded: the model is a folder with its processor, as `save_pretrained` writes them. transformers is an extra.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from openvision3.evaluate.protocol import AnsweringFunctions
from openvision3.files import sha256_of
from openvision3.networks.text_models import decode_greedily, in_template, library, open_image_text, opening


def is_image_text(name: str) -> bool:
    """Whether it is a folder whose config.json names an architecture of transformers that generates text."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        return any(str(architecture).endswith("ForConditionalGeneration") for architecture in config.get("architectures") or ())
    return False


def load_image_text(name: str, device: str = "cpu", precision: str = "fp32") -> AnsweringFunctions:
    """Open a folder of an `AutoModelForImageTextToText` and its processor, also of a LLaVA with our tower in it.

    A prompt goes through the processor's chat template if it has one; otherwise it follows the image token on a line of its own.

    Raises:
        ValueError: transformers is not installed, the folder lacks weights or a processor, or transformers cannot open it.
    """
    with opening(name, "image-to-text model"):
        from openvision3.adapters.transformers import register

        register()
    network, processor = open_image_text(name, torch.bfloat16 if precision == "bf16" else torch.float32, local_files_only=True)
    network, words = network.to(device), processor.tokenizer
    decode_greedily(network, words)

    @torch.inference_mode()
    def answer(images: Sequence[Image.Image], prompts: Sequence[str], max_tokens: int) -> list[str]:
        # one list for each image: some processors take a flat list as several images of one text
        texts = [in_template(processor, prompt, f"{processor.image_token}\n{prompt}") for prompt in prompts]
        inputs = processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt")
        ids = network.generate(**inputs.to(device, dtype=network.dtype), max_new_tokens=max_tokens)
        return [text.strip() for text in words.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]

    return AnsweringFunctions(Path(name).resolve().name, answer, precision, _hash(Path(name)), note=f"opened by transformers {library().__version__}")


def _hash(folder: Path) -> str:
    """Over the folder's weights, names and contents."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        whole.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return whole.hexdigest()
