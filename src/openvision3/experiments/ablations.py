"""The paper's experiments, one function each: it forks the parent, a recipe by name, with one change a fork.

Each docstring is the question, then hypothesis, source (sections and tables of arXiv 2601.15369) and result. `ablate` trains the forks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openvision3.experiments.kinds import SEED, seeded, shift_by_size
from openvision3.model.encoder import SIZES
from openvision3.settings import flat, to_dict
from openvision3.train.recipes import IN_TURN


@dataclass(frozen=True)
class Parent:
    """A recipe by its name, with the fields of the command line."""

    recipe: str
    config: Any
    """of a model; of a generator for the ablations OF_GENERATORS, of a chat model for OF_CHATS"""
    levers: Sequence[str] = ()
    """labels of the forks of `levers` that `levers_together` joins"""
    seed: int = 0
    """one of the seeds: operations are counted for the run of this one"""


@dataclass(frozen=True)
class Fork:
    """The parent with these fields changed, by their names on the command line; one row of a grid."""

    label: str
    changes: dict[str, Any]
    equal_compute: bool = False
    """Train for as many operations as the parent takes, instead of for as many steps."""
    then: dict[str, Any] | None = None
    """A second phase from the weights of the first: what it changes in the first."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as differences of held-out losses between a fork and another."""

    says: str
    fork: str
    other: str
    expected: dict[str, str]
    """{metric: whether the fork's is "lower" or "the same"}"""


@dataclass(frozen=True)
class Grid:
    """The forks that answer a question, and what the paper says of them."""

    forks: Sequence[Fork]
    claims: Sequence[Claim] = ()

    def without_levers(self) -> Grid:
        """The same forks of a parent that has none of WITHOUT_LEVERS, all at the compute of the recipe."""
        return replace(self, forks=[replace(fork, changes=WITHOUT_LEVERS | fork.changes, equal_compute=True) for fork in self.forks])


def synergy(parent: Parent) -> Grid:
    """Does each branch help the other?

    Hypothesis: understanding alone lowers the reconstruction losses, reconstruction alone the caption loss; both together are better than each.
    Source: the paper's figures of one branch alone. The other branch's heads learn on detached tokens, so that its losses can be read.
    Result: not at mini scale, where reconstruction pays for understanding; whether understanding gains is undecided (docs/results.md).
    """
    both, understanding, reconstruction, random = "both", "only understanding", "only reconstruction", "heads on a frozen random encoder"
    learns_from = "model.loss.encoder_learns_from"
    forks = [
        Fork(both, {}),
        Fork(understanding, {learns_from: "understanding"}),
        Fork(reconstruction, {learns_from: "reconstruction"}),
        Fork(random, {learns_from: "nothing"}),
    ]
    rebuilds_better, understands_better = {"val/pixel": "lower", "val/latent": "lower"}, {"val/contrastive": "lower", "val/caption": "lower"}
    helps_captions = {"val/contrastive": "the same", "val/caption": "lower"}
    claims = [
        Claim("Understanding alone lowers the pixel and the latent loss", understanding, random, rebuilds_better),
        Claim("Reconstruction alone hardly moves the contrastive loss and lowers the caption loss a little", reconstruction, random, helps_captions),
        Claim("Both together beat reconstruction alone at reconstruction", both, reconstruction, rebuilds_better),
        Claim("Reconstruction does not hurt understanding", both, understanding, understands_better),
    ]
    return Grid(forks, claims)


def no_vae(parent: Parent) -> Grid:
    """What does the VAE bring?

    Hypothesis: without it the pixels come out closer (PSNR) but look worse (rFID).
    Source: the paper's ablation without the VAE: PSNR 32.82 against 30.33 dB, rFID 0.980 against 0.216, gFID 9.68 against 8.45.
    Result: not measured here. The pixel loss, which costs no decoding without a VAE, then covers every row, as the latent loss does with one.
    """
    pixels = {"model.vae.name": "pixels", "model.encoder.patch": 16, "model.loss.beta": 0.0, "pixel_share": 1.0}
    return Grid([Fork(f"VAE {parent.config.model.vae.name}", {}), Fork("no VAE, pixels", pixels)])


def decoder_size(parent: Parent) -> Grid:
    """How large must the latent decoder be?

    Hypothesis: a size up lowers the pixel loss and leaves the understanding losses alone; two sizes up are unstable.
    Source: the paper's ablation of M/1, B/1 and L/1.
    Result: not measured here. A fork whose loss does not stay finite is named on the page.
    """
    return Grid([Fork(f"latent decoder {size}", {"model.latent_decoder.size": size}) for size in _neighbours(parent.config.model.latent_decoder.size)])


def encoder_size(parent: Parent) -> Grid:
    """What does a larger encoder bring?

    Hypothesis: better understanding at equal reconstruction.
    Source: the paper's B/2 and L/2: rFID 0.187 and 0.186, gFID 8.45 and 8.89, L better in all LLaVA benchmarks but ScienceQA.
    Result: not measured here.
    """
    return Grid([Fork(f"encoder {size}", {"model.encoder.size": size}) for size in _neighbours(parent.config.model.encoder.size)])


def _neighbours(size: str) -> list[str]:
    """One size down, this one, one up: M, B, L of the paper's base."""
    names = list(SIZES)
    place = names.index(size)
    return names[max(0, place - 1) : place + 2]


def balance(parent: Parent) -> Grid:
    """How much of each branch, omega_und : omega_rec?

    Hypothesis: understanding tolerates much more weight on reconstruction than the paper gives it.
    Source: the paper's table says 2 : 1, the article's text 1 : 2; the others are ours.
    Result: at mini scale more weight on reconstruction rebuilds better up to 1 : 20; the recipes of this scale take 1 : 4 (docs/results.md).
    """
    notes = {0.5: "2 : 1 (the paper's table)", 1.0: "1 : 1", 2.0: "1 : 2 (the article's words)", 4.0: "1 : 4", 8.0: "1 : 8", 20.0: "1 : 20"}
    return Grid([Fork(f"und : rec {note}", {"model.loss.omega_rec": rec, "model.loss.omega_und": 1.0}) for rec, note in notes.items()])


def tau(parent: Parent) -> Grid:
    """How much noise on the tokens?

    Hypothesis: noise makes the tokens robust, at some cost of PSNR without noise.
    Source: the paper draws sigma from [0, tau] and gives no tau; RAE (arXiv 2510.11690) takes 0.8.
    Result: not measured on the present split; the recipes of mini scale take 0.4.
    """
    return Grid([Fork(f"tau {strength:g}", {"model.loss.tau": strength}) for strength in (0.0, 0.4, 0.8, 1.2)])


def token_norm(parent: Parent) -> Grid:
    """Do the tokens need a norm at their end?

    Hypothesis: with a LayerNorm tau means the same at any time of training; without it the encoder outgrows the noise.
    Source: ours; the paper is silent, and its released encoders end without a norm.
    Result: not measured here.
    """
    norms = {"tokens end in a LayerNorm": "layernorm", "tokens as they are": "none"}
    return Grid([Fork(label, {"model.encoder.token_norm": norm}) for label, norm in norms.items()])


def pixel_share(parent: Parent) -> Grid:
    """How many images of a batch must be compared pixel by pixel?

    Hypothesis: the latent loss of all rows carries most of the signal, so that a share buys more steps for the same compute.
    Source: ours; the paper decodes all.
    Result: not measured on the present split; the recipes of mini scale take 1/4.
    """
    shares = {1: "all", 2: "1/2", 4: "1/4", 8: "1/8"}
    forks = [Fork(f"pixels of {name}", {"pixel_share": 1 / part}) for part, name in shares.items()]
    return Grid(forks + [Fork(f"pixels of {name}, equal compute", {"pixel_share": 1 / part}, equal_compute=True) for part, name in shares.items()])


def two_phases(parent: Parent) -> Grid:
    """Are low_res and then high_res better than high_res alone for the same compute?

    Hypothesis: ten parts at low resolution and one at high resolution are better than high resolution alone.
    Source: the paper trains 4,000 epochs at 128 px, then 400 at 224 or 256 px; it has no such comparison.
    Result: 26.7 against 22.8 dB for the two phases on the earlier split, one seed (docs/results.md).
    """
    first = Fork(f"{parent.config.size} px", {})
    then, alone = _second_phase(parent)
    forks = [Fork(f"{first.label}, then {then['size']} px", {}, then=then), Fork(f"{then['size']} px alone, equal compute", alone, equal_compute=True)]
    return Grid(forks)


def _second_phase(parent: Parent) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the recipe of the second phase changes in that of the first: (after the first phase, alone). Batch, rate and steps change by ratio after it.

    Raises:
        ValueError: the recipe is no first phase, or the size is set for both phases.
    """
    config = parent.config
    pair = next((pair for pair in IN_TURN.values() if pair[0].__name__ == parent.recipe), None)
    if pair is None:
        first_phases = ", ".join(dict.fromkeys(pair[0].__name__ for pair in IN_TURN.values()))
        raise ValueError(f"recipe {parent.recipe} is no first phase; choose one of {first_phases}")
    low, high, own = (flat(to_dict(each)) for each in (pair[0](), pair[1](), config))
    ratios = ("batch", "optimizer.learning_rate")
    alone = {name: high[name] for name in high if high[name] != low[name] == own[name] and name not in (*ratios, *SCHEDULE)}
    if "size" not in alone:
        raise ValueError(f"size {config.size} is set for both phases, but the second differs from the first in its size; leave --size out")
    then = alone | {name: type(own[name])(own[name] * high[name] / low[name]) for name in ratios}
    then["steps"] = max(1, round(config.steps * high["steps"] / low["steps"]))
    return then, alone


WITHOUT_LEVERS = {"model.encoder.sum_blocks": 1, "decoder_finish": 0.0}
"""turns off the levers that our own recipes use"""


def levers(parent: Parent) -> Grid:
    """Which change beats the recipe at equal compute?

    Hypothesis: the gradient ratio, the sum of blocks, averaged weights and a finish of the decoder alone rebuild better; few tokens for
    the captioner, rope and QK-norm, and equal captions that are no negatives understand better; each at no loss elsewhere.
    Source: QLIP 2502.05178 (balance), RAEv2 2605.18324 (sum of blocks), 2411.18704 (averaged weights), OpenVision 2 2509.01644 (few tokens for the
    captioner), ViTok 2501.09755 (decoder alone), 2403.13298 (rope), UniCL 2204.03610 (equal captions); at their scales.
    Result: at mini scale the sum of two blocks (+0.24 dB) and the decoder alone at the end (+0.31 dB) win and lose nothing; a gradient ratio of 3
    wins 1.7 dB and loses understanding; the others lose reconstruction or drawability, or win nothing (docs/ablations.md).
    """
    forks = [Fork(f"gradient ratio {ratio:g}", {"model.loss.gradient_ratio": ratio}) for ratio in (0.3, 1.0, 3.0)]
    forks += [Fork(f"sum of the last {count} blocks", {"model.encoder.sum_blocks": count}) for count in (2, 3)]
    decay = max(0.9, min(0.9999, 1 - 10 / max(1, parent.config.steps)))  # an average over a tenth of the run
    rope = {f"model.{part}.{field}": value for part in ("encoder", "latent_decoder") for field, value in (("positions", "rope"), ("qk_norm", True))}
    forks += [
        Fork("averaged weights", {"ema": round(decay, 4)}),
        Fork("captioner sees 35 % of the tokens", {"model.captioner.token_share": 0.35}),
        Fork("decoder alone at the end", {"decoder_finish": 0.15}),
        Fork("rope and QK-norm", rope),
        Fork("equal captions are no negatives", {"model.loss.equal_captions": "ignore"}),
    ]
    return Grid([Fork("parent", {}), *forks]).without_levers()


def levers_together(parent: Parent) -> Grid:
    """Do all kept levers together beat the recipe at equal compute?

    Hypothesis: the levers combine.
    Source: ours; the levers are those that `levers` keeps in the same folder, or those that --levers names.
    Result: at mini scale +0.53 dB, understanding unchanged, tokens 0.7 % harder to draw (docs/ablations.md).
    """
    by_label = {fork.label: fork for fork in levers(parent).forks}
    changes = {name: value for label in parent.levers for name, value in by_label[label].changes.items() if (name, value) not in WITHOUT_LEVERS.items()}
    return Grid([Fork("parent", {}), *([Fork(" + ".join(parent.levers), changes)] if changes else [])]).without_levers()


# -- of a generator --------------------------------------------------------------------------------------------------


def spaces(parent: Parent) -> Grid:
    """Which tokens are the best space to draw in?

    Hypothesis: those that both branches have trained.
    Source: the paper's generation table and its ablations; RAE (arXiv 2510.11690). --tokens names the runs of `both` in a grid of `synergy`,
    as in runs/ablate/base/seed-{seed}; its other forks lie beside them, and each seed draws in the models of that seed.
    Result: undecided at mini scale: no difference of KID is significant at 64 px (38,400 samples) or 128 px (19,200; docs/generation.md).
    """
    return Grid([*_of_synergy(parent, "tokens"), Fork("the VAE's latents", {"tokens": "vae:embedded"}, equal_compute=True)])


def _of_synergy(parent: Parent, field: str) -> list[Fork]:
    """A fork for each fork of `synergy`, by the field that names a model: the parent names those of both branches, with {seed} for the seed."""
    both = Path(getattr(parent.config, field))
    if both.parts[-2:] != ("base", f"seed-{SEED}"):
        raise ValueError(f"{field} {both}: name the runs of an ablation synergy in --{field}, such as runs/ablate/base/seed-{SEED}")
    others = {"only understanding": "understanding", "only reconstruction": "reconstruction", "a frozen random encoder": "nothing"}
    forks = [Fork(name, {field: str(both.parents[1] / f"encoder_learns_from={who}" / both.name)}) for name, who in others.items()]
    return [Fork("both branches", {}), *forks]


def dit_head(parent: Parent) -> Grid:
    """Does the wide head pay?

    Hypothesis: a shallow, wide head reaches a lower loss for the same compute.
    Source: RAE, DiT^DH against DiT.
    Result: at mini scale no head wins, for the third more steps that it leaves (docs/generation.md); the small recipes have none.
    """
    if parent.config.dit.head_depth:  # type: ignore[union-attr]  # its parents are generators
        return Grid([Fork("with the wide head", {}), Fork("no head", {"dit.head_depth": 0}, equal_compute=True)])
    return Grid([Fork("no head", {}), Fork("with the wide head", {"dit.head_depth": 2}, equal_compute=True)])


def time_shift(parent: Parent) -> Grid:
    """Must times be shifted towards noise?

    Hypothesis: tokens of many values need more noise.
    Source: RAE, section on the dimension-dependent schedule. It needs more than 4,096 values an image, as 128 px have here (--size 128).
    Result: undecided at mini scale (docs/generation.md).
    """
    if shift_by_size(seeded(parent.config, parent.seed)) == 1:  # type: ignore[arg-type]  # its parents are generators
        raise ValueError(f"size {parent.config.size}: images of so few values are not shifted, so both forks would be the same; choose a larger --size")
    return Grid([Fork("times shifted by size", {"flow.shift": 0.0}), Fork("times not shifted", {"flow.shift": 1.0})])


def token_statistics(parent: Parent) -> Grid:
    """Must tokens be normalised?

    Hypothesis: noise of one variance fits only values of one variance.
    Source: RAE normalises tokens by channel and position.
    Result: at mini scale tokens as they are win (docs/generation.md); the small recipes take them.
    """
    if parent.config.statistics:  # type: ignore[union-attr]  # its parents are generators
        return Grid([Fork("normalised tokens", {}), Fork("tokens as they are", {"statistics": 0})])
    return Grid([Fork("tokens as they are", {}), Fork("normalised tokens", {"statistics": 50_000})])


def prediction(parent: Parent) -> Grid:
    """Clean tokens or the velocity?

    Hypothesis: where a token is wider than the network, clean tokens are the easier target.
    Source: RAE and the paper predict the velocity; arXiv 2511.13720 and 2605.27102 clean values. The loss is that of the velocity for both.
    Result: at mini scale clean tokens win (docs/generation.md).
    """
    return Grid([Fork(f"predicts the {what}", {"flow.predict": what}) for what in ("tokens", "velocity")])


def word_reading(parent: Parent) -> Grid:
    """How should tokens read words?

    Hypothesis: an attention of their own reads words better than one that they share with the tokens, and costs more.
    Source: ours; the paper draws classes alone.
    Result: undecided at mini scale (docs/generation.md); further keys cost less.
    """
    if parent.config.condition != "text":
        raise ValueError(f"condition {parent.config.condition}: word_reading needs a recipe that draws from texts, such as drawings_dit_tiny")
    return Grid([Fork("words as further keys", {"dit.words": "keys"}), Fork("an attention for words", {"dit.words": "cross"}, equal_compute=True)])


# -- of a chat model -------------------------------------------------------------------------------------------------


def towers(parent: Parent) -> Grid:
    """Through which encoder does a language model answer best?

    Hypothesis: through one that both branches have trained.
    Source: the paper's tables of LLaVA-1.5 and LLaVA-NeXT. --tower names the runs of `both` in a grid of `synergy`, as --tokens does for `spaces`.
    Result: at mini scale both branches answer better than reconstruction alone (+3.8 points); understanding alone is undecided (docs/results.md).
    """
    if parent.config.init:
        raise ValueError(f"init {parent.config.init}: a projector fits the tower that it was trained with; leave out --init")
    return Grid(_of_synergy(parent, "tower"))


SCHEDULE = ("steps", "minutes", "init", "out", "tokenizer", "optimizer.warmup_steps", "eval_every", "save_every", "log_every", "keep", "keep_best")
"""Fields of a phase that follow from the length and place of a run, and are set for each fork anew."""

_OF_MODELS = (synergy, no_vae, decoder_size, encoder_size, balance, tau, token_norm, pixel_share, two_phases, levers, levers_together)
_OF_GENERATORS = (spaces, dit_head, time_shift, token_statistics, prediction, word_reading)
_OF_CHATS = (towers,)
ABLATIONS: dict[str, Callable[[Parent], Grid]] = {ablation.__name__: ablation for ablation in (*_OF_MODELS, *_OF_GENERATORS, *_OF_CHATS)}
OF_GENERATORS = tuple(ablation.__name__ for ablation in _OF_GENERATORS)
"""those that fork a generator"""
OF_CHATS = tuple(ablation.__name__ for ablation in _OF_CHATS)
"""those that fork a chat model"""


def question(name: str) -> str:
    """What the ablation asks: the first line of its docstring."""
    return (ABLATIONS[name].__doc__ or "").partition("\n")[0]
