"""Tiny random picture-to-text models of true architectures with their processors, saved as transformers saves them; no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

MARKS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = "a the red green blue cat dog tree house with and on under big small bird . , picture of Describe this USER ASSISTANT :".split()
TEMPLATE = (
    "{% for message in messages %}USER : {% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT :{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate((*MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, padding_side="right", **named)


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=32)


def _text() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(MARKS) + len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def llava(folder: Path, seed: int = 0, template: bool = True) -> str:
    """LLaVA: every picture becomes the same number of tokens."""
    config = LlavaConfig(vision_config=_vision(), text_config=_text(), image_token_index=4, vision_feature_layer=-1)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures,
        _tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE if template else None,
    )
    return _save(LlavaForConditionalGeneration(_seeded(config, seed)), processor, folder, seed)


def llava_next(folder: Path, seed: int = 0) -> str:
    """LLaVA-NeXT: the number of tokens depends on the picture's shape, so that prompts in a batch are of unlike lengths."""
    grid = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(vision_config=_vision(), text_config=_text(), image_token_index=4, vision_feature_layer=-1, image_grid_pinpoints=grid)
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = LlavaNextProcessor(
        pictures, _tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE
    )
    return _save(LlavaNextForConditionalGeneration(_seeded(config, seed)), processor, folder, seed)


def _seeded(config, seed: int):
    torch.manual_seed(seed)
    return config


def _save(model, processor, folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform logits, so that unlike pictures get unlike captions
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
