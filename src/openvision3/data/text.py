"""captions <-> text_ids: a WordPiece trained on the captions, or any `tokenizer.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from openvision3.contents import why_not
from openvision3.files import write_whole

PAD, UNKNOWN, CLASS, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[BEGIN]", "[END]"


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

        Raises:
            ValueError: no words at all.
        """
        marks = [PAD, UNKNOWN, CLASS, BEGIN, END]
        lines = sorted(set(captions))
        learner = cls._word_piece({})
        words = [w for line in lines for w, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(line))]
        if not words:
            raise ValueError(f"no words to learn from in {len(lines)} captions")
        # The trainer numbers the inner letters in the order of a hash table, other in every process, and breaks ties by number:
        # only letters named beforehand, among the marks, give the same vocabulary twice.
        letters = sorted({f"##{letter}" for word in set(words) for letter in word[1:]})
        trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=marks + letters, min_frequency=2, show_progress=False)
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

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text_ids(self, texts: Sequence[str], positions: int) -> Tensor:
        """texts -> (B, T), T the longest of them up to `positions`: pieces, then the class mark, then padding."""
        return self._rows([[*self.ids(t)[: positions - 1], self.class_id] for t in texts])

    def caption_ids(self, captions: Sequence[str], positions: int) -> Tensor:
        """captions -> (B, L): begin mark, pieces, end mark, padding. A caption that is too long loses its end and its end mark."""
        return self._rows([[self.begin_id, *self.ids(c), self.end_id][:positions] for c in captions])

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
