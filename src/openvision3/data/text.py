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
"""most characters of a token: only the first LONGEST x positions characters of a text are tokenised"""

PAD, UNKNOWN, CLASS, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[BEGIN]", "[END]"


@dataclass
class TextCount:
    """How much of some texts reaches the model."""

    texts: int = 0
    pieces: int = 0
    """tokens of the texts, before any is cut off (of a very long text: of its beginning)"""
    unknown: int = 0
    """tokens that are unknown to the tokenizer"""
    cut: int = 0
    """texts that are longer than the model reads"""
    lost: int = 0
    """texts of which more than half of the tokens are unknown"""

    def add(self, other: TextCount) -> None:
        for name in ("texts", "pieces", "unknown", "cut", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        """What is lost, in words; "" if nothing is."""
        parts = []
        if self.unknown:
            share = 100 * self.unknown / self.pieces
            parts.append(f"{share:.{0 if share >= 1 else 2}f} % of the {self.pieces:,} tokens of {self.texts:,} texts are unknown to the tokenizer")
        if self.cut:
            parts.append(f"{self.cut:,} of {self.texts:,} texts are longer than the model reads and are cut off")
        return "; ".join(parts)


class TextTokenizer:
    """Text <-> ids. `text_ids` end in the class token; `caption_ids` stand between a begin and an end token.

    Special tokens of a foreign `tokenizer.json` are used ([PAD] or <pad>, [CLS] ...); those that it lacks are added after its
    vocabulary. The name of a special token inside a caption is read as text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self.pad_id = self._special(PAD, "<pad>", "<|pad|>", "<|endoftext|>")
        self.class_id = self._special(CLASS, "<cls>", "<s>")
        self.begin_id = self._special(BEGIN)
        self.end_id = self._special(END)
        names = (getattr(tokenizer.model, "unk_token", None), UNKNOWN, "<unk>")
        self.unknown_id = next((number for name in names if name and (number := tokenizer.token_to_id(name)) is not None), None)
        """the id of unknown tokens; None if the tokenizer knows every byte"""

    def __reduce__(self):
        return type(self), (self.tokenizer,)  # a pickled Tokenizer forgets encode_special_tokens

    def _special(self, *names: str) -> int:
        """The id of the first of these special tokens that the tokenizer has; if it has none, the first name is added."""
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
        special = [PAD, UNKNOWN, CLASS, BEGIN, END]
        lines = sorted(set(captions))
        learner = cls._word_piece({})
        words = [w for line in lines for w, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(line))]
        if not words:
            raise ValueError(f"no words to learn from in {len(lines)} captions")
        # The trainer numbers inner letters in the order of a hash table, which differs between processes, and breaks ties by number:
        # only letters that are listed among the special tokens give the same vocabulary every time.
        counts: Counter[str] = Counter()
        inner: set[str] = set()
        for word, times in Counter(words).items():
            inner.update(word[1:])
            for letter in word:
                counts[letter] += times
        room = vocabulary - len(special)
        if room < 2:
            raise ValueError(f"vocabulary {vocabulary} is too small: {len(special)} of it are special tokens; choose 1,000 or more")
        kept: list[str] = []
        for letter, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            room -= 1 + (letter in inner)  # at the beginning of a word, and within one
            if room < 0:
                break
            kept.append(letter)
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary,
            special_tokens=special + sorted(f"##{letter}" for letter in kept if letter in inner),
            limit_alphabet=len(kept),
            initial_alphabet=sorted(kept),
            min_frequency=2,
            show_progress=False,
        )
        learner.train_from_iterator(lines, trainer)
        tokenizer = cls._word_piece(learner.get_vocab())
        tokenizer.add_special_tokens(special)
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
            tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))  # its own reader refuses paths that are not UTF-8
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {why_not(path, 'JSON', error)}") from error
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        write_whole(path, self.tokenizer.to_str(pretty=True))

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def ids(self, text: str, positions: int | None = None) -> list[int]:
        """The tokens of a text; with `positions`, only of as much text as could fill them. Raises TextError: surrogates."""
        text = checked_text(text if positions is None else text[: LONGEST * positions])
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def count(self, texts: Iterable[str], positions: int) -> TextCount:
        """Count how much of these texts reaches a model with so many positions. Raises TextError."""
        counts = TextCount()
        for text in texts:
            ids = self.ids(text, positions + 1)
            unknown = ids.count(self.unknown_id) if self.unknown_id is not None else 0
            is_cut = len(ids) > positions or len(text) > LONGEST * (positions + 1)
            counts.add(TextCount(1, len(ids), unknown, int(is_cut), int(unknown > len(ids) / 2)))
        return counts

    def same(self, texts: Sequence[str], positions: int) -> str:
        """A message about different texts that have the same tokens, because these are unknown or cut off; "" if there are none."""
        seen: dict[tuple[int, ...], str] = {}
        for text in texts:
            ids = self.ids(text, positions + 1)
            other = seen.setdefault(tuple(ids[:positions]), text)
            if " ".join(other.casefold().split()) == " ".join(text.casefold().split()):
                continue
            if len(ids) > positions:
                return f"{other!r:.60} and {text!r:.60} are the same to this model, which reads {positions} tokens of a text; put what differs first"
            if self.unknown_id in ids:
                return f"{other!r:.60} and {text!r:.60} are the same to this model, whose tokenizer does not know their words; use words of its language"
        return ""

    def complaint(self, texts: Sequence[str], positions: int) -> str:
        """A message about texts that a model with so many positions cannot tell apart or mostly does not know; "" if there are none."""
        counts = self.count(texts, positions)
        if counts.lost:
            first = next(text for text in texts if self.count([text], positions).lost)
            share = f"{counts.unknown} of the {counts.pieces} tokens of all"
            texts_lost = f"{counts.lost} of {counts.texts} texts, such as {first!r:.60},"
            return f"{texts_lost} are mostly unknown to this model's tokenizer ({share}): their results mean little"
        return self.same(texts, positions)

    def spelled(self, texts: Iterable[str], positions: int) -> str:
        """A message about words that are read nearly letter by letter, as those are that the tokenizer's captions hardly had; "" if there are none."""
        words = [word for text in texts for word in re.findall(r"[a-z]{3,}", text[: LONGEST * positions].lower())]
        rare = [word for word in words if 2 * len(self.ids(word)) > len(word)]
        if not rare:
            return ""
        return (
            f"{len(rare)} of {len(words)} words, such as {rare[0]!r:.60}, are hardly known to this model, which reads them letter by letter; use common words"
        )

    def text_ids(self, texts: Sequence[str], positions: int) -> Tensor:
        """texts -> (B, T), T the longest of them up to `positions`: tokens, then the class token, then padding."""
        return self._rows([[*self.ids(t, positions)[: positions - 1], self.class_id] for t in texts])

    def caption_ids(self, captions: Sequence[str], positions: int) -> Tensor:
        """captions -> (B, L): begin token, tokens, end token, padding. A caption that is too long loses its end and its end token."""
        return self._rows([[self.begin_id, *self.ids(c, positions), self.end_id][:positions] for c in captions])

    def _rows(self, rows: list[list[int]]) -> Tensor:
        out = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id, dtype=torch.long)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return out

    def text(self, ids: Sequence[int]) -> str:
        """Ids -> text without special tokens. Punctuation inside a word, as in medium-dark, loses the spaces that WordPiece puts around it."""
        words = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return re.sub(r"(?<=\w) ([-'’_/]) (?=\w)", r"\1", words)


def sentences(caption: str) -> list[str]:
    """Split a caption into sentences, without full stops; abbreviations such as "St. Lucia" and "U.S. flag" are not split."""
    parts = [part.rstrip(". ") for part in re.split(r"(?<=\w\w\w\.)\s+", caption)]
    return [part for part in parts if part] or [caption]
