"""Every run as a function that returns a config. `openvision3 train RECIPE --field value ...` starts one."""

from __future__ import annotations

from openvision3.config import RunConfig
from openvision3.model.encoder import EncoderConfig
from openvision3.model.openvision3 import LossConfig, ModelConfig
from openvision3.model.reconstruction import LatentDecoderConfig
from openvision3.model.understanding import CaptionerConfig, TextEncoderConfig
from openvision3.optimizer import OptimizerConfig


def small_model(size: str = "mini", decoder: str = "micro", embed_dim: int = 256) -> ModelConfig:
    """A model of ours for few cores and short captions.

    The paper's balance of 0.5 to 1 starves reconstruction at this scale (two cross-entropies of 2 to 4 against L1 terms of
    0.1 to 0.3): omega_rec 4 and tau 0.4 rebuild better without hurting understanding.
    """
    return ModelConfig(
        encoder=EncoderConfig(size, embed_dim=embed_dim),
        latent_decoder=LatentDecoderConfig(decoder),
        text_encoder=TextEncoderConfig(size, positions=32),
        captioner=CaptionerConfig(size, positions=32),
        loss=LossConfig(omega_rec=4.0, omega_und=1.0, tau=0.4),
    )


def mini() -> RunConfig:
    """The model that ships, at 128 px.

    openvision3 train mini --data openmoji SHARDS --only source=clipart
    Two CPU cores with AMX, about 45 minutes; expected: see the card in assets/mini/README.md.
    """
    return RunConfig(
        model=small_model(),
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, warmup_steps=50, weight_decay=0.1),
        captions=2,
        sentences=True,
        aliases=True,
        families=True,
        vocabulary=3072,
        steps=1400,
        batch=64,
        pixel_share=0.25,
    )


def demo() -> RunConfig:
    """The mini model for five minutes on OpenMoji alone: what `openvision3 demo` trains.

    openvision3 train demo --minutes 5
    Two CPU cores; expected: held-out pictures rebuilt recognisably, every third named right among 256.
    """
    config = mini()
    config.minutes = 5.0
    config.eval_every = config.save_every = 0
    return config


def tiny() -> RunConfig:
    """The smallest run with every part in it, for tests and first looks: seconds on one core, learns little.

    openvision3 train tiny --steps 20
    """
    config = mini()
    config.model = small_model("tiny", "tiny", 64)
    config.size, config.batch, config.steps, config.vocabulary = 64, 8, 20, 512
    config.log_every, config.eval_every, config.save_every = 5, 0, 10
    config.optimizer.warmup_steps = 2
    return config


def folder() -> RunConfig:
    """Train on pictures of your own: a folder with x.jpg beside x.txt, or captions.csv.

    openvision3 train folder --data MY_PICTURES --val MY_OTHER_PICTURES [--init mini]
    Two CPU cores and up; expected: depends on the pictures, watch val/psnr and val/image_to_text_r@1.
    """
    config = mini()
    config.data, config.val = (), ()
    return config


def base_low_res() -> RunConfig:
    """The paper's pre-training at its own size: B/2 encoder, B/1 latent decoder, 128 px, FLUX.1 VAE, table 1.

    openvision3 train base_low_res --data SHARDS --val SHARDS --tokenizer bert/tokenizer.json --model.vae.name FLUX_FOLDER
    The whole run is 4000 epochs of 1.28 M samples, about 1,900 H200-hours; expected after both phases (paper v2): PSNR 30.33,
    rFID 0.187 on ImageNet 256. Several devices and accumulation are not there yet: one device holds a smaller --batch only,
    and then --optimizer.learning-rate is 8e-6 x batch / 256.
    """
    config = RunConfig(data=(), val=(), captions=2, sentences=True, caption_keys=("re_caption", "org_caption"))
    config.model.vae.name = "black-forest-labs/FLUX.1-schnell"
    config.batch, config.pixel_share = 8192, 1.0
    config.steps = 4000 * 1_280_000 // config.batch
    config.optimizer = OptimizerConfig(learning_rate=8e-6 * config.batch / 256, warmup_steps=40 * 1_280_000 // config.batch)
    return config


RECIPES = {f.__name__: f for f in (mini, demo, tiny, folder, base_low_res)}
