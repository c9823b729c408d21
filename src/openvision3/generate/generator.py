"""What `ov3.load_generator` returns: a generator that takes texts or labels and draws images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from openvision3 import hub
from openvision3.data.captions import checked_text
from openvision3.data.images import pil_images
from openvision3.device import choose_device
from openvision3.evaluate.protocol import DrawingFunctions
from openvision3.files import sha256_of
from openvision3.generate import folder
from openvision3.generate.dit import Condition
from openvision3.generate.flow import Sampling
from openvision3.generate.folder import GeneratorConfig
from openvision3.generate.rae import RAE, noise_of
from openvision3.settings import unknown

BATCH = 32
"""most images that are drawn at a time"""


class Generator:
    """A trained generator. `rae` is the whole network with the token space it draws in; `weaker` is a generator to guide by, or None."""

    def __init__(self, rae: RAE, config: GeneratorConfig, path: Path, *, name: str = "", precision: str = "fp32", weaker: Generator | None = None):
        self.rae, self.config, self.folder, self.precision, self.weaker = rae, config, path, precision, weaker
        self.name = name or path.name
        self.size, self.condition, self.label_names = config.size, config.condition, config.label_names
        self.licence = str(config.training.get("licence", "unknown"))

    @property
    def can_guide(self) -> bool:
        """Whether it has learnt to draw without a condition, or has a weaker generator."""
        return self.weaker is not None or (self.condition != "none" and self.config.drop > 0)

    @property
    def sha256(self) -> str:
        return sha256_of(self.folder) if self.folder.is_file() else hub.weights_sha256(self.folder)

    @property
    def device(self) -> torch.device:
        return self.rae.statistics.mean.device

    def __repr__(self) -> str:
        return f"Generator({self.name}, {self.size} px, by {self.condition}, tokens of {self.config.tokens}, on {self.device})"

    def generate(
        self,
        texts: str | Sequence[str] = (),
        *,
        labels: int | str | Sequence[int | str] = (),
        count: int = 1,
        sampling: Sampling = Sampling(),
        each: Callable[[int, list[Image.Image]], object] | None = None,
    ) -> list[Image.Image]:
        """`count` images of each text or label, or `count` images in all of a generator without a condition.

        Image number i of the answer depends on (sampling.seed, i) and its condition alone. `each` is called after every step of a batch with its number
        and the images that are promised from there.

        Raises:
            ValueError: a condition that this generator does not take, an unknown label (names the nearest), guidance that it has not learnt.
        """
        report = None if each is None else lambda number, tokens: each(number, pil_images(self.decode(tokens)))
        return self.images_of(self.draw_tokens(texts, labels=labels, count=count, sampling=sampling, each=report))

    def draw_tokens(
        self,
        texts: str | Sequence[str] = (),
        *,
        labels: int | str | Sequence[int | str] = (),
        count: int = 1,
        sampling: Sampling = Sampling(),
        each: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """As `generate`, but the tokens (B, N, D) of the images, which `decode` makes images of."""
        conditions = [one for one in self._conditions(texts, labels) for _ in range(count)]
        if not conditions:
            raise ValueError(f"count {count} draws no image; give 1 or more")
        batches = [range(first, min(first + BATCH, len(conditions))) for first in range(0, len(conditions), BATCH)]
        return torch.cat([self._draw(indices, [conditions[i] for i in indices], sampling, each) for indices in batches])

    def images_of(self, tokens: Tensor) -> list[Image.Image]:
        """tokens (B, N, D) -> B images."""
        return [image for part in tokens.split(BATCH) for image in pil_images(self.decode(part))]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> images (B, 3, H, W) in [-1, 1], on the CPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.rae.space.decode(tokens.to(self.device), self.rae.grid).float().clamp(-1, 1).cpu()

    def sample(self, indices: Sequence[int], conditions: Sequence[int] | Sequence[str] | None, sampling: Sampling) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] on the CPU: number indices[i] of the seed, by conditions[i] (numbers of classes, or texts).

        Raises:
            ValueError: as `generate`.
        """
        return self.decode(self._draw(indices, [""] * len(indices) if conditions is None else list(conditions), sampling, None))

    @torch.no_grad()
    def _draw(self, indices: Sequence[int], conditions: Sequence[int | str], sampling: Sampling, each: Callable[[int, Tensor], object] | None) -> Tensor:
        if sampling.guidance != 1 and not self.can_guide:
            why = "draws on no condition" if self.condition == "none" else "was trained without dropped conditions (drop 0)"
            raise ValueError(f"guidance {sampling.guidance:g} cannot be used: {self.name} {why}; leave out --guidance")
        rows, columns = self.rae.statistics.mean.shape
        noise = noise_of(indices, sampling.seed, (rows, columns)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.rae.draw(noise, self._condition(conditions), sampling, self.weaker.rae if self.weaker else None, each)

    def functions(self, sampling: Sampling = Sampling()) -> DrawingFunctions:
        """For evaluation: itself as a function of numbers of samples, drawn by this sampling with any guidance."""
        return DrawingFunctions(
            self.name,
            self.size,
            lambda indices, conditions, guidance: self.sample(indices, conditions, replace(sampling, guidance=guidance)),
            self.condition,
            self.label_names,
            self.can_guide,
            {"steps": sampling.steps, "method": sampling.method, "grid": sampling.grid},
            {
                "interval": list(sampling.interval),
                "weaker": self.weaker.name if self.weaker else "",
                "weaker_sha256": self.weaker.sha256 if self.weaker else "",
            },
            self.precision,
            self.sha256,
            self.licence,
        )

    def _condition(self, conditions: Sequence[int | str]) -> Condition:
        if self.condition == "label":
            return Condition(labels=torch.tensor([int(one) for one in conditions], device=self.device))
        if self.condition == "none":
            return Condition()
        text_encoder, tokenizer = self.rae.space.text_encoder, self.rae.space.tokenizer
        assert text_encoder is not None and tokenizer is not None
        return self.rae.read(tokenizer.text_ids([str(one) for one in conditions], text_encoder.config.positions).to(self.device))

    def _conditions(self, texts: str | Sequence[str], labels: int | str | Sequence[int | str]) -> list[str] | list[int]:
        """Checked texts, or numbers of classes; one empty text of a generator without a condition."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        labels = [labels] if isinstance(labels, str | int) else list(labels)
        if self.condition == "none":
            if texts or labels:
                raise ValueError(f"{self.name} draws without a condition; leave out texts and labels")
            return [""]
        wanted, other = (texts, labels) if self.condition == "text" else (labels, texts)
        if other or not wanted:
            example = "texts, such as 'a red heart', and no labels"
            if self.condition == "label":
                example = f"labels, such as {', '.join(self.label_names[:3])} or their numbers, and no texts"
            raise ValueError(f"{self.name} draws by {self.condition}: give {example}")
        if self.condition == "label":
            return [self._number(label) for label in labels]
        for text in texts:
            if not isinstance(text, str) or not checked_text(text, "a text").strip():
                raise ValueError(f"{text!r:.60} is no text to draw; give one such as 'a red heart'")
        tokenizer, text_encoder = self.rae.space.tokenizer, self.rae.space.text_encoder
        assert tokenizer is not None and text_encoder is not None
        positions = text_encoder.config.positions - 1
        if complaint := tokenizer.complaint(texts, positions) or str(tokenizer.count(texts, positions)) or tokenizer.spelled(texts, positions):
            warnings.warn(complaint, stacklevel=3)
        return texts

    def _number(self, label: int | str) -> int:
        """The number of a class by its name or number. Raises ValueError."""
        if label in self.label_names:
            return self.label_names.index(str(label))
        if str(label).isdecimal() and int(label) < len(self.label_names):
            return int(label)
        choices = f"{len(self.label_names)} classes: give a name or a number from 0 to {len(self.label_names) - 1}"
        raise unknown("label", str(label), self.label_names, choices)


def load_generator(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    tokens: str = "",
    weaker: str | Path = "",
    heads: tuple[int, int] = (0, 0),
) -> Generator:
    """A shipped name, the folder of a generator or a run of one -> a Generator.

    `tokens` names the model whose tokens it draws, if the name it has recorded is not found; `weaker` names a generator of the same tokens to guide by
    (AutoGuidance, arXiv 2406.02507). `heads` are the attention heads of trunk and head of RAE's public weights, where the file does not tell them.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, in one line.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r} is unknown; choose fp32 or bf16")
    place = choose_device(device)
    rae, config, path = folder.load(name, precision=precision, tokens=tokens, heads=heads)
    guide = None
    if weaker:
        other, theirs, other_path = folder.load(weaker, precision=precision, tokens=tokens, heads=heads)
        for what in ("tokens_sha256", "size", "condition", "label_names"):
            if getattr(config, what) != getattr(theirs, what):
                raise ValueError(f"{other_path} cannot guide {path}: they differ in {what}; choose a smaller or shorter training of the same kind")
        if not rae.statistics.is_like(other.statistics):
            raise ValueError(f"{other_path} cannot guide {path}: it normalises tokens by other statistics; train both on the same images")
        guide = Generator(other.to(place), theirs, other_path, name=str(weaker), precision=precision)
    return Generator(rae.to(place), config, path, name=str(name), precision=precision, weaker=guide)
