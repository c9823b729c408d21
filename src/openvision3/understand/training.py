"""The training of a chat model: its data, evaluation and export, as a build of `train_run`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from openvision3 import distributed, hub
from openvision3.data.batches import to_device
from openvision3.data.identity import digest
from openvision3.data.images import ImageError
from openvision3.data.order import Shuffle
from openvision3.data.problems import Problems
from openvision3.device import dtype_of
from openvision3.files import write_whole
from openvision3.model.losses import CHUNK
from openvision3.progress import track
from openvision3.train.checkpoint import RunState
from openvision3.train.loop import Training
from openvision3.train.run import Outcome, Start, train_run
from openvision3.train.run_folder import RunFolder
from openvision3.train.signals import Signals
from openvision3.understand import folder
from openvision3.understand.batches import ConversationBatches, Example, collate, read_example
from openvision3.understand.config import LlavaConfig
from openvision3.understand.conversations import Conversations, check_file
from openvision3.understand.folder import ChatConfig
from openvision3.understand.language import language_sha256, open_language
from openvision3.understand.llava import Llava, connect, trained_tensors
from openvision3.understand.prompts import Prompts
from openvision3.understand.tiles import ImageLayout
from openvision3.understand.words import EXAMPLES, begin_with_words

EVALUATED = 256
"""most held-out conversations that an evaluation during training looks at"""
ROWS = 8
"""conversations computed at a time; no number depends on it"""
SHOWN = 16
"""answers that an evaluation writes down"""


def train_chat(config: LlavaConfig, recipe: str = "chat", signals: Signals | None = None) -> Outcome[Talking]:
    """Train a chat model as `config` says, see `train_run`; `recipe` names the run."""
    return train_run(config, functools.partial(Talking, recipe=recipe), Path(config.out or f"runs/{recipe}"), signals)


def check_conversations(config: LlavaConfig) -> None:
    """Raises ValueError for no conversations, FileNotFoundError for a file that is not there."""
    if not config.data:
        raise ValueError("data is empty: name conversations with --data, a .json or .jsonl file in LLaVA's layout")
    for name in (*config.data, *config.val):
        check_file(Path(name))


class Talking(Training):
    """Tower, projector and language model, their conversations and their held-out ones, opened as `config` says."""

    model: Llava
    batches: ConversationBatches

    def __init__(self, config: LlavaConfig, start: Start, *, recipe: str = "chat"):
        self.config, self.start, self.recipe = config, start, recipe
        check_conversations(config)
        self.conversations = Conversations(config.data, config.images)
        self.held_out = Conversations(config.val, config.images) if config.val else None
        if shared := set(self.conversations.sha256) & set(self.held_out.sha256 if self.held_out else ()):
            name = config.data[self.conversations.sha256.index(shared.pop())]
            raise ValueError(f"--val and --data share {name}: evaluate on conversations that are not trained on")
        pipeline = folder.open_tower(config.tower, start.precision)
        config.size = config.size or pipeline.size
        full = config.train_language == "full"
        language, tokenizer = open_language(config.language, torch.float32 if full else dtype_of(start.precision))
        self.prompts = Prompts(tokenizer, config.template, config.length)
        config.template = self.prompts.template  # type: ignore[assignment]
        self.layout = ImageLayout(config.size, config.anyres)
        self.sha256 = ("", "")
        if start.ranks.rank == 0:  # the files of a large language model are read once
            self.sha256 = hub.weights_sha256(hub.find_folder(config.tower)), language_sha256(config.language)
        start.check_inputs(config, self._identities)
        network = connect(config, pipeline, language, self.prompts, config.seed)
        self.begun = ""
        if not start.checkpoint and start.ranks.rank == 0:  # the first rank's weights are sent to all
            if config.init:
                self.begun = folder.start_from(network, config.init, self._record(RunState()))
            elif config.begin == "words":
                self.begun = self._begin_with_words(network)
        if config.checkpointing and not full:
            _checkpoint_blocks(network.model.language_model)
        self.model = Llava(network)
        self.batches = ConversationBatches(
            self.conversations,
            self.prompts,
            self.layout,
            config.seed,
            config.batch,
            config.micro_batch,
            ranks=start.ranks,
            workers=config.workers,
            pinned=start.device == "cuda",
            stopping=start.stopping,
        )
        self.batches.check_room(start.ranks.local_world)
        self.facts = {
            "conversations": (len(self.conversations), *self.conversations.sha256),
            "held-out conversations": len(self.held_out or ()),
            "trained tensors": digest([(name, tuple(value.shape)) for name, value in trained_tensors(network).items()]),
        }

    def _begin_with_words(self, network: Any) -> str:
        order = Shuffle(len(self.conversations), self.config.seed, 0)
        examples = []
        for place in track(range(min(EXAMPLES, len(self.conversations))), "reading conversations for the projector"):
            with contextlib.suppress(ImageError):  # counted when the run comes to it
                examples.append(read_example(self.conversations, order.place(place)[0], self.prompts, self.layout))
        explained = begin_with_words(network, examples, self.config.layer)
        if explained is None:
            return f"the projector begins at random: fewer than two of {len(examples):,} conversations are about one image"
        return f"the projector begins as a guess of the words of answers, fitted to {len(examples):,} conversations: {explained:.0%} of their variance"

    def begin(self, run: RunFolder) -> None:
        config = self.config
        images = self.layout.tokens(config.size, config.size)
        learns = {"frozen": "the projector alone learns", "lora": f"the projector and LoRA of rank {config.lora_rank} learn", "full": "all of it learns"}
        run.say(
            f"{self.recipe}: {len(self.conversations):,} conversations; {config.language} sees through {config.tower}, {images} tokens for a square of "
            f"{config.size} px; {learns[config.train_language]}; conversations are written as {config.template}"
        )
        if self.begun:
            run.say(self.begun)

    def evaluate(self, step: int, run: RunFolder) -> dict[str, float]:
        """On held-out conversations, the loss of a word of an answer, and the share of answers that would be written exactly so, given those before."""
        if self.held_out is None:
            return {}
        loss, words, exact, answers = 0.0, 0, 0, 0
        shown: list[str] = []
        problems = Problems()
        for rows in self._held_out_rows(self.held_out, problems):
            batch = to_device(collate(rows, self.layout, self.prompts.pad_id), self.start.device)
            losses, written = _score(self.model.features(batch), self.model.network.lm_head, batch["answer_ids"])
            loss, words = loss + losses.sum().item(), words + len(losses)
            wanted, written = batch["answer_ids"].cpu(), written.cpu()
            for places in _answers_of(batch["answer_positions"].cpu(), batch["input_ids"].shape[1]):
                answers += 1
                exact += bool((wanted[places] == written[places]).all())
                if len(shown) < SHOWN:
                    shown.append(" | ".join(self.prompts.tokenizer.decode(ids[places], skip_special_tokens=True).strip() for ids in (wanted, written)))
        self.batches.problems.extend(problems, everywhere=True)
        if not answers:
            return {"skipped": len(problems)}
        if run.writes:
            path = run.path / "samples" / f"step-{step:08d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "the answer | what the model would write, word by word after the answer so far\n" + "\n".join(shown) + "\n")
        return {"loss": loss / words, "exact": exact / answers} | ({"skipped": len(problems)} if problems else {})

    def _held_out_rows(self, held_out: Conversations, problems: Problems) -> Iterator[list[Example]]:
        """Up to EVALUATED rows from all of it, the same on all ranks, which compute the parts of a sharded model together."""
        count = min(len(held_out), EVALUATED)
        chosen = [place * len(held_out) // count for place in range(count)]  # files are ordered by source
        for first in range(0, count, ROWS):
            rows: dict[int, Example] = {}
            unusable = Problems()
            for index in chosen[first : first + ROWS]:
                try:
                    rows[index] = read_example(held_out, index, self.prompts, self.layout)
                    unusable.extend(rows[index].problems)
                except ImageError as error:
                    unusable.add(error.as_problem(held_out.key(index)))
            everywhere = distributed.gather_objects((set(rows), unusable))
            for _, theirs in everywhere:
                problems.extend(theirs)
            if usable := [row for index, row in rows.items() if all(index in indices for indices, _ in everywhere)]:
                yield usable

    def export(self, path: Path, weights: dict[str, Tensor], state: RunState) -> None:
        own = {name: weights[f"network.{name}"] for name in trained_tensors(self.model.network)}
        folder.save(path, self._record(state), own)

    def finish(self, state: RunState) -> None:
        self.model.eval()

    def _record(self, state: RunState) -> ChatConfig:
        config = self.config
        training = {
            "recipe": self.recipe,
            "init": config.init,
            "steps": state.step,
            "samples_seen": state.samples,
            "data": list(config.data),
            "conversations": len(self.conversations),
            "seconds": round(state.seconds),
            "precision": self.start.precision,
            "seed": config.seed,
        }
        return ChatConfig(
            folder.FORMAT, config.tower, self.sha256[0], config.language, self.sha256[1], config.size, config.anyres, config.layer, config.template,
            config.length, config.train_language, config.lora_rank, config.lora_alpha, training,
        )  # fmt: skip

    def _identities(self) -> dict[str, Any]:
        """{field of PLACES: digest}."""
        return {
            "data": digest(self.conversations.sha256),
            "images": self.conversations.images_digest(),
            "val": digest(self.held_out.sha256 if self.held_out else ()),
            "tower": self.sha256[0],
            "language": self.sha256[1],
        }


def _checkpoint_blocks(language: nn.Module) -> None:
    """Recompute activations of frozen blocks, too: the gradient goes through them to the projector. `wrap_blocks` does it for trained ones."""
    for parts in [module for module in language.modules() if isinstance(module, nn.ModuleList) and not any(p.requires_grad for p in module.parameters())]:
        for place, block in enumerate(parts):
            parts[place] = checkpoint_wrapper(block)


def _score(features: Tensor, head: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) losses of the words of answers in fp32, and the most likely words; at most CHUNK logits at a time."""
    losses, written = [], []
    for some, their in zip(*(values.split(max(1, CHUNK // len(head.weight))) for values in (features, targets)), strict=True):
        logits = head(some).float()
        losses.append(nn.functional.cross_entropy(logits, their, reduction="none"))
        written.append(logits.argmax(1))
    return torch.cat(losses), torch.cat(written)


def _answers_of(positions: Tensor, length: int) -> list[Tensor]:
    """The words of each answer, as places in `positions`: those that follow each other without a gap, in one row of `length`."""
    starts = ((positions[1:] - positions[:-1] != 1) | (positions[1:] // length != positions[:-1] // length)).nonzero()[:, 0] + 1
    return list(torch.arange(len(positions)).tensor_split(starts))
