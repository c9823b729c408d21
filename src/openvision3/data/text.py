"""captions <-> text_ids: a WordPiece trained on the captions, or any `tokenizer.json`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from openvision3.contents import why_not
from openvision3.data.captions import checked_text
from openvision3.files import write_whole

LONGEST = 100
"""Characters that a piece stands for at most: of a text no more than LONGEST x positions are tokenised, however long it is."""

PAD, UNKNOWN, CLASS, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[BEGIN]", "[END]"


@dataclass
class TextCount:
    """What of some texts reaches the model, and what does not."""

    texts: int = 0
    pieces: int = 0
    """of the texts, before any is cut off (of a very long text: of its beginning)"""
    unknown: int = 0
    """of the pieces: unknown to the tokenizer"""
    cut: int = 0
    """of the texts: longer than the model reads"""
    lost: int = 0
    """of the texts: more than half of their pieces are unknown"""

    def add(self, other: TextCount) -> None:
        for name in ("texts", "pieces", "unknown", "cut", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        """What is lost, in words; "" where nothing is."""
        parts = []
        if self.unknown:
            share = 100 * self.unknown / self.pieces
            parts.append(f"{share:.{0 if share >= 1 else 2}f} % of the {self.pieces:,} pieces of {self.texts:,} texts are unknown to the tokenizer")
        if self.cut:
            parts.append(f"{self.cut:,} of {self.texts:,} texts are longer than the model reads, and cut off")
        return "; ".join(parts)


class TextTokenizer:
    """Words <-> ids. Marks: `text_ids` end in the class mark, `caption_ids` stand between a begin and an end mark.

    A foreign `tokenizer.json` lends its own marks where it has them ([PAD] or <pad>, [CLS] ...); marks that it lacks are
    added behind its vocabulary. A mark's name inside a caption is text, not the mark.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self.pad_id = self._mark(PAD, "<pad>", "<|pad|>", "<|endoftext|>")
        self.class_id = self._mark(CLASS, "<cls>", "<s>")
        self.begin_id = self._mark(BEGIN)
        self.end_id = self._mark(END)
        names = (getattr(tokenizer.model, "unk_token", None), UNKNOWN, "<unk>")
        self.unknown_id = next((number for name in names if name and (number := tokenizer.token_to_id(name)) is not None), None)
        """what stands for a piece that the tokenizer does not know; None where it knows every byte"""

    def __reduce__(self):
        return type(self), (self.tokenizer,)  # a pickled Tokenizer forgets encode_special_tokens

    def _mark(self, *names: str) -> int:
        """The id of the first of these names that the tokenizer has; it gets the first where it has none."""
        name = next((n for n in names if self.tokenizer.token_to_id(n) is not None), names[0])
        self.tokenizer.add_special_tokens([name])
        number = self.tokenizer.token_to_id(name)
        assert number is not None
        return number

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int = 4096) -> TextTokenizer:
        """A lower-casing WordPiece of at most `vocabulary` pieces on these captions, the same whatever their order.

        Where there are more letters than that, as in Chinese, the rarest are left out: they are unknown to it.

        Raises:
            ValueError: no words at all, or a vocabulary that holds special tokens alone.
        """
        marks = [PAD, UNKNOWN, CLASS, BEGIN, END]
        lines = sorted(set(captions))
        learner = cls._word_piece({})
        words = [w for line in lines for w, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(line))]
        if not words:
            raise ValueError(f"no words to learn from in {len(lines)} captions")
        # The trainer numbers the inner letters in the order of a hash table, other in every process, and breaks ties by number:
        # only letters named beforehand, among the marks, give the same vocabulary twice.
        counts: Counter[str] = Counter()
        inner: set[str] = set()
        for word, times in Counter(words).items():
            inner.update(word[1:])
            for letter in word:
                counts[letter] += times
        room = vocabulary - len(marks)
        if room < 2:
            raise ValueError(f"vocabulary {vocabulary} is too small: {len(marks)} of it are special tokens; take 1,000 or more")
        kept: list[str] = []
        for letter, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            room -= 1 + (letter in inner)  # at the beginning of a word, and within one
            if room < 0:
                break
            kept.append(letter)
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary,
            special_tokens=marks + sorted(f"##{letter}" for letter in kept if letter in inner),
            limit_alphabet=len(kept),
            initial_alphabet=sorted(kept),
            min_frequency=2,
            show_progress=False,
        )
        learner.train_from_iterator(lines, trainer)
        tokenizer = cls._word_piece(learner.get_vocab())
        tokenizer.add_special_tokens(marks)
        return cls(tokenizer)

    @staticmethod
    def _word_piece(vocabulary: dict[str, int]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        return tokenizer

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Read a `tokenizer.json`. Raises FileNotFoundError, ValueError."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no such tokenizer: {path}; name a tokenizer.json with --tokenizer: the paper's is that of huggingface.co/google-bert/bert-base-uncased "
                "(Apache-2.0), which `openvision3 fetch bert-base-uncased` gets; --tokenizer '' trains one on the captions"
            )
        try:
            tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))  # its own reader takes no path that is not UTF-8
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {why_not(path, 'JSON', error)}") from error
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        write_whole(path, self.tokenizer.to_str(pretty=True))

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def ids(self, text: str, positions: int | None = None) -> list[int]:
        """The pieces of a text; with `positions` of no more of it than could fill them. Raises TextError: half characters, NULs."""
        text = checked_text(text if positions is None else text[: LONGEST * positions])
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def count(self, texts: Iterable[str], positions: int) -> TextCount:
        """How much of these texts reaches a model that reads so many pieces of each. Raises TextError."""
        counts = TextCount()
        for text in texts:
            ids = self.ids(text, positions + 1)
            unknown = ids.count(self.unknown_id) if self.unknown_id is not None else 0
            is_cut = len(ids) > positions or len(text) > LONGEST * (positions + 1)
            counts.add(TextCount(1, len(ids), unknown, int(is_cut), int(unknown > len(ids) / 2)))
        return counts

    def same(self, texts: Sequence[str], positions: int) -> str:
        """Which unlike texts have the same pieces, because these are unknown or cut off, and why; "" where there are none."""
        seen: dict[tuple[int, ...], str] = {}
        for text in texts:
            ids = self.ids(text, positions + 1)
            other = seen.setdefault(tuple(ids[:positions]), text)
            if " ".join(other.casefold().split()) == " ".join(text.casefold().split()):
                continue
            if len(ids) > positions:
                return f"{other!r:.60} and {text!r:.60} are the same to this model, which reads {positions} pieces of a text; put what differs first"
            if self.unknown_id in ids:
                return f"{other!r:.60} and {text!r:.60} are the same to this model, whose tokenizer does not know their words; say it in words of its language"
        return ""

    def complaint(self, texts: Sequence[str], positions: int) -> str:
        """What a model that reads so many pieces makes nothing of, where that is much of these texts; "" where it is not."""
        counts = self.count(texts, positions)
        if counts.lost:
            first = next(text for text in texts if self.count([text], positions).lost)
            return f"{counts.lost} of {counts.texts} texts, such as {first!r:.60}, are mostly unknown to this model's tokenizer: what they give says little"
        return self.same(texts, positions)

    def text_ids(self, texts: Sequence[str], positions: int) -> Tensor:
        """texts -> (B, T), T the longest of them up to `positions`: pieces, then the class mark, then padding."""
        return self._rows([[*self.ids(t, positions)[: positions - 1], self.class_id] for t in texts])

    def caption_ids(self, captions: Sequence[str], positions: int) -> Tensor:
        """captions -> (B, L): begin mark, pieces, end mark, padding. A caption that is too long loses its end and its end mark."""
        return self._rows([[self.begin_id, *self.ids(c, positions), self.end_id][:positions] for c in captions])

    def _rows(self, rows: list[list[int]]) -> Tensor:
        out = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id, dtype=torch.long)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return out

    def text(self, ids: Sequence[int]) -> str:
        """Ids without marks -> words; marks within a word, as in medium-dark, lose the spaces that a WordPiece puts around them."""
        words = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return re.sub(r"(?<=\w) ([-'’_/]) (?=\w)", r"\1", words)


def sentences(caption: str) -> list[str]:
    """The sentences of a caption without their full stops; abbreviations such as "St. Lucia" and "U.S. flag" stay whole."""
    parts = [part.rstrip(". ") for part in re.split(r"(?<=\w\w\w\.)\s+", caption)]
    return [part for part in parts if part] or [caption]
