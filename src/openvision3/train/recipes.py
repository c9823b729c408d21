"""Each run as a function that returns its config. `openvision3 train RECIPE --field value ...` starts one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from openvision3 import hub
from openvision3.fetch.store import at_hand
from openvision3.model.encoder import EncoderConfig
from openvision3.model.openvision3 import LossConfig, ModelConfig
from openvision3.model.reconstruction import LatentDecoderConfig
from openvision3.model.understanding import CaptionerConfig, TextEncoderConfig
from openvision3.train.config import PretrainConfig
from openvision3.train.optimizer import OptimizerConfig

OURS_SUM, OURS_FINISH = 2, 0.15
"""what won at equal compute (docs/ablations.md, levers): blocks whose sum the tokens are, and the last part of the steps, for the latent decoder alone"""


def small_model(size: str = "mini", decoder: str = "micro", embed_dim: int = 256) -> ModelConfig:
    """A small model for few cores and short captions.

    At this scale the paper's balance of 0.5 to 1 gives reconstruction too little weight (two cross-entropies of 2 to 4 against L1 terms of 0.1 to 0.3):
    omega_rec 4 and tau 0.4 rebuild better and do not hurt understanding. The sum of the last two blocks rebuilds better, too (docs/ablations.md).
    """
    return ModelConfig(
        encoder=EncoderConfig(size, embed_dim=embed_dim, sum_blocks=OURS_SUM),
        latent_decoder=LatentDecoderConfig(decoder),
        text_encoder=TextEncoderConfig(size, positions=32),
        captioner=CaptionerConfig(size, positions=32),
        loss=LossConfig(omega_rec=4.0, omega_und=1.0, tau=0.4),
    )


def mini() -> PretrainConfig:
    """A model of the shipped one's size, in one phase at 128 px; docs/training.md has the two commands that trained the shipped one.

    openvision3 train mini --data openmoji SHARDS --only source=clipart
    Two CPU cores with AMX, about 45 minutes; expected: less than the card in assets/mini/README.md, which is of two phases and more data.
    """
    return PretrainConfig(
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
        decoder_finish=OURS_FINISH,
    )


def tiny() -> PretrainConfig:
    """The smallest run that has every part, for tests and a first look.

    openvision3 train tiny --steps 20
    One CPU core, about ten seconds; expected: the loss falls from 15 to 12, and the images are not worth looking at.
    """
    config = mini()
    config.model = small_model("tiny", "tiny", 64)
    config.size, config.batch, config.steps, config.vocabulary, config.decoder_finish = 64, 8, 20, 512, 0.0
    config.log_every, config.eval_every, config.save_every = 5, 0, 10
    config.optimizer.warmup_steps = 2
    return config


def folder() -> PretrainConfig:
    """Train on your own images: a folder with x.jpg beside x.txt, or with captions.csv.

    openvision3 train folder --data MY_IMAGES --val MY_OTHER_IMAGES [--init mini]
    Two CPU cores and up, about 45 minutes with AMX; expected: depends on the images, watch val/psnr and val/image_to_text_r@1.
    """
    config = mini()
    config.data, config.val = (), ()
    config.families = False  # images of a folder have no families, and --weights orders an epoch too
    return config


def mini_low_res() -> PretrainConfig:
    """The first phase of the mini model, at 64 px: a quarter of the tokens and of the VAE's work.

    openvision3 train mini_low_res --data openmoji SHARDS --only source=clipart
    Two CPU cores without AMX, about 40 minutes; expected on the val emoji: 22 dB at 64 px (docs/training.md draws both phases).
    """
    config = mini()
    config.size, config.steps, config.decoder_finish = 64, 600, 0.0  # a second phase follows, in which the encoder learns again
    return config


def mini_high_res() -> PretrainConfig:
    """The second phase of the mini model, at 128 px from the weights of the first: a tenth of its samples, a third of its learning rate.

    openvision3 train mini_high_res --init runs/mini_low_res --data openmoji SHARDS --only source=clipart
    Two CPU cores without AMX, about 10 minutes; expected on the val emoji: 29 dB.
    """
    config = mini_low_res()
    config.init = "runs/mini_low_res"
    config.size, config.steps, config.decoder_finish = 128, config.steps // 10, OURS_FINISH
    config.optimizer.learning_rate /= 3
    config.optimizer.warmup_steps = 10
    config.eval_every = config.save_every = 50
    return config


def demo_low_res() -> PretrainConfig:
    """The first phase of `openvision3 demo`: mini_low_res for a few minutes on OpenMoji alone.

    openvision3 train demo_low_res --minutes 4
    Two CPU cores, four minutes; expected on the val emoji, without AMX: 19 dB at 64 px.
    """
    config = mini_low_res()
    config.minutes = 4.0
    config.eval_every = config.save_every = 0
    return config


def demo_high_res() -> PretrainConfig:
    """The second phase of `openvision3 demo`: mini_high_res for a minute on OpenMoji alone.

    openvision3 train demo_high_res --init runs/demo_low_res --minutes 1
    Two CPU cores, one minute; expected on the val emoji, without AMX: 24 dB.
    """
    config = mini_high_res()
    config.init, config.minutes = "runs/demo_low_res", 1.0
    config.eval_every = config.save_every = 0
    return config


EPOCH = 1_280_000
"""samples in what the paper calls an epoch"""

BERT = "bert-base-uncased/tokenizer.json"
"""the paper's vocabulary, which `openvision3 fetch bert-base-uncased` downloads"""

LPIPS = ("lpips-vgg/vgg16-397923af.pth", "lpips-vgg/vgg.pth")
"""LPIPS v0.1 on VGG-16: torchvision's backbone and the channel weights, which `openvision3 fetch lpips-vgg` downloads"""


def _paper(encoder: str, decoder: str) -> PretrainConfig:
    """Table 1, low_res, for an encoder and a latent decoder of these sizes."""
    config = PretrainConfig(data=(), val=(), captions=2, sentences=True, caption_keys=("re_caption", "org_caption"), tokenizer=at_hand(BERT))
    config.model = ModelConfig(
        encoder=EncoderConfig(encoder),
        latent_decoder=LatentDecoderConfig(decoder),
        text_encoder=TextEncoderConfig(encoder),
        captioner=CaptionerConfig(encoder),
    )
    if encoder == "L":
        config.model.encoder.embed_dim = 1024
    config.model.vae.name = "black-forest-labs/FLUX.1-schnell"
    config.batch, config.pixel_share, config.workers = 8192, 1.0, 8
    config.steps, config.optimizer = _schedule(config.batch, 4000, 8e-6, 40)
    config.log_every, config.eval_every, config.save_every, config.keep = 50, 5000, 1000, 3
    return config


def _schedule(batch: int, epochs: int, base_rate: float, warmup_epochs: int) -> tuple[int, OptimizerConfig]:
    """Steps, and AdamW with the peak learning rate `base_rate` x batch / 256, as in the authors' code base."""
    return epochs * EPOCH // batch, OptimizerConfig(learning_rate=base_rate * batch / 256, warmup_steps=warmup_epochs * EPOCH // batch)


def _high_res(low_res: Callable[[], PretrainConfig]) -> PretrainConfig:
    """Table 1: high_res changes low_res like this, and starts from its weights. Positions are computed from the size, so the weights fit."""
    config = low_res()
    config.init = f"runs/{low_res.__name__}"
    config.size, config.batch, config.tokenizer = 256, 4096, ""  # the vocabulary is that of --init
    config.steps, config.optimizer = _schedule(config.batch, 400, 4e-7, 20)
    loss = config.model.loss
    loss.lambda_perceptual, loss.perceptual = 0.5, "lpips-vgg"
    loss.lpips_backbone, loss.lpips_linear = map(at_hand, LPIPS)
    return config


def base_low_res() -> PretrainConfig:
    """The paper's pre-training at its own size: B/2 encoder, B/1 latent decoder, 128 px, FLUX.1 VAE, table 1.

    torchrun --nproc-per-node 8 ... -m openvision3 train base_low_res --data SHARDS --val SHARDS --tokenizer bert/tokenizer.json --model.vae.name FLUX_FOLDER
    4000 epochs of 1.28 M samples: about 1,960 H100-hours at 40 % of their peak (31 hours on 64), 740 with cached latents and
    --pixel-share 0.125. On 8 of 80 GB --micro-batch 128 (10.6 days). Another --batch B wants --optimizer.learning-rate 8e-6 x B / 256, and
    --steps and --optimizer.warmup-steps times 8192 / B. Expected after both phases (paper v2; v1 in brackets): PSNR 30.33, rFID 0.187
    (0.216 in its ablation) on ImageNet 256, gFID through RAE 1.87 (1.89), SeedBench in LLaVA-1.5 63.1 (62.4).
    """
    return _paper("B", "B")


def base_high_res() -> PretrainConfig:
    """The paper's fine-tuning: base_low_res at 256 px (--size 224 is the other released size) from its weights.

    torchrun ... -m openvision3 train base_high_res --init runs/base_low_res --data ... (as base_low_res) [--size 224]
    400 epochs: about 760 H100-hours (12 on 64) in --micro-batch 32, which 80 GB hold. Needs the two LPIPS files, or
    --model.loss.perceptual efficientnet. Expected: see base_low_res.
    """
    return _high_res(base_low_res)


def ours_base_low_res() -> PretrainConfig:
    """base_low_res with the sum of the last two blocks as tokens, which rebuilt better at mini scale (docs/ablations.md) and costs nothing.

    torchrun --nproc-per-node 8 ... -m openvision3 train ours_base_low_res --data ... (as base_low_res)
    4000 epochs: as base_low_res, about 1,960 H100-hours. Expected: not run at this size.
    """
    return _ours(base_low_res())


def ours_base_high_res() -> PretrainConfig:
    """base_high_res from ours_base_low_res, with the last 15 % of the steps for the latent decoder alone.

    torchrun ... -m openvision3 train ours_base_high_res --init runs/ours_base_low_res --data ... (as base_low_res)
    400 epochs: about 750 H100-hours in --micro-batch 32, of which the paper's recipe takes 760. Expected: not run at this size.
    """
    config = _ours(_high_res(ours_base_low_res))
    config.decoder_finish = OURS_FINISH
    return config


def _ours(config: PretrainConfig) -> PretrainConfig:
    config.model.encoder.sum_blocks = OURS_SUM
    return config


def large_low_res() -> PretrainConfig:
    """The paper's large model, L/2 encoder and B/1 latent decoder, at 128 px.

    torchrun ... -m openvision3 train large_low_res --data ... (as base_low_res)
    4000 epochs: about 2,660 H100-hours (42 hours on 64). Expected after both phases (paper v2): rFID 0.186 in the ablation of encoder
    sizes, SeedBench in LLaVA-1.5 65.8.
    """
    return _paper("L", "B")


def large_high_res() -> PretrainConfig:
    """large_low_res at 256 px from its weights.

    torchrun ... -m openvision3 train large_high_res --init runs/large_low_res --data ... (as base_low_res)
    400 epochs: about 1,000 H100-hours (16 on 64) in --micro-batch 32. Needs the LPIPS files as base_high_res does. Expected: see large_low_res.
    """
    return _high_res(large_low_res)


def one_gpu_low_res() -> PretrainConfig:
    """ours_base_low_res for one GPU of 80 GB and a day or two: the paper's batch in micro-batches, 100 epochs, an eighth of the pixels.

    openvision3 train one_gpu_low_res --data SHARDS --val SHARDS --tokenizer bert/tokenizer.json --model.vae.name FLUX_FOLDER [--latents CACHE]
    128 M samples: about 27 hours on an H100 at 40 % of its peak, 21 with cached latents. Expected: below the paper's numbers, which took
    forty times the samples.
    """
    return _one_gpu(ours_base_low_res(), 256, 100, 8e-6)


def one_gpu_high_res() -> PretrainConfig:
    """ours_base_high_res for one GPU, from the weights of one_gpu_low_res: 10 epochs.

    openvision3 train one_gpu_high_res --init runs/one_gpu_low_res --data ... (as one_gpu_low_res)
    13 M samples: about 8 hours on an H100. Needs the LPIPS files as base_high_res does. Expected: see one_gpu_low_res.
    """
    config = _one_gpu(_high_res(one_gpu_low_res), 64, 10, 4e-7)
    config.decoder_finish = OURS_FINISH
    return config


def _one_gpu(config: PretrainConfig, micro_batch: int, epochs: int, base_rate: float) -> PretrainConfig:
    config.micro_batch, config.pixel_share = micro_batch, 1 / 8
    config.steps, config.optimizer = _schedule(config.batch, epochs, base_rate, max(1, epochs // 50))
    return config


RECIPES = {
    f.__name__: f
    for f in (
        *(mini, tiny, folder, mini_low_res, mini_high_res, demo_low_res, demo_high_res),
        *(base_low_res, base_high_res, ours_base_low_res, ours_base_high_res, large_low_res, large_high_res, one_gpu_low_res, one_gpu_high_res),
    )
}

IN_TURN = {
    "paper_base": (base_low_res, base_high_res),
    "ours_base": (ours_base_low_res, ours_base_high_res),
    "paper_large": (large_low_res, large_high_res),
    "paper_mini": (mini_low_res, mini_high_res),
    "demo": (demo_low_res, demo_high_res),
    "paper_one_gpu": (one_gpu_low_res, one_gpu_high_res),
}
"""Both phases, the second from the weights of the first: `openvision3 train paper_base`."""


def with_parts_of(config: PretrainConfig) -> PretrainConfig:
    """The recipe with parts of the sizes and kinds that the model of `init` has, so that its weights fit.

    The VAE, the losses and the captioner's share of tokens stay the recipe's; so does everything if that model is not there (yet), which a run says.
    """
    try:
        saved = hub.read_config(hub.find_folder(config.init)).model
    except FileNotFoundError:
        return config
    captioner = replace(saved.captioner, token_share=config.model.captioner.token_share)
    return replace(config, model=replace(saved, vae=config.model.vae, captioner=captioner, loss=config.model.loss))


def kept_at_another_batch(name: str, config: PretrainConfig) -> str:
    """One line that names the recipe's settings which a run keeps though it changes the batch they belong to; "" if there are none."""
    usual = RECIPES[name]() if name in RECIPES else config
    if config.batch == usual.batch:
        return ""
    now, then = config.optimizer, usual.optimizer
    settings = {
        f"learning rate {now.learning_rate:.3g} (--optimizer.learning-rate)": now.learning_rate == then.learning_rate,
        f"warm-up of {now.warmup_steps:,} steps (--optimizer.warmup-steps)": now.warmup_steps == then.warmup_steps,
        f"{config.steps:,} steps (--steps)": config.steps == usual.steps and not config.minutes,
    }
    kept = ", ".join(what for what, is_same in settings.items() if is_same)
    return f"batch {config.batch:,}, while {name} has {usual.batch:,}; these settings are still the recipe's, for its own batch: {kept}" if kept else ""
