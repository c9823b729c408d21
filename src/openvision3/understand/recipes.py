"""Each training of a chat model as a function that returns its config. `openvision3 train RECIPE --field value ...` starts one."""

from __future__ import annotations

from openvision3.train.optimizer import OptimizerConfig
from openvision3.understand.config import LlavaConfig

ALIGNED, INSTRUCTED, INSTRUCTED_NEXT = 558_128, 665_298, 779_289
"""conversations of LLaVA-Pretrain (LLaVA-558K), llava_v1_5_mix665k and LLaVA-NeXT-Data"""
WARMUP = 0.03
"""share of the steps over which the learning rate rises"""


def _published(samples: int, batch: int, rate: float) -> LlavaConfig:
    """LLaVA-1.5's settings (arXiv 2310.03744, table 9): one epoch, AdamW without decay, cosine, warm-up of 3 %, bf16, 2048 tokens."""
    steps = samples // batch
    return LlavaConfig(
        tower="runs/base_high_res",
        language="lmsys/vicuna-7b-v1.5",
        template="vicuna",
        batch=batch,
        steps=steps,
        precision="bf16",
        checkpointing=True,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=round(WARMUP * steps), beta2=0.999, weight_decay=0.0),
        workers=8,
        eval_every=0,
        save_every=500,
    )


def llava15_align() -> LlavaConfig:
    """LLaVA-1.5, first phase: the projector alone learns, on LLaVA-558K, one epoch of batch 256.

    torchrun --nproc-per-node 8 -m openvision3 train llava15_align --data blip_laion_cc_sbu_558k.json --images images.zip --tower MODEL
    Questions are left out (template plain). Costs: openvision3 estimate llava15_align --gpus 8xh100; expected: not measured here.
    """
    config = _published(ALIGNED, 256, 1e-3)
    config.template = "plain"
    return config


def llava15_instruct() -> LlavaConfig:
    """LLaVA-1.5, second phase: projector and language model learn, on the mix of 665K conversations, one epoch of batch 128.

    torchrun --nproc-per-node 8 -m openvision3 train llava15_instruct --data llava_v1_5_mix665k.json --images FOLDERS --init runs/llava15_align
    The tower stays frozen. Costs: openvision3 estimate llava15_instruct --gpus 8xh100; expected: not measured here.
    """
    config = _published(INSTRUCTED, 128, 2e-5)
    config.train_language, config.init = "full", "runs/llava15_align"
    return config


def llava_next_align() -> LlavaConfig:
    """LLaVA-NeXT, first phase: as llava15_align, without tiles.

    torchrun --nproc-per-node 8 -m openvision3 train llava_next_align --data blip_laion_cc_sbu_558k.json --images images.zip --tower MODEL
    """
    return llava15_align()


def llava_next_instruct() -> LlavaConfig:
    """LLaVA-NeXT, second phase: images are seen whole and in up to four tiles; projector and language model learn on 779K conversations.

    torchrun --nproc-per-node 8 -m openvision3 train llava_next_instruct --data LLAVA_NEXT.json --images FOLDERS --init runs/llava_next_align
    LLaVA-NeXT itself trains the tower too, at a tenth of the rate; here it stays frozen, as the measure of an encoder needs it. A conversation has up
    to 4096 tokens.
    """
    config = _published(INSTRUCTED_NEXT, 128, 2e-5)
    config.train_language, config.init = "full", "runs/llava_next_align"
    config.anyres, config.length = True, 4096
    return config


def chat_align() -> LlavaConfig:
    """A projector alone on two cores, between the shipped mini and SmolLM2-135M: it begins at the words of the answers and learns on.

    openvision3 train chat_align --data conversations.json --val held_out.json
    Images of 64 px are 16 tokens: a conversation of two questions takes 40 GFLOP, and most of that is its text. About 30 minutes on one core with bf16
    instructions. At a rate of 2e-3 the projector's tokens grew to 24 times the size of words, and the language model could not see them.
    """
    return LlavaConfig(
        size=64,
        begin="words",
        length=192,
        batch=16,
        steps=300,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=15, beta2=0.99, weight_decay=0.0),
        log_every=10,
        eval_every=0,
        save_every=50,
    )


def chat_instruct() -> LlavaConfig:
    """A small chat model on two cores: projector and low-rank additions to SmolLM2-135M (LoRA) learn. The shipped one was trained so.

    openvision3 train chat_instruct --data conversations.json --val held_out.json
    The projector begins at the words of the answers, so that no first phase is needed. About 35 minutes on one core with bf16 instructions.
    """
    config = chat_align()
    config.train_language = "lora"
    config.batch, config.steps, config.optimizer.warmup_steps = 8, 800, 25
    return config


RECIPES = {recipe.__name__: recipe for recipe in (chat_align, chat_instruct, llava15_align, llava15_instruct, llava_next_align, llava_next_instruct)}
