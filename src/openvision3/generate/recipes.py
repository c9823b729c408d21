"""Each training of a generator as a function that returns its config. `openvision3 train RECIPE --field value ...` starts one."""

from __future__ import annotations

from openvision3.generate.config import GenerateConfig
from openvision3.generate.dit import dit_config
from openvision3.generate.flow import FlowConfig
from openvision3.train.optimizer import OptimizerConfig

IMAGENET = 1_281_167
"""images of ImageNet's training set"""


def drawings_dit_tiny() -> GenerateConfig:
    """Draw small drawings from words, in the tokens of the shipped mini, at 64 px.

    openvision3 train drawings_dit_tiny --data openmoji 'drawings/*-train-*.tar' --caption-keys caption captions
    One CPU core with bf16 instructions, about 120 minutes from cached latents (docs/generation.md). Predicts clean tokens (arXiv 2605.27102) as they are,
    without a wide head, with Muon: what won in short runs. Then --size 128 --init runs/drawings_dit_tiny. The shipped generator has the head and normalised
    tokens: --init drawings --dit.head-depth 2 --statistics 50000 trains it further. Expected: drawings as in assets/generators/drawings/README.md.
    """
    return GenerateConfig(
        dit=dit_config("tiny", head=False, qk_norm=True),
        statistics=0,
        flow=FlowConfig(predict="tokens"),
        aliases=True,
        family_balance=0.5,
        size=64,
        crop_area=(1.0, 1.0),
        batch=256,
        steps=4300,
        ema=0.998,
        optimizer=OptimizerConfig(kind="muon", learning_rate=2e-3, warmup_steps=200, weight_decay=0.0),
        eval_every=250,
        save_every=100,
    )


def dit_tiny() -> GenerateConfig:
    """Draw images of classes at 64 px, on two cores.

    openvision3 train dit_tiny --data IMAGES --val OTHER_IMAGES [--label-key category]
    Classes are sub-folders, .cls members or a field. One CPU core with bf16 instructions, about 40 minutes from cached latents (see
    drawings_dit_tiny); expected: depends on the images, watch val/loss and the sheets.
    """
    config = drawings_dit_tiny()
    config.data, config.val = (), ()
    config.condition, config.aliases, config.family_balance = "label", False, 0.0
    config.batch, config.steps = 128, 2000
    return config


def _imagenet(size: str, batch: int) -> GenerateConfig:
    """RAE's protocol (arXiv 2510.11690): 80 epochs, AdamW 2e-4 without decay, averaged weights, velocity, images of 256 px.

    Its public schedule falls linearly from epoch 40 to epoch 800: by 5 % at epoch 80, and not at all here.
    """
    return GenerateConfig(
        tokens="runs/base_high_res",
        condition="label",
        data=(),
        val=(),
        size=256,
        crop_area=(1.0, 1.0),
        mirror=0.5,
        dit=dit_config(size),
        batch=batch,
        steps=80 * IMAGENET // batch,
        ema=0.9995,
        optimizer=OptimizerConfig(learning_rate=2e-4 * batch / 1024, warmup_steps=0, schedule="flat", weight_decay=0.0),
        workers=8,
        log_every=50,
        eval_every=5000,
        save_every=2500,
    )


def imagenet_dit_xl() -> GenerateConfig:
    """The paper's generator: DiT-XL with the wide head on ImageNet at 256 px, 80 epochs of batch 1024.

    torchrun --nproc-per-node 8 ... -m openvision3 train imagenet_dit_xl --data 'imagenet/train/*.tar' --val 'imagenet/val/*.tar' --classes NAMES
    --tokens names the model whose tokens are drawn. 80 epochs: about 93 H100-hours at 40 % of their peak, 73 with cached latents (42 GB a view); on 8 of them
    in --micro-batch 64, which 80 GB hold. Expected, of the paper: gFID 1.87 (guided, kind and strength not published).
    """
    return _imagenet("XL", 1024)


def imagenet_dit_b() -> GenerateConfig:
    """DiT-B with the wide head on ImageNet at 256 px, 80 epochs of batch 1024: about half of the cost of XL.

    torchrun --nproc-per-node 8 ... -m openvision3 train imagenet_dit_b --data ... (as imagenet_dit_xl)
    80 epochs: about 51 H100-hours at 40 % of their peak, 32 with cached latents. Expected: not published for these tokens.
    """
    return _imagenet("B", 1024)


def one_gpu_dit_b() -> GenerateConfig:
    """imagenet_dit_b for one GPU of 24 GB: batch 256 in micro-batches of 32, with cached latents if --latents names some.

    openvision3 train one_gpu_dit_b --data ... (as imagenet_dit_xl) [--latents CACHE]
    80 epochs: about 51 H100-hours at 40 % of their peak, 32 with cached latents; on a 4090 307 and 189. Expected: as imagenet_dit_b.
    """
    config = _imagenet("B", 256)
    config.micro_batch = 32
    return config


RECIPES = {f.__name__: f for f in (drawings_dit_tiny, dit_tiny, imagenet_dit_xl, imagenet_dit_b, one_gpu_dit_b)}
