"""What `ov3.load` returns: a model that takes paths, PIL images, tensors and texts."""

from __future__ import annotations

import functools
import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from openvision3 import hub
from openvision3.data.crops import PATCH, fit, pad, padded
from openvision3.data.familiarity import FILE as FAMILIARITY
from openvision3.data.familiarity import Familiarity, caption_confidence, label_confidence
from openvision3.data.fingerprint import FILE, Fingerprint, recorded
from openvision3.data.folders import scan_folder
from openvision3.data.images import EXTENSIONS, MAX_PIXELS, ImageError, open_image, to_pil, to_tensor
from openvision3.data.problems import reasons_in_words
from openvision3.data.text import TextTokenizer
from openvision3.device import choose_device, dtype_of
from openvision3.draws import draw_seed
from openvision3.evaluate.protocol import Functions
from openvision3.model.encoder import Encoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.reconstruction import noisy
from openvision3.model.understanding import check_sampling, class_embedding
from openvision3.model.vae import VAE
from openvision3.settings import check_templates

Images = str | os.PathLike | bytes | Image.Image | Tensor | Sequence[Any] | Iterator[Any]


class Answer(NamedTuple):
    """A caption, and how far to trust it. Without a calibration (`openvision3 calibrate`) confidence and in_distribution are None."""

    caption: str
    log_probability: float
    """mean over its word pieces"""
    total_log_probability: float
    """sum over its word pieces: those that stand in every caption, as in "a photo of a rose", add next to nothing to it"""
    confidence: float | None
    """estimated probability that the caption is right: it shares half of the words that tell captions apart (F1 of 50 % or more)"""
    in_distribution: bool | None
    """whether the image resembles the training images"""


class Pipeline:
    """A trained model, ready to use. `encoder` and `vae` are its bare parts, `model` is the whole network.

    Inference adds no noise (sigma 0) and runs in fp32 unless `precision` is bf16.
    """

    def __init__(self, model: OpenVision3, tokenizer: TextTokenizer, size: int, *, precision: str = "fp32", training: dict[str, Any] | None = None):
        self.model = model.eval()
        self.tokenizer, self.size, self.training = tokenizer, size, training or {}
        self.precision = precision
        self.folder: Path | None = None
        """the folder it was loaded from"""
        self.fingerprint: Fingerprint | None = None
        """by which its training data can be recognised"""
        self.familiarity: Familiarity | None = None
        """by which it tells images unlike its training images, and how often its answers are right"""

    @property
    def encoder(self) -> Encoder:
        return self.model.encoder

    @property
    def vae(self) -> VAE:
        return self.model.vae

    @property
    def device(self) -> torch.device:
        return self.model.log_temperature.device

    def to(self, device: str | torch.device) -> Pipeline:
        """Move the whole model, for example to `cuda:1`, and return it. Raises ValueError if there is no such device."""
        if isinstance(device, torch.dtype):
            raise ValueError(f"a model cannot be moved to {device}; choose the precision when it is loaded: load(..., precision='bf16')")
        self.model.to(choose_device(device))
        return self

    def __repr__(self) -> str:
        width, embedding = self.encoder.size.width, self.encoder.config.embed_dim
        return (
            f"Pipeline({self.encoder.config.size} encoder, {self.size} px, tokens of {width}, embeddings of {embedding}, VAE {self.vae.name}, on {self.device})"
        )

    @property
    def untrained(self) -> tuple[str, ...]:
        """Parts that were never trained: a released encoder came without them."""
        return tuple(self.training.get("untrained", ()))

    def check_trained(self, part: str) -> None:
        """Raises ValueError for a part that was never trained, whose results would be random."""
        if part in self.untrained:
            raise ValueError(
                f"the {part} of this model was never trained, because it began as a released encoder, which has none; "
                "the model encodes, embeds and rebuilds images, and images can be drawn from its tokens"
            )

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    # -- images ----------------------------------------------------------------------------------------------------

    def scaled(self, images: Images, size: int | None = None) -> list[Tensor]:
        """Images of any kind -> each as (3, H, W) in [-1, 1], not padded: the aspect is kept, the long side scaled to `size`.

        `size` None is the training size for files and PIL images, and a tensor's own size; 0 is the image's own size.

        Raises:
            ImageError: an unreadable image. ValueError: something that is no image, or a tensor out of range.
        """
        if size is not None and (not isinstance(size, int) or not 0 <= size <= MAX_PIXELS**0.5):
            raise ValueError(f"size {size!r} cannot be used; choose a long side of 1 to {int(MAX_PIXELS**0.5)} pixels, or 0 for the image's own")
        if isinstance(images, Tensor):
            if images.ndim not in (3, 4) or images.shape[-3] != 3:
                raise ValueError(f"images of shape {tuple(images.shape)} cannot be used; give (B, 3, H, W) or (3, H, W) in [-1, 1]")
            if not images.numel():
                return []
            _check_floats(images, "images", "0..255: images / 127.5 - 1")
            _check_range(images)
            rows = (images if images.ndim == 4 else images[None]).float()
            return self.scaled(to_pil(rows), size) if size else list(rows)
        if isinstance(images, str | os.PathLike | bytes | Image.Image):
            return [to_tensor(fit(open_image(images), self.size if size is None else size or None))]
        if isinstance(images, Sequence | Iterator):
            several: list[Any] = list(images)
            return [row for image in several for row in self.scaled(image, size)]
        raise ValueError(f"a {type(images).__name__} is no image; give PIL images, paths, tensors in [-1, 1] or lists of them")

    def prepare(self, images: Images, size: int | None = None, pad_to: tuple[int, int] | None = None) -> Tensor:
        """Images of any kind -> (B, 3, H, W) in [-1, 1]: scaled as by `scaled`, padded at the bottom and right to multiples of 16.

        Raises:
            ValueError: images of different padded sizes (use `pad_to`), or none at all; and what `scaled` raises.
        """
        if pad_to is not None:
            pad_to = _two(pad_to, "pad_to")
        rows = [pad(row, pad_to) for row in self.scaled(images, size)]
        if not rows:
            raise ValueError("no images given")
        shapes = {tuple(row.shape[-2:]) for row in rows}
        if len(shapes) > 1:
            seen = ", ".join(f"{h}x{w}" for h, w in sorted(shapes))
            largest = max(h for h, _ in shapes), max(w for _, w in shapes)
            raise ValueError(f"these images have different padded sizes ({seen}), so they cannot be one batch; take them one by one, or with pad_to={largest}")
        return torch.stack(rows).to(self.device) if len({row.device for row in rows}) == 1 else torch.stack([row.to(self.device) for row in rows])

    @torch.no_grad()
    def encode(self, images: Images, size: int | None = None, pad_to: tuple[int, int] | None = None) -> Tensor:
        """Images (PIL, path, list of them, or tensor in [-1, 1]) -> tokens (B, N, D).

        The encoder sees the padding: with more of it (`pad_to`) the tokens differ. To decode them, pass the scaled size,
        `scaled(image)[0].shape[1:]`, or what `pad_to` was.
        """
        with self._autocast():
            return self.model.encode(self.prepare(images, size, pad_to)).float()

    @torch.no_grad()
    def decode(self, tokens: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """tokens (B, N, D) -> images (B, 3, H, W) in [-1, 1]; `size` is the unpadded (H, W), a square if not given.

        Raises:
            ValueError: a size whose grid does not hold N tokens, or tokens of another width.
        """
        if not isinstance(tokens, Tensor):
            raise ValueError(f"a {type(tokens).__name__} cannot be decoded; give a tensor (B, N, {self.encoder.size.width})")
        _check_floats(tokens, "tokens")
        if tokens.ndim != 3 or tokens.shape[2] != self.encoder.size.width:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} are not this model's; give (B, N, {self.encoder.size.width})")
        if size is None:
            side = round(tokens.shape[1] ** 0.5) * PATCH
            if (side // PATCH) ** 2 != tokens.shape[1]:
                raise ValueError(f"{tokens.shape[1]} tokens are no square; pass size=(H, W) of the image they came from")
            size = (side, side)
        size = _two(size, "size")
        grid = padded(size[0]) // PATCH, padded(size[1]) // PATCH
        if min(grid) < 1 or grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(
                f"an image of {size[0]}x{size[1]} has {grid[0]}x{grid[1]} tokens, not {tokens.shape[1]}; "
                "pass the scaled size they came from, model.scaled(image)[0].shape[1:], or what pad_to was"
            )
        with self._autocast():
            images = self.model.decode(tokens.to(self.device, torch.float32), grid)
        return images.float().clamp(-1, 1)[..., : size[0], : size[1]]

    def reconstruct(self, image: Images, size: int | None = None) -> Tensor:
        """One image -> (1, 3, H, W), through the encoder and back, at its scaled, unpadded size."""
        row = _only(self.scaled(image, size), "reconstruct")
        return self.decode(self.encode(row), (row.shape[1], row.shape[2]))

    @torch.no_grad()
    def reconstruct_by_vae(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the same size, through the frozen VAE alone: the best that the tokens could give."""
        return self.vae.decode(self.vae.encode(images.to(self.device))).cpu()

    # -- texts -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_images(self, images: Images, size: int | None = None, pad_to: tuple[int, int] | None = None) -> Tensor:
        """Images -> unit vectors (B, E)."""
        with self._autocast():
            return self.model.embed_images(self.prepare(images, size, pad_to))

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> unit vectors (B, E). Warns of texts with unknown words, and of texts that the model cannot tell apart.

        Raises:
            ValueError: no text, or one that holds half a character.
        """
        self.check_trained("text encoder")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts {texts!r:.80} cannot be embedded; give a text or a list of texts, such as ['a red heart']")
        if complaint := self.tokenizer.complaint(texts, self.model.text_encoder.config.positions - 1):
            warnings.warn(complaint, stacklevel=2)
        return self._embed(texts)

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenizer.text_ids(texts, self.model.text_encoder.config.positions).to(self.device)
        with self._autocast():
            return self.model.embed_texts(ids)

    @torch.no_grad()
    def caption(
        self,
        images: Images,
        *,
        max_length: int | None = None,
        beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        size: int | None = None,
        pad_to: tuple[int, int] | None = None,
    ) -> list[str]:
        """Images -> one caption each: greedy, by beam search (`beams` > 1), or sampled from the top-p nucleus.

        Raises:
            ValueError: settings that are out of range, or exclude each other.
        """
        _, ids = self._write(self.prepare(images, size, pad_to), max_length, beams, top_p, temperature, seed)
        return [self.tokenizer.text(row) for row in ids]

    @torch.no_grad()
    def answer(
        self,
        images: Images,
        *,
        max_length: int | None = None,
        beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        size: int | None = None,
        pad_to: tuple[int, int] | None = None,
    ) -> list[Answer]:
        """As `caption`, with the confidence in each caption, and whether the image resembles the training images. Raises ValueError, as `caption`."""
        prepared = self.prepare(images, size, pad_to)
        tokens, ids = self._write(prepared, max_length, beams, top_p, temperature, seed)
        captions = [self.tokenizer.text(row) for row in ids]
        with self._autocast():
            means, totals = self.model.captioner.log_probabilities(tokens, ids, self.tokenizer.begin_id, self.tokenizer.end_id)
        words = list(zip(captions, means.tolist(), totals.tolist(), strict=True))
        if self.familiarity is None or self.familiarity.calibration is None:
            return [Answer(caption, mean, total, None, None) for caption, mean, total in words]
        calibration, familiar = self.familiarity.calibration, self.familiarity.score(self.describe(prepared)).tolist()
        return [
            Answer(caption, mean, total, caption_confidence(calibration, mean, total, by_image), by_image >= calibration.threshold)
            for (caption, mean, total), by_image in zip(words, familiar, strict=True)
        ]

    def _write(self, images: Tensor, max_length: int | None, beams: int, top_p: float | None, temperature: float, seed: int) -> tuple[Tensor, list[list[int]]]:
        """Prepared images -> their tokens, and the word ids of a caption each."""
        self.check_trained("captioner")
        if not isinstance(beams, int) or beams < 1 or (beams > 1 and top_p is not None):
            raise ValueError(f"beams {beams} with top_p {top_p} cannot be used; choose one beam or more, and either beams or top_p")
        if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r} must be a whole number from 0 to 2^63 - 1")
        if max_length is not None and not isinstance(max_length, Integral):
            raise ValueError(f"max_length {max_length!r} must be a whole number of word pieces, such as 32")
        check_sampling(top_p, temperature)
        captioner, special = self.model.captioner, (self.tokenizer.begin_id, self.tokenizer.end_id)
        longest = captioner.config.positions - 1
        length = longest if max_length is None else min(max_length, longest)
        with self._autocast():
            tokens = self.model.encode(images)
            if beams > 1:
                ids = captioner.write_beam(tokens, *special, max_length=length, beams=beams)
            else:
                generator = torch.Generator(self.device).manual_seed(int(seed))
                ids = captioner.write(tokens, *special, max_length=length, top_p=top_p, temperature=temperature, generator=generator)
        return tokens, ids

    def classify(self, image: Images, labels: Sequence[str | Sequence[str]], templates: Sequence[str] = ("{}",)) -> list[tuple[str, float]]:
        """One image among `labels` -> [(label, probability)], most likely first. Warns of labels with unknown words.

        A label may be several names of one class, such as ["rose", "roses"]; it is answered by the first. Every name is put into every template, such
        as "a drawing of {}", and a class is the mean direction of all its texts.

        Raises:
            ValueError: different labels that the model cannot tell apart, because their words are unknown or cut off; a template without {}.
        """
        self.check_trained("text encoder")
        names = _names_of_classes(labels)
        if isinstance(templates, str) or not templates or not all(isinstance(template, str) for template in templates):
            raise ValueError(f"templates must be a list of texts, such as ['a drawing of {{}}']; seen {templates!r:.80}")
        check_templates(templates)
        texts = [[template.replace("{}", name) for template in templates for name in of_one] for of_one in names]
        positions = self.model.text_encoder.config.positions - 1
        for place in range(len(templates)):  # the texts of each class that one template makes, by its first name
            if same := self.tokenizer.same([of_one[place * len(own)] for of_one, own in zip(texts, names, strict=True)], positions):
                raise ValueError(same)
        if complaint := self.tokenizer.complaint([text for of_one in texts for text in of_one], positions):
            warnings.warn(complaint, stacklevel=2)
        embedding = self.embed_images(_only(self.scaled(image), "classify"))
        classes = class_embedding(self._embed([text for of_one in texts for text in of_one]).split([len(of_one) for of_one in texts]))
        scores = (self.model.temperature * embedding @ classes.T).softmax(-1)[0].tolist()
        return sorted(((own[0], score) for own, score in zip(names, scores, strict=True)), key=lambda pair: -pair[1])

    @torch.no_grad()
    def in_distribution(self, images: Images, size: int | None = None, pad_to: tuple[int, int] | None = None) -> list[bool | None]:
        """Whether each image resembles the training images; None where the model has no calibration (`openvision3 calibrate`)."""
        prepared = self.prepare(images, size, pad_to)
        if self.familiarity is None or self.familiarity.calibration is None:
            return [None] * len(prepared)
        return [score >= self.familiarity.calibration.threshold for score in self.familiarity.score(self.describe(prepared)).tolist()]

    def describe(self, images: Tensor) -> Tensor:
        """Prepared images -> (B, 1280): features of EfficientNet-Lite0, by which images unlike the training images are known.

        A small model's own tokens cannot do that once it has seen photographs (docs/use.md). Raises FileNotFoundError: the network is not installed.
        """
        return self._descriptor(images)

    @functools.cached_property
    def _descriptor(self) -> Any:
        from openvision3.networks.inception import EfficientNetFeatures  # only calibrated models need it

        return EfficientNetFeatures().eval().requires_grad_(False).to(self.device)

    def label_confidence(self, ranking: Sequence[tuple[str, float]]) -> float | None:
        """The calibrated probability of the first label of `classify`'s answer, all of which is needed; None without a calibration."""
        if self.familiarity is None or self.familiarity.calibration is None:
            return None
        return label_confidence(self.familiarity.calibration, [probability for _, probability in ranking])

    # -- for evaluators --------------------------------------------------------------------------------------------

    def functions(self, name: str = "ours") -> Functions:
        """Everything the model can do, as functions of tensors and texts. A probe gets the mean of the tokens."""

        @torch.no_grad()
        def reconstruct_noisy(images: Tensor, sigmas: Sequence[float], keys: Sequence[str]) -> list[Tensor]:
            draw_key = torch.tensor([draw_seed("sigma", key) for key in keys], device=self.device)
            tokens = self.encode(images)
            return [self.decode(noisy(tokens, sigma, draw_key), (images.shape[2], images.shape[3])).cpu() for sigma in sigmas]

        reads, writes = ("text encoder" not in self.untrained), ("captioner" not in self.untrained)
        never = f"; never trained: {', '.join(self.untrained)}" if self.untrained else ""
        return Functions(
            name,
            self.size,
            self.precision,
            hub.weights_sha256(self.folder) if self.folder else "",
            self.training.get("licence", "unknown"),
            reconstruct=lambda images: self.decode(self.encode(images), (images.shape[2], images.shape[3])).cpu(),
            reconstruct_noisy=reconstruct_noisy,
            embed_images=lambda images: self.embed_images(images).cpu(),
            embed_texts=(lambda texts: self._embed(texts).cpu()) if reads else None,
            count_text=(lambda texts: self.tokenizer.count(texts, self.model.text_encoder.config.positions - 1)) if reads else None,
            caption=self.caption if writes else None,
            features=lambda images: self.encode(images).mean(1).cpu(),
            note=f"VAE {self.vae.name}, sha256 {self.vae.sha256 or 'none'}{never}",
        )

    # -- the folder ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None, card: str = "", with_vae: bool | None = None) -> None:
        """Write a model folder that `load` reads: config.json, model.safetensors, tokenizer.json, README.md (and the VAE, where
        it is the embedded one). `dtype` torch.bfloat16 halves it.
        """
        hub.save_model(folder, self.model, self.tokenizer, self.size, training=self.training, dtype=dtype, card=card, with_vae=with_vae)
        if self.fingerprint is not None:
            self.fingerprint.save(Path(folder) / FILE)
        if self.familiarity is not None:
            self.familiarity.save(Path(folder) / FAMILIARITY)


def load(name: str | Path = "mini", *, device: str | torch.device = "auto", precision: str = "fp32", vae: str = "") -> Pipeline:
    """A shipped name, a model folder or a run folder -> a Pipeline.

    `device` auto is CUDA if there is one, `cuda:1` the second GPU. `precision` bf16 is faster on processors and GPUs that support it. `vae` names the
    VAE's folder, if the model folder does not hold it and its own name is not found.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, in one line.
    """
    device = choose_device(device)
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r} is unknown; choose fp32 or bf16")
    folder = hub.find_folder(name)  # only once: meanwhile a run may save its next checkpoint
    model, tokenizer, config = hub.load_model(folder, device=device, vae_dtype=dtype_of(precision), vae=vae)
    pipeline = Pipeline(model, tokenizer, config.size, precision=precision, training=config.training)
    pipeline.folder, pipeline.fingerprint = folder, recorded(folder)
    if (folder / FAMILIARITY).is_file():
        pipeline.familiarity = Familiarity.load(folder / FAMILIARITY)
    return pipeline


def _two(size: Any, name: str) -> tuple[int, int]:
    """(H, W) as whole numbers. Raises ValueError."""
    try:
        height, width = size
        return index(height), index(width)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={size!r} cannot be used; give a pair of whole numbers (H, W)") from None


def _names_of_classes(labels: Any) -> list[list[str]]:
    """The names of each class. Raises ValueError."""
    listed = [*labels] if not isinstance(labels, str) and isinstance(labels, Iterable) else []
    names = [[label] if isinstance(label, str) else [*label] if isinstance(label, Sequence) else [] for label in listed]
    if not names or not all(of_one and all(isinstance(name, str) for name in of_one) for of_one in names):
        raise ValueError(f"labels must be a list of texts, such as ['a cat', 'a dog']; seen {listed or labels!r:.80}")
    return names


def _check_floats(values: Tensor, name: str, scale: str = "") -> None:
    if not values.is_floating_point():
        raise ValueError(f"{name} of {values.dtype} cannot be used; give {f'floats in [-1, 1] (for {scale})' if scale else 'floats'}")


def _check_range(images: Tensor) -> None:
    low, high = images.aminmax()
    if not (bool(low >= -1.01) and bool(high <= 1.01)):
        raise ValueError(f"images run from {float(low):.3g} to {float(high):.3g}; give [-1, 1] (for 0..255: images / 127.5 - 1)")


def _only(rows: list[Tensor], verb: str) -> Tensor:
    if len(rows) != 1:
        raise ValueError(f"{verb} takes one image at a time; seen {len(rows)}")
    return rows[0]


def expand_images(patterns: Sequence[str], unused: list[dict[str, str]] | None = None) -> list[str]:
    """Files, folders with their sub-folders, and globs -> image files, in order, each once. Files in folders that are not read go to `unused`.

    Raises:
        ImageError: a pattern that names nothing.
    """
    paths: dict[str, str] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            contents = scan_folder(pattern)
            matches = [str(Path(pattern, name)) for name in contents.images]
            if unused is not None:
                unused += ({**problem, "key": str(Path(pattern, problem["key"]))} for problem in contents.unused)
            if not matches:
                seen = f" ({reasons_in_words(contents.unused)})" if contents.unused else ""
                raise ImageError("missing", f"{pattern} holds no images that are read{seen}; choose one of {', '.join(e[1:] for e in EXTENSIONS)}")
        elif os.path.exists(pattern):
            matches = [pattern]
        else:
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
            if not matches:
                raise ImageError("missing", f"no such image: {pattern}")
        for match in matches:
            paths.setdefault(os.path.abspath(match), match)
    return [*paths.values()]
