"""A training of the latent decoder of a finished model on noisy tokens, as a build of `train_run`: pre-training with all other parts frozen."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3 import hub
from openvision3.data.familiarity import FILE as FAMILIARITY
from openvision3.data.familiarity import Familiarity
from openvision3.data.text import TextTokenizer
from openvision3.files import write_whole
from openvision3.model.openvision3 import ModelConfig, OpenVision3
from openvision3.model.vae import VAE
from openvision3.networks.discriminator import FeatureDiscriminator
from openvision3.train.adversarial import ADVERSARIAL, REBUILDING, SQUARES, Stage
from openvision3.train.checkpoint import RunState
from openvision3.train.decoder_config import DecoderConfig
from openvision3.train.optimizer import Optimizers
from openvision3.train.pretrain import Pretraining
from openvision3.train.released import is_released, start_from
from openvision3.train.run import Outcome, Start, train_run
from openvision3.train.run_folder import RunFolder
from openvision3.train.signals import Signals


def train_decoder(config: DecoderConfig, recipe: str = "latent_decoder", signals: Signals | None = None) -> Outcome[DecoderTraining]:
    """Train the latent decoder of the model that `config.init` names, see `train_run`; `recipe` names the run."""
    return train_run(config, functools.partial(DecoderTraining, recipe=recipe), Path(config.out or f"runs/{recipe}"), signals)


class NoisyDecoding(OpenVision3):
    """OpenVision 3 of which only the latent decoder trains, and the heads of a discriminator, if there is one; they are not part of the model.

    Both players share one loss and one backward pass, because the gradient of each term reaches one of them alone (see `FeatureDiscriminator`).
    """

    def __init__(
        self,
        config: ModelConfig,
        vae: VAE,
        vocabulary: int,
        pad_id: int = 0,
        distance: torch.nn.Module | None = None,
        discriminator: FeatureDiscriminator | None = None,
    ):
        super().__init__(config, vae, vocabulary, pad_id, distance)
        self.requires_grad_(False)
        self.latent_decoder.requires_grad_(True)
        self.discriminator = discriminator
        self.finishing = True
        self.discriminating = False
        """whether the discriminator learns"""
        self.adversarial_factor = 0.0
        """what the adversarial loss is multiplied by in the next step"""
        self.measuring = False
        """whether the next step measures the gradients on the rebuilt latents"""

    def trained_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in super().trained_state().items() if not name.startswith("discriminator.")}

    @property
    def resting(self) -> list[torch.nn.Parameter]:
        return []

    def _compare_pixels(self, batch: dict[str, Tensor], latents_hat: Tensor, count: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        compared = super()._compare_pixels(batch, latents_hat, count, parts)
        if self.discriminator is None or not (self.training and self.discriminating):
            return compared
        terms = {REBUILDING: super().weigh(parts)}
        if compared is None:
            parts["discriminator"], parts["adversarial"] = self.discriminator.idle(), latents_hat.new_zeros(())
        else:
            parts["discriminator"], parts["adversarial"] = self.discriminator(*compared, count)
            terms[ADVERSARIAL] = parts["adversarial"]
        if self.measuring and torch.is_grad_enabled():
            for norm, part in SQUARES.items():  # of the gradients on the rows of the latents, so that squares add up over micro-batches and ranks
                gradients = torch.autograd.grad(terms[norm], latents_hat, retain_graph=True) if norm in terms else ()
                parts[part] = sum((gradient.float().square().sum() for gradient in gradients), latents_hat.new_zeros(()))
        return compared

    def weigh(self, parts: dict[str, Tensor]) -> Tensor:
        loss = super().weigh(parts)
        if self.discriminator is None or not self.training:
            return loss
        if "discriminator" not in parts:  # without a gradient in any step, its optimiser would have no state, and a checkpoint could not be loaded
            return loss + self.discriminator.idle()
        loss = loss + parts["discriminator"]
        return loss + self.adversarial_factor * parts["adversarial"] if self.adversarial_factor else loss


class DecoderTraining(Pretraining):
    """A finished model whose latent decoder is trained on, with data, evaluation and export as in pre-training."""

    config: DecoderConfig
    model: NoisyDecoding
    run: RunFolder
    reads_texts = False

    def __init__(self, config: DecoderConfig, start: Start, *, recipe: str = "latent_decoder"):
        super().__init__(config, start, recipe=recipe)
        self.noise = config.noise

    def create_model(self, vae: VAE, tokenizer: TextTokenizer) -> NoisyDecoding:
        config = self.config
        distance = hub.load_distance(config.model.loss)
        torch.manual_seed(config.seed)  # the heads of the discriminator depend on it
        discriminator = FeatureDiscriminator() if config.adversarial.weight else None
        return NoisyDecoding(config.model, vae, len(tokenizer), tokenizer.pad_id, distance, discriminator).init_weights()  # type: ignore[return-value]

    def start_from_init(self) -> None:
        if is_released(self.config.init):
            start_from(self.model, self.config.init)
        else:
            super().start_from_init()

    def begin(self, run: RunFolder) -> None:
        super().begin(run)
        self.run = run
        stage = Stage(self.config.adversarial, self.config.steps, {})
        run.say(f"only the latent decoder of {self.config.init} trains, on tokens with noise up to {self.config.model.loss.tau:g}")
        if self.config.adversarial.weight:
            run.say(f"a discriminator learns beside it; the latent decoder learns to deceive it from step {stage.join} on")
        if run.writes:
            self._keep_calibration(run.path / FAMILIARITY)

    def _keep_calibration(self, kept: Path) -> None:
        """What the calibration was measured on, the encoder and the captioner, does not change. The run has a copy: the first model may move."""
        config = self.config
        if not config.resume and not is_released(config.init) and (source := hub.find_folder(config.init) / FAMILIARITY).is_file():
            write_whole(kept, source.read_bytes())
        if kept.is_file():
            self.pipeline.familiarity = Familiarity.load(kept)

    def before_step(self, state: RunState, optimizers: Optimizers) -> None:
        super().before_step(state, optimizers)
        stage = Stage(self.config.adversarial, self.config.steps, state.memory)
        if stage.runs and (reason := stage.diverged(state.skipped_in_a_row)):
            stage.end(state.step)
            self.run.say(f"step {state.step}: {reason}; training continues without the discriminator")
        self.model.discriminating, self.model.measuring = stage.runs, stage.measures(state.step)
        self.model.adversarial_factor = stage.factor(state.step)

    def after_step(self, state: RunState, values: dict[str, float]) -> None:
        if self.model.discriminating:
            loss = self.config.model.loss
            reconstruction = values["pixel"] + loss.beta * values["latent"] + loss.lambda_perceptual * values.get("perceptual", 0.0)
            stage = Stage(self.config.adversarial, self.config.steps, state.memory)
            stage.remember(state.step - 1, values, reconstruction, self.start.ranks.world)
            values["adversarial_factor"] = self.model.adversarial_factor

    def export(self, folder: Path, weights: dict[str, Tensor], state: RunState) -> None:
        super().export(folder, {name: value for name, value in weights.items() if not name.startswith("discriminator.")}, state)
        if self.pipeline.familiarity is not None:
            shutil.copyfile(self.start.out / FAMILIARITY, folder / FAMILIARITY)

    def _record(self, state: RunState) -> dict[str, Any]:
        adversarial = Stage(self.config.adversarial, self.config.steps, state.memory).record(state.step)
        record = super()._record(state) | {"trained": "the latent decoder alone", "tau": self.config.model.loss.tau}
        if self.untrained:
            record["untrained"] = list(self.untrained)
        return record | ({"adversarial": adversarial} if adversarial else {})
