"""Image-text models of transformers that answer questions, such as LlavaForConditionalGeneration, as one function.

Nothing is downloaded: the model is a folder with its processor, as `save_pretrained` writes them. transformers is an extra.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openvision3.contents import short
from openvision3.evaluate.protocol import AnsweringFunctions
from openvision3.files import sha256_of


def is_image_text(name: str) -> bool:
    """Whether it is a folder whose config.json names an architecture of transformers that generates text."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        return any(str(architecture).endswith("ForConditionalGeneration") for architecture in config.get("architectures") or ())
    return False


def load_image_text(name: str, device: str = "cpu", precision: str = "fp32") -> AnsweringFunctions:
    """Open a folder of an `AutoModelForImageTextToText` and its processor.

    A prompt goes through the processor's chat template if it has one; otherwise it follows the image token on a line of its own.

    Raises:
        ValueError: transformers is not installed, the folder lacks weights or a processor, or transformers cannot open it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers is not installed; pip install 'openvision3[transformers]'") from error
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        processor: Any = transformers.AutoProcessor.from_pretrained(name, local_files_only=True)
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} cannot be opened by transformers: {short(error)}") from error
    network, report = loaded
    if report["missing_keys"]:  # transformers would use random numbers in their place
        raise ValueError(f"{name} lacks {len(report['missing_keys'])} of the model's weights, such as {min(report['missing_keys'])}; download it again")
    words: Any = getattr(processor, "tokenizer", None)
    if words is None:
        raise ValueError(f"{name} has no text tokenizer; name a folder that holds model and processor, as save_pretrained writes them")
    words.padding_side = "left"  # so that an answer follows its prompt directly
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    network = network.to(device).eval()

    def templated(prompt: str) -> str:
        if not getattr(processor, "chat_template", None):
            return f"{processor.image_token}\n{prompt}"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)

    @torch.inference_mode()
    def answer(images: Sequence[Image.Image], prompts: Sequence[str], max_tokens: int) -> list[str]:
        # one list for each image: some processors take a flat list as several images of one text
        inputs = processor(images=[[image] for image in images], text=[templated(prompt) for prompt in prompts], padding=True, return_tensors="pt")
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": words.pad_token_id}
        ids = network.generate(**inputs.to(device, dtype), **greedy, max_length=None, max_new_tokens=max_tokens)
        return [text.strip() for text in words.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]

    return AnsweringFunctions(Path(name).resolve().name, answer, precision, _hash(Path(name)), note=f"opened by transformers {transformers.__version__}")


def _hash(folder: Path) -> str:
    """Over the folder's weights, names and contents."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        whole.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return whole.hexdigest()
