"""A chat model of seconds for tests: a random language model in a folder, conversations about one-coloured images, and a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_generator import tokens_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from openvision3.train.optimizer import OptimizerConfig
from openvision3.understand.config import LlavaConfig

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "What colour is this?"


def language_folder(root: Path, *, template: str | None = CHATML, width: int = 32, seed: int = 0, spare: int = 0, tied: bool = True) -> str:
    """The folder of a random Llama of two layers with a byte-level tokenizer. `spare` rows of its word embedding have no word."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = root / f"language-{bool(template)}-{width}-{seed}-{spare}-{tied}"
    if folder.is_dir():
        return str(folder)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        [QUESTION, *COLOURS, "Is it user assistant"] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>" if template else "<|endoftext|>", pad_token="<|endoftext|>")
    if template:
        tokenizer.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def row(number: int, image: str | list[str] | None, *turns: str) -> dict[str, Any]:
    """One entry of LLaVA's JSON; the turns are of human and gpt in turn."""
    entry: dict[str, Any] = {"id": str(number)}
    if image is not None:
        entry["image"] = image
    return entry | {"conversations": [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]}


def conversations(root: Path, name: str, count: int = 8) -> str:
    """A JSON file about `count` one-coloured images beside it: one question or two each, every fourth without an image and every fifth with two."""
    folder = root / name
    (folder / "img").mkdir(parents=True, exist_ok=True)
    names, rows = list(COLOURS), []
    for i in range(count):
        colour = names[i % len(names)]
        Image.new("RGB", (40, 30 + i), COLOURS[colour]).save(folder / "img" / f"{i}.png")
        turns = [f"<image>\n{QUESTION}", colour]
        if i % 3 == 1:
            turns += ["Is it red?", "yes" if colour == "red" else "no"]
        rows.append(row(i, f"img/{i}.png", *turns))
    rows[3] = row(3, None, "Is red a colour?", "yes")
    rows[min(5, count - 1)] = row(5, ["img/0.png", "img/1.png"], "<image>\n<image>\nAre these the same?", "no")
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return str(path)


def small_chat(root: Path, out: str, **changes: Any) -> LlavaConfig:
    """6 steps of 4 conversations in fp32: the projector, images of 64 px."""
    settings: dict[str, Any] = {
        "tower": tokens_folder(root),
        "language": language_folder(root),
        "data": (conversations(root, "train"),),
        "val": (conversations(root, "held", 5),),
        "size": 32,
        "length": 96,
        "batch": 4,
        "steps": 6,
        "precision": "fp32",
        "device": "cpu",
        "out": str(root / out),
        "log_every": 2,
        "save_every": 3,
        "eval_every": 3,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0),
    }
    return LlavaConfig(**(settings | changes))
