"""The run of a chat model: its language model and projector on the meta device behind the frozen parts that see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvision3.estimate.counts import Cost, count
from openvision3.estimate.planned import PlannedRun
from openvision3.estimate.units import FP32
from openvision3.networks.text_models import library
from openvision3.understand.config import LlavaConfig
from openvision3.understand.conversations import Conversations
from openvision3.understand.language import find_language
from openvision3.understand.llava import add_lora
from openvision3.understand.tiles import ImageLayout

_LLAMA = {"lmsys/vicuna-7b-v1.5": (4096, 11008, 32, 32, 32, 32_000), "lmsys/vicuna-13b-v1.5": (5120, 13824, 40, 40, 40, 32_000)}
PUBLISHED = {"smollm2": (576, 1536, 30, 9, 3, 49_152), **_LLAMA}
"""width, width of the MLP, layers, heads, heads of keys and values, words: from the published configs, so that no language model need be here"""

TEXT, CAPTION = 256, 16
"""tokens of text of a conversation, half of them answers, and of a caption alone (template plain), where neither data nor options tell"""
LETTERS = 4
"""of English text in a token, about"""
OPENING, TURN = 21, 10
"""tokens that a chat template writes once, and around a question with its answer (SmolLM2's; Vicuna's is alike)"""
MEASURED = 512
"""conversations whose length is measured"""


class PlannedChat(PlannedRun):
    """The projector is trained, and of the language model what `train_language` says; a gradient passes through a frozen one, too."""

    config: LlavaConfig

    def _count_model(self) -> None:
        if self.options.cached:
            raise ValueError("cached latents are not read by the training of a chat model; leave out --cached")
        library("chat")  # before anything that takes long
        seeing, size = self._build_model(self.config.tower)
        self.config = config = replace(self.config, size=self.config.size or size)
        layout = ImageLayout(config.size, config.anyres)
        self.squares = 5 if config.anyres else 1
        self.image_tokens = layout.tokens(2 * config.size, 2 * config.size)
        if config.anyres:
            self.assumptions.append("every image is seen whole and in four tiles; small ones have fewer")
        self.text_tokens, self.caption_length = self._text()
        settings = self._language_settings()
        full, self.vocabulary, width = config.train_language == "full", settings.vocab_size, settings.hidden_size
        language, head, projector = self._build(settings, seeing.encoder.size.width, full)
        parts: dict[str, nn.Module] = {"projector": projector, "language model": language, "words": head}
        trained = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()}
        self.parameters = {name: number for name, number in trained.items() if number}
        seen = sum(p.numel() for p in seeing.encoder.parameters())
        frozen = sum(p.numel() for part in (language, head) for p in part.parameters()) - trained["language model"] - trained["words"]
        self.frozen, self.frozen_bytes = seen + frozen, float(FP32 * seen + self.width_bytes * frozen)
        self.kept_numbers, self.passes = 3 * config.size**2 * self.squares, {"VAE encode": self.squares, "encoder": self.squares}
        self._count_trained(nn.ModuleDict(parts))
        self.costs = self._count_costs(seeing, language, head, projector, width)

    def _text(self) -> tuple[int, int]:
        """(tokens of a conversation besides its images, tokens of its answers)."""
        config, options = self.config, self.options
        room = config.length - self.image_tokens
        if room < 2:
            raise ValueError(f"length {config.length} has no room for the {self.image_tokens} tokens of an image and a word; set a larger --length")
        plain = config.template == "plain"
        text, answers = (CAPTION, CAPTION) if plain else (TEXT, TEXT // 2)
        how = "taken for"
        if config.data and all(Path(name).is_file() for name in config.data):
            text, answers, how = *_measure(config, plain), f"measured on the data, at {LETTERS} letters a token,"
        text, answers = min(options.text_length or text, room), options.caption_length or answers
        answers = min(answers, text)
        if not (options.text_length and options.caption_length):
            self.assumptions.append(f"a conversation is {how} {text} tokens of text, {answers} of them answers; set --text-length and --caption-length")
        return text, answers

    def _language_settings(self) -> Any:
        transformers = library("chat")
        name = self.config.language
        if name in PUBLISHED:
            width, mlp, layers, heads, shared, words = PUBLISHED[name]
            return transformers.LlamaConfig(
                hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared, vocab_size=words,
                tie_word_embeddings=name == "smollm2",
            )  # fmt: skip
        try:
            return transformers.AutoConfig.from_pretrained(find_language(name), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"the language model {name} is not here: {error}; name its folder, or one of {', '.join(PUBLISHED)}") from error

    def _build(self, settings: Any, seen: int, full: bool) -> tuple[Any, nn.Module, nn.Module]:
        width, dtype = settings.hidden_size, torch.bfloat16 if self.precision == "bf16" and not full else torch.float32
        with torch.device("meta"):
            language = library("chat").AutoModel.from_config(settings, dtype=dtype).requires_grad_(full).eval()
            head = nn.Linear(width, settings.vocab_size, bias=False, dtype=dtype).requires_grad_(full)
            if settings.tie_word_embeddings:
                head.weight = language.get_input_embeddings().weight
            if self.config.train_language == "lora":
                add_lora(language, self.config)
                for parameter in language.parameters():
                    parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
            return language, head, nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))

    def _count_costs(self, seeing: Any, language: Any, head: nn.Module, projector: nn.Module, width: int) -> dict[str, Cost]:
        side, vae = self.config.size, self.vae
        shapes = self._shapes(self.text_tokens, self.caption_length)
        fused = replace(shapes, on_cpu=False)  # diffusers and transformers leave attention to torch on a CPU, too
        latent, length = (vae.latent_channels, side // vae.stride, side // vae.stride), self.image_tokens + self.text_tokens
        half = torch.bfloat16 if shapes.bf16 else torch.float32
        costs: dict[str, Cost] = {}
        with torch.no_grad():
            if vae.network is not None:
                costs["VAE encode"] = count(vae.network, lambda _, rows: vae._encode(torch.empty(rows, 3, side, side, dtype=half)), fused)
            costs["encoder"] = count(seeing.encoder, lambda part, rows: part(torch.empty(rows, *latent))[0], shapes)
        inside = projector[0].in_features  # type: ignore[index]
        costs["projector"] = count(projector, lambda part, rows: part(torch.empty(rows, self.image_tokens, inside)), fused)

        def talk(part: Any, rows: int) -> Tensor:
            inputs = torch.empty(rows, length, width, dtype=language.dtype, requires_grad=True)
            mask = torch.empty(rows, 1, length, length, dtype=language.dtype)  # whole, or transformers looks at its numbers
            return part(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state

        def score(part: nn.Module, rows: int) -> Tensor:
            return part(torch.empty(rows, self.caption_length, width, dtype=head.weight.dtype, requires_grad=True))  # type: ignore[arg-type]

        costs["language model"] = count(language, talk, fused, ("layers", "h"), passed=True)
        return costs | {"vocabulary head": count(head, score, fused)}

    def repeated(self) -> dict[str, float]:
        from openvision3.model.losses import CHUNK

        return {"vocabulary head": 1.0} if self.micro * self.caption_length * self.vocabulary > CHUNK else {}


def _measure(config: LlavaConfig, plain: bool) -> tuple[int, int]:
    """(tokens of text, of answers) of a conversation of the data on average."""
    folder = str(Path(config.data[0]).parent)  # no image is opened
    data = Conversations(config.data, [folder])
    rows = [data[index].messages for index in range(0, len(data), max(1, len(data) // MEASURED))]
    written = [message["content"] for row in rows for message in row if message["role"] == "assistant"]
    answers, turns = sum(map(len, written)) / len(rows) / LETTERS, len(written) / len(rows)
    if plain:
        return max(1, round(answers)), max(1, round(answers))
    text = sum(len(message["content"]) for row in rows for message in row) / len(rows) / LETTERS
    return round(text + OPENING + TURN * turns), max(1, round(answers + turns))
