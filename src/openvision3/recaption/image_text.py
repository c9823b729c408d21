"""Any image-to-text model of transformers as one function: images in, one-line answers to a prompt out.

An answer depends on the image, the prompt and (seed, key), and not on the other images in the batch.
transformers is an extra, imported when a model is loaded.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openvision3.contents import short
from openvision3.data.images import ImageError
from openvision3.draws import draw_seed
from openvision3.files import sha256_of
from openvision3.networks.text_models import decode_greedily, in_template, open_image_text, opening

KIND = "image-to-text model"


@dataclass(frozen=True)
class Wording:
    """What an answer depends on, except model and image. Decoding is greedy, unless `top_p` or `temperature` is given."""

    prompt: str = "Describe this picture in detail."
    max_new_tokens: int = 128
    top_p: float | None = None
    """sample from the smallest set of tokens with this probability"""
    temperature: float | None = None
    """flattens (> 1) or sharpens (< 1) the distribution"""
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p:g} must be greater than 0 and at most 1")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature:g} must be a number greater than 0; leave it out for greedy decoding")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be a whole number from 0 to 2^63 - 1")

    @property
    def is_sampled(self) -> bool:
        return self.top_p is not None or self.temperature is not None


@dataclass(frozen=True)
class Answer:
    """The answer to an image, on one line; `cut`: it ends at max_new_tokens."""

    text: str
    cut: bool = False


@dataclass(frozen=True)
class Identity:
    """Which weights: a folder is identified by its name and a hash of its files, a hub model by its commit."""

    name: str
    revision: str


def identify(model: str, revision: str = "", download: bool = False) -> Identity:
    """Raises ValueError: there is no such folder, and no such model in the local cache (or on the hub, with `download`)."""
    with opening(model, KIND, absent=_absent(model, download)) as transformers:
        if not Path(model).is_dir():
            config = transformers.AutoConfig.from_pretrained(model, **_where(revision, download))
            return Identity(model, config._commit_hash or revision or "unknown")
    if revision:
        raise ValueError(f"{model} is a folder, which holds one revision only; leave out --revision {revision}")
    whole = hashlib.sha256()
    for path in sorted(p for p in Path(model).iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja") and p.is_file()):
        whole.update(path.name.encode() + b"\0")
        whole.update(bytes.fromhex(sha256_of(path)))
    return Identity(Path(model).resolve().name, f"sha256:{whole.hexdigest()[:16]}")


class ImageTextModel:
    """An `AutoModelForImageTextToText` with its processor and a prompt.

    The prompt goes through the processor's chat template if it has one, and is used as it is otherwise. The penalties on repetition
    in the model's own settings are left out: they count padding, so that an answer would depend on the other images in the batch.

    Raises:
        ValueError: there is no such model, it is of another kind, or it does not take an image with this prompt.
    """

    def __init__(self, name: str, wording: Wording, *, revision: str = "", device: str = "cpu", dtype: torch.dtype = torch.float32, download: bool = False):
        self.wording, self.device, self.dtype = wording, device, dtype
        network, self.processor = open_image_text(name, dtype, absent=_absent(name, download), **_where(revision, download))
        self.model: Any = network.to(device)
        self.words: Any = self.processor.tokenizer
        self.encoder_decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self.text = in_template(self.processor, wording.prompt, wording.prompt)
        self.generation = decode_greedily(self.model, self.words)
        self.generation.max_new_tokens = wording.max_new_tokens
        ends = self.generation.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self._try_out(name)

    def _try_out(self, name: str) -> None:
        """Try a grey image before anything is written, so that a prompt that the model cannot take costs no time."""
        grey = Image.new("RGB", (64, 48), (128, 128, 128))
        try:
            self._generate(self._prepare([grey]), ["grey"], max_new_tokens=1)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            token = getattr(self.processor, "image_token", None)
            hint = f"; it has no chat template, so put its image token into --prompt: '{token} ...'" if token and token not in self.text else ""
            raise ValueError(f"{name} does not take an image with the prompt {self.wording.prompt!r}: {short(error)}{hint}") from error

    def _prepare(self, images: Sequence[Image.Image]) -> Any:
        text = {"text": [self.text] * len(images)} if self.text else {}
        # One list for each image: some processors take a flat list as several images of one text.
        inputs = self.processor(images=[[image] for image in images], **text, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.dtype)  # the dtype applies to floating point only

    @torch.inference_mode()
    def _generate(self, inputs: Any, keys: Sequence[str], **changes: Any) -> Tensor:
        """The generated ids (B, T), without the prompt."""
        draws = [_Draws(self.wording, keys)] if self.wording.is_sampled else []
        ids = self.model.generate(**inputs, generation_config=self.generation, logits_processor=draws, **changes)
        if self.encoder_decoder:
            return ids[:, 1:]  # the token that starts the decoder, which may be the one that ends an answer
        prompt = inputs.get("input_ids")
        if prompt is not None and ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
            ids = ids[:, prompt.shape[1] :]
        return ids

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[Answer | ImageError]:
        """One answer for each image, in order; for an image that the processor refuses, the reason."""
        answers: list[Answer | ImageError | None] = [None] * len(images)
        try:
            inputs = self._prepare(images)
        except (ValueError, TypeError, ZeroDivisionError) as error:  # of one image, such as a line a thousand times as wide as high: find it
            answers = [self._refused(image) for image in images]
            if not any(answers):
                raise ValueError(f"the processor takes each of {len(images)} images but not all together: {short(error)}; try --batch 1") from error
            taken = [i for i, answer in enumerate(answers) if answer is None]
            inputs = self._prepare([images[i] for i in taken]) if taken else None
        left = [i for i, answer in enumerate(answers) if answer is None]
        if left:
            for i, row in zip(left, self._generate(inputs, [keys[i] for i in left]).tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in self.ends), None)
                text = self.words.decode(row[:end], skip_special_tokens=True)
                answers[i] = Answer(clean(text, self.wording.prompt), cut=end is None and len(row) >= self.wording.max_new_tokens)
        return [answer for answer in answers if answer is not None]

    def _refused(self, image: Image.Image) -> ImageError | None:
        try:
            self._prepare([image])
        except (ValueError, TypeError, ZeroDivisionError) as error:
            return ImageError("refused by the processor", f"{image.width} x {image.height} pixels: {short(error)}")
        return None


class _Draws:
    """Leaves one token in each row, sampled with the row's own generator; greedy decoding then takes it.

    transformers samples the whole batch with one generator, so that a text would depend on the other rows.
    """

    def __init__(self, wording: Wording, keys: Sequence[str]):
        self.top_p = 1.0 if wording.top_p is None else wording.top_p
        self.temperature = 1.0 if wording.temperature is None else wording.temperature
        self.generators = [torch.Generator().manual_seed(draw_seed("recaption", wording.seed, key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        share, order = (scores.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        below = share.cumsum(-1) - share  # the likeliest token is always included
        share = share.where(below < self.top_p, 0.0)
        point = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self.generators]).to(scores.device)
        place = (share.cumsum(-1) <= (point * share.sum(-1))[:, None]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, order.gather(-1, place), 0.0)


def clean(text: str, prompt: str = "") -> str:
    """One line of visible characters, without half a character at the end, and without the prompt that some models repeat first."""
    text = "".join(c for c in text.encode("utf-8", "replace").decode() if c.isspace() or unicodedata.category(c) != "Cc")
    line = " ".join(text.split()).rstrip("\ufffd ")
    prompt_words = " ".join(re.sub(r"<[^<>\s]+>", " ", prompt).split())
    # A prompt of one word, such as `a`, may be the beginning of the answer.
    if " " in prompt_words and line.lower().startswith(prompt_words.lower()) and not line[len(prompt_words) : len(prompt_words) + 1].isalnum():
        line = line[len(prompt_words) :].lstrip(" :,.?!-").strip()
    return line


def _where(revision: str, download: bool) -> dict[str, Any]:
    return {"local_files_only": not download, **({"revision": revision} if revision else {})}


def _absent(name: str, download: bool) -> str:
    """What is said where transformers does not find a model: its own words are about its hub; "" where they are about a folder."""
    return "" if download or Path(name).is_dir() else "it is neither a folder nor in the local cache: name a folder, or add --download"
