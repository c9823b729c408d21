"""A causal language model of random weights with a tokenizer of whole words and a chat template, as a folder that transformers reads."""

from dataclasses import fields
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
WORDS = "user assistant system what is this a cat dog apple red green yes no describe it there of the in image ? . how many one two"


def tiny_language(folder: Path, seed: int = 0, width: int = 32, family: str = "llama", **settings) -> Path:
    """Write it into `folder`. `family` is a model type of transformers, which gets those of our settings that its config has."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    words = Tokenizer(WordLevel({word: number for number, word in enumerate([*special, *WORDS.split()])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(special)
    named = {"pad_token": "<pad>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **named)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    default = AutoConfig.for_model(family)
    known = {*(field.name for field in fields(default)), *default.attribute_map}
    config = AutoConfig.for_model(family, **({name: value for name, value in sizes.items() if name in known} | settings))
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
