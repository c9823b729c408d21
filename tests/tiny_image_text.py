"""Tiny random models of true architectures that turn images and words into words, built offline and saved as a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


WORDS = (
    "a the of on in with two three red green blue black white yellow small large round old wooden bright cat dog bird horse apple tree house boat "
    "street table cup sky water flower child man woman hat ball sits stands lies runs holds looks near under over behind beside and"
)


def word_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A word piece for each of a few words, and the special ones."""
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=list(special),
        model_max_length=4096,
    )


def save_idefics3(folder: Path, seed: int = 0) -> Path:
    """With a chat template, and with more image tokens for larger images: batches of unlike ones are padded."""
    words = word_tokenizer(
        "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2, 3, 4) for c in (1, 2, 3, 4))
    )
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = Idefics3Config(vision_config=vision, text_config=text, scale_factor=2, image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=0)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True)
    processor = Idefics3Processor(images, words, image_seq_len=4, chat_template=TEMPLATE)
    return _save(folder, Idefics3ForConditionalGeneration, config, processor, seed)


def save_llava(folder: Path, seed: int = 0) -> Path:
    """Without a chat template: the prompt names the image."""
    words = word_tokenizer("<image>")
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"))
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(images, words, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return _save(folder, LlavaForConditionalGeneration, config, processor, seed)


def _save(folder: Path, kind: type, config, processor, seed: int) -> Path:
    """Random weights, wide enough that the image matters, and the special pieces are never said but for the end."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 if "lm_head" in name else 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
