"""The paper's figure as one class: VAE, encoder, and the two branches that train the tokens together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3 import distributed
from openvision3.model import losses
from openvision3.model.encoder import Encoder, EncoderConfig
from openvision3.model.lengths import by_length
from openvision3.model.reconstruction import LatentDecoder, LatentDecoderConfig, add_noise
from openvision3.model.understanding import Captioner, CaptionerConfig, TextEncoder, TextEncoderConfig, temperature
from openvision3.model.vae import VAE, VAEConfig
from openvision3.settings import PathName, unknown

ROWS, PIXEL_ROWS, WORDS = range(3)
"""Positions in `counts`."""


@dataclass
class LossConfig:
    """Weights of the paper's equations 3 to 5; the defaults are its low_res column."""

    omega_rec: float = 0.5
    """weight of reconstruction"""
    gradient_ratio: float = 0.0
    """norm of reconstruction's gradient on the tokens, as a multiple of understanding's; sets omega_rec in each step, from running means; 0: as given"""
    omega_und: float = 1.0
    """weight of understanding"""
    alpha: float = 1.0
    """weight of the contrastive loss within understanding"""
    beta: float = 0.4
    """weight of the latent L1 within reconstruction"""
    lambda_perceptual: float = 0.0
    """weight of the perceptual distance within reconstruction (high_res: 0.5)"""
    tau: float = 0.8
    """largest noise on the tokens; the strength for an image is drawn from Uniform[0, tau]"""
    equal_captions: Literal["contrast", "ignore"] = "contrast"
    """rows of a batch with the same caption: contrast them, as in the paper; ignore: they are no negatives of each other (classes, drawings in many styles)"""
    encoder_learns_from: Literal["both", "understanding", "reconstruction", "nothing"] = "both"
    """the branch whose gradient reaches the encoder; the other branch trains on detached tokens; nothing: the encoder is frozen"""
    perceptual: Literal["efficientnet", "lpips-vgg", "lpips-alex"] = "efficientnet"
    """feature distance of the perceptual term; LPIPS needs the two files below"""
    lpips_backbone: PathName = ""
    """torchvision's vgg16 or alexnet checkpoint, a local file"""
    lpips_linear: PathName = ""
    """the LPIPS v0.1 channel weights, a local file"""

    def __post_init__(self):
        for name in ("omega_rec", "omega_und", "alpha", "beta", "lambda_perceptual", "tau", "gradient_ratio"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value} must be a finite number that is not negative")
        if self.encoder_learns_from not in ("both", "understanding", "reconstruction", "nothing"):
            raise unknown("encoder_learns_from", str(self.encoder_learns_from), ("both", "understanding", "reconstruction", "nothing"))
        if self.equal_captions not in ("contrast", "ignore"):
            raise unknown("equal_captions", str(self.equal_captions), ("contrast", "ignore"))
        if self.gradient_ratio and not (self.encoder_learns_from == "both" and self.omega_rec and self.omega_und):
            raise ValueError(
                f"gradient_ratio {self.gradient_ratio} compares the gradients of two branches, so both must reach the encoder; "
                "set encoder_learns_from both, and omega_rec and omega_und above 0"
            )
        if self.perceptual not in ("efficientnet", "lpips-vgg", "lpips-alex"):
            raise unknown("perceptual", str(self.perceptual), ("efficientnet", "lpips-vgg", "lpips-alex"))
        if self.lambda_perceptual and self.perceptual != "efficientnet" and not (self.lpips_backbone and self.lpips_linear):
            raise ValueError(f"perceptual {self.perceptual} needs two local files: set lpips_backbone and lpips_linear, or use efficientnet")


@dataclass
class ModelConfig:
    """All parts of the model; saved with its weights."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    latent_decoder: LatentDecoderConfig = field(default_factory=LatentDecoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    loss: LossConfig = field(default_factory=LossConfig)


class OpenVision3(nn.Module):
    """images <-> tokens <-> words. `vae` is frozen; everything else trains from scratch.

    `vocabulary` and `pad_id` come from the text tokenizer. `distance` is the network of the perceptual term (`hub.load_distance`): called
    with (images, images_hat), it returns the mean over rows. It is frozen and never saved, and only training with that term needs it.

    Raises:
        ValueError: the encoder's patch does not make 16-pixel tokens on this VAE, or beta counts the pixel loss twice.
    """

    def __init__(self, config: ModelConfig, vae: VAE, vocabulary: int, pad_id: int = 0, distance: nn.Module | None = None):
        super().__init__()
        if config.encoder.patch * vae.stride != 16:
            raise ValueError(
                f"encoder.patch {config.encoder.patch} on a VAE of stride {vae.stride} spans {config.encoder.patch * vae.stride} pixels, not 16; "
                f"set --model.encoder.patch {max(1, 16 // vae.stride)}"
            )
        if vae.network is None and config.loss.beta:
            raise ValueError(f"without a VAE the latent loss is the pixel loss, and beta {config.loss.beta} would count it again; set --model.loss.beta 0")
        self.config, self.pad_id, self.vocabulary = config, pad_id, vocabulary
        self.vae = vae
        self.encoder = Encoder(config.encoder, vae.latent_channels)
        width = self.encoder.size.width
        self.latent_decoder = LatentDecoder(config.latent_decoder, width, vae.latent_channels, config.encoder.patch)
        self.text_encoder = TextEncoder(config.text_encoder, vocabulary, config.encoder.embed_dim, pad_id)
        self.captioner = Captioner(config.captioner, vocabulary, width)
        self.log_temperature = nn.Parameter(torch.empty(1))
        if config.loss.encoder_learns_from == "nothing":
            for name, parameter in self.encoder.named_parameters():
                parameter.requires_grad_(name.startswith("pool_"))  # the pooling belongs to understanding
        self.omega_rec = config.loss.omega_rec
        """the weight of reconstruction in training; that of evaluations stays as the config has it"""
        self.finishing = False
        """whether training steps train the latent decoder alone: the others are then computed without gradient, or not at all"""
        self._distance = (distance,)  # a tuple keeps it outside the module tree

    def init_weights(self) -> OpenVision3:
        for part in (self.encoder, self.latent_decoder, self.text_encoder, self.captioner):
            part.init_weights()
        nn.init.constant_(self.log_temperature, math.log(1 / 0.07))
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """All parameters but those of the frozen VAE."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("vae.")}

    @property
    def resting(self) -> list[nn.Parameter]:
        """Trained parameters that training steps give no gradient now."""
        return [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("latent_decoder.")] if self.finishing else []

    # -- the figure, box by box ------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens (B, (H/16)(W/16), D)."""
        return self.encoder(self.vae.encode(images))[0]

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens of a (rows, columns) grid -> images (B, 3, 16 rows, 16 columns), not clamped, without noise."""
        return self.vae.decode(self.latent_decoder(tokens, grid).float())

    def embed_images(self, images: Tensor) -> Tensor:
        """images -> unit vectors (B, E)."""
        return F.normalize(self.encoder(self.vae.encode(images))[1].float(), dim=-1)

    def embed_texts(self, text_ids: Tensor) -> Tensor:
        """text_ids (B, T) -> unit vectors (B, E)."""
        return F.normalize(self._embed_ids(text_ids).float(), dim=-1)

    def _embed_ids(self, text_ids: Tensor) -> Tensor:
        return by_length(self.text_encoder, lambda rows, ids: self.text_encoder(ids), text_ids, self.pad_id)

    @property
    def temperature(self) -> Tensor:
        """The factor of cosines before a softmax."""
        return temperature(self.log_temperature)

    # -- one training step -----------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One batch -> (loss, parts), this rank's share of each (see `losses`). The batch is a flat dict:

        - `images` (B, 3, H, W); or `latents` (B, C, h, w) with `pixel_images` (P, 3, H, W), the images of `pixel_rows`;
        - `pixel_rows` (P,): optional, the rows that are decoded for the pixel and perceptual terms. Without it all `images` are
          compared; if `pixel_images` is given without it, none are;
        - `text_ids` (B, K, T) with `text_present` (B, K): captions to contrast. Without text, understanding is left out of the loss;
        - `caption_ids` (B, L): the caption to predict; `word_positions` (M,): optional, the positions of words in the flattened
          `caption_ids[:, 1:]`. Without it the logits of the padding are computed too;
        - `draw_key` (B,): optional, the seed of each row's draws. Without it there is no noise, and the captioner sees all tokens, as in evaluation.

        A micro-batch also has the entries that `prepare` adds. In training with `gradient_ratio` the parts include two numbers that the
        backward pass fills in: the squared norms of the gradients that each branch sends into the tokens.
        """
        weights = self.config.loss
        latents = self._latents(batch)  # (B, C, h, w)
        counts = batch["counts"] if "counts" in batch else distributed.total(self.counts(batch))
        decoder_alone = self.finishing and self.training
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decoder_alone):
            tokens, pooled = self.encoder(latents)  # (B, N, D), (B, E)
        rebuilt_from = tokens if weights.encoder_learns_from in ("both", "reconstruction") else tokens.detach()
        if weights.encoder_learns_from not in ("both", "understanding"):
            tokens = tokens.detach()
            pooled = self.encoder.pool(tokens)
        squares: dict[str, Tensor] = {}
        if weights.gradient_ratio and self.training and tokens.requires_grad:
            rebuilt_from, squares["reconstruction_squares"] = losses.with_gradient_squares(tokens)
            tokens, squares["understanding_squares"] = losses.with_gradient_squares(tokens)
            pooled = self.encoder.pool(tokens)

        noisy = add_noise(rebuilt_from, weights.tau, batch["draw_key"]) if "draw_key" in batch else rebuilt_from
        patch = self.config.encoder.patch
        latents_hat = self.latent_decoder(noisy, (latents.shape[2] // patch, latents.shape[3] // patch))  # (B, C, h, w)
        parts = {"latent": losses.latent_loss(latents, latents_hat, counts[ROWS])}
        if "pixel_rows" in batch or ("pixel_images" not in batch and "images" in batch):
            self._compare_pixels(batch, latents_hat, counts[PIXEL_ROWS], parts)

        if not decoder_alone and "text_ids" in batch:
            parts["contrastive"] = self._contrastive(F.normalize(pooled.float(), dim=-1), batch)
            if "draw_key" in batch and self.config.captioner.token_share < 1:
                tokens = self.captioner.choose_tokens(tokens, batch["draw_key"])
            parts["caption"] = self._caption(tokens, batch, counts[WORDS])
        return self.weigh(parts), {name: value.detach() for name, value in parts.items()} | squares

    def weigh(self, parts: dict[str, Tensor]) -> Tensor:
        """The paper's equations 3 to 5: the loss from its parts; pixel and perceptual may be absent, or the whole of understanding."""
        weights = self.config.loss
        reconstruction = weights.beta * parts["latent"]
        if "perceptual" in parts:
            reconstruction = reconstruction + (parts["pixel"] + weights.lambda_perceptual * parts["perceptual"])
        elif "pixel" in parts:
            reconstruction = reconstruction + parts["pixel"]
        understanding = parts["caption"] + weights.alpha * parts["contrastive"] if "caption" in parts else 0.0
        omega_rec = self.omega_rec if self.training else weights.omega_rec
        return omega_rec * reconstruction + weights.omega_und * understanding

    def _compare_pixels(self, batch: dict[str, Tensor], latents_hat: Tensor, count: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Put the pixel and the perceptual term into `parts` -> (images, images_hat) of the rows that are compared; if there is none, the terms are zero."""
        weights, target = self.config.loss, self._pixel_images(batch)
        names = ("pixel", "perceptual") if weights.lambda_perceptual else ("pixel",)
        parts |= dict.fromkeys(names, latents_hat.new_zeros(()))
        if target is None:
            return None
        chosen = latents_hat[batch["pixel_rows"]] if "pixel_rows" in batch else latents_hat
        images_hat = self.vae.decode(chosen.float())  # (P, 3, H, W)
        parts["pixel"] = losses.pixel_loss(target, images_hat, count)
        if weights.lambda_perceptual:
            (distance,) = self._distance
            if distance is None:
                raise ValueError(f"lambda_perceptual {weights.lambda_perceptual:g} needs a distance: OpenVision3(..., distance=hub.load_distance(config.loss))")
            mean = distance.to(target.device)(target, images_hat).float()
            parts["perceptual"] = distributed.share(mean * len(target), count)
        return target, images_hat

    def prepare(self, batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches of one step, each with what it needs to know of the others, ready for `forward` and backward.

        Losses and gradients of the micro-batches add up to those of the whole batch. A first pass embeds all of them without
        gradient; the contrastive loss over the global batch gives the gradient of each embedding, from which the second pass
        continues (Gao et al. 2021). Only latents are kept, and the images whose pixels are compared.
        """
        kept, images, texts = [], [], []
        with torch.no_grad():
            for batch in batches:
                latents = self._latents(batch)
                small = {name: value for name, value in batch.items() if name != "images"} | {"latents": latents}
                target = self._pixel_images(batch)
                if target is not None:
                    small["pixel_images"] = target.clone()  # a view would keep all images
                    small.setdefault("pixel_rows", torch.arange(len(target), device=target.device))
                kept.append(small)
                if self.finishing:
                    continue
                text_embedding, small["text_present"] = self.embed_captions(batch)
                images.append(F.normalize(self.encoder(latents)[1].float(), dim=-1))
                texts.append(text_embedding)
            counts = distributed.total(torch.stack([self.counts(batch) for batch in kept]).sum(0))
        if self.finishing:
            return [batch | {"counts": counts} for batch in kept]
        image_embedding, text_embedding = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
        log_temperature = distributed.full(self.log_temperature).detach().clone().requires_grad_()
        with torch.enable_grad():
            present = torch.cat([batch["text_present"] for batch in kept])
            hashes = [values for batch in kept if (values := self.text_hash(batch)) is not None]
            loss = losses.contrastive_loss(image_embedding, text_embedding, log_temperature, present, torch.cat(hashes) if hashes else None)
            gradients = torch.autograd.grad(loss, (image_embedding, text_embedding, log_temperature))
        rows = [len(batch["latents"]) for batch in kept]
        split = zip(kept, gradients[0].split(rows), gradients[1].split(rows), strict=True)
        common = {"counts": counts, "temperature_gradient": gradients[2] / len(kept), "contrastive": loss.detach() / len(kept)}
        return [batch | common | {"image_gradient": image, "text_gradient": text} for batch, image, text in split]

    def _latents(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["latents"].float() if "latents" in batch else self.vae.encode(batch["images"])

    @staticmethod
    def _pixel_images(batch: dict[str, Tensor]) -> Tensor | None:
        """The images that are compared, (P, 3, H, W), or None."""
        if "pixel_images" in batch or "images" not in batch:
            target = batch.get("pixel_images")
        else:
            target = batch["images"][batch["pixel_rows"]] if "pixel_rows" in batch else batch["images"]
        if target is not None and not target.is_floating_point():
            raise ValueError(f"images of {target.dtype} cannot be compared; pass floats in [-1, 1], as `data.batches.to_device` returns them")
        return target if target is not None and len(target) else None

    def counts(self, batch: dict[str, Tensor]) -> Tensor:
        """(3,): images, images whose pixels are compared, words to predict."""
        target = self._pixel_images(batch)
        rows = batch["latents"] if "latents" in batch else batch["images"]
        words = (batch["caption_ids"][:, 1:] != self.pad_id).sum() if "caption_ids" in batch else torch.zeros((), dtype=torch.long, device=rows.device)
        return torch.stack([words.new_full((), len(rows)), words.new_full((), 0 if target is None else len(target)), words])

    def embed_captions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> unit vectors (B, K, E) of the captions to contrast, and which of them are present (B, K)."""
        text_ids = batch["text_ids"]  # (B, K, T)
        present = batch.get("text_present", torch.ones(text_ids.shape[:2], dtype=torch.bool, device=text_ids.device))
        return F.normalize(self._embed_ids(text_ids.flatten(0, 1)).float(), dim=-1).unflatten(0, text_ids.shape[:2]), present

    def text_hash(self, batch: dict[str, Tensor]) -> Tensor | None:
        """(B, K), by which the contrastive loss knows equal captions; None where it contrasts them."""
        return losses.hash_texts(batch["text_ids"], self.pad_id) if self.config.loss.equal_captions == "ignore" else None

    def _contrastive(self, image_embedding: Tensor, batch: dict[str, Tensor]) -> Tensor:
        text_embedding, present = self.embed_captions(batch)
        if "image_gradient" not in batch:
            return losses.contrastive_loss(image_embedding, text_embedding, self.log_temperature, present, self.text_hash(batch))
        carried = (image_embedding * batch["image_gradient"]).sum() + (text_embedding * batch["text_gradient"]).sum()
        carried = carried + (self.log_temperature * batch["temperature_gradient"]).sum()
        return batch["contrastive"] + carried - carried.detach()

    def _caption(self, tokens: Tensor, batch: dict[str, Tensor], count: Tensor) -> Tensor:
        targets = batch["caption_ids"][:, 1:].flatten()  # position i predicts word i + 1
        length = batch["caption_ids"].shape[1]

        def features_of(rows: Tensor | slice, ids: Tensor) -> Tensor:
            features = self.captioner.features(tokens[rows], ids)
            return F.pad(features, (0, 0, 0, length - ids.shape[1])) if ids.shape[1] < length else features

        features = by_length(self.captioner, features_of, batch["caption_ids"], self.pad_id)[:, :-1].flatten(0, 1)  # (B (L - 1), W)
        if "word_positions" in batch:  # (M,): no logits for padding. Looking for the words here would wait for the device
            features, targets = features[batch["word_positions"]], targets[batch["word_positions"]]
        else:
            targets = targets.masked_fill(targets == self.pad_id, losses.IGNORED)
        return losses.caption_loss(features, self.captioner.embedding.weight, self.captioner.output_bias, targets, count)
