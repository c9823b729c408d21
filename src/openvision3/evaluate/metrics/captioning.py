"""Caption metrics: written captions against the references of each image.

BLEU (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr (CIDEr-D of Vedantam et al. 2015) as COCO's caption evaluation
computes them (Chen et al. 2015, package pycocoevalcap), written anew on lists of words: they need no Java. Two tokenisers
make these lists, and numbers of unlike tokenisers are unlike protocols: "simple" is ours; "ptb" is COCO's, the Penn Treebank
one of Stanford CoreNLP 3.4.1, which with METEOR (Denkowski and Lavie 2014) comes with pycocoevalcap and needs Java.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from openvision3.evaluate.protocol import Number, number
from openvision3.evaluate.statistics import Column, Columns, bleu_of_sums

TOKENIZERS = ("auto", "simple", "ptb")
PACKAGE = "pycocoevalcap"
LONGEST = 4
"""words of the longest n-gram that BLEU and CIDEr count"""
BETA = 1.2
"""ROUGE-L: how much more recall weighs than precision"""
SIGMA = 6.0
"""CIDEr: of the Gaussian over the difference of lengths"""
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""what COCO leaves out; its brackets are in capitals, so that with lower-case words `-lrb-` stays in, and here too"""

Words = list[str]


def words(caption: str) -> Words:
    """Lower-case runs of letters and digits: "Man: light skin" and "man light skin" are the same words. The simple tokeniser."""
    return re.findall(r"\w+", caption.lower())


def token_f1(written: str, true: str) -> float:
    """Harmonic mean of precision and recall over words, counted with repeats; 1 when both are empty."""
    a, b = Counter(words(written)), Counter(words(true))
    if not a and not b:
        return 1.0
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values()))


def evaluate_captions(
    written: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = "auto",
    missing: list[str] | None = None,
    columns: Columns | None = None,
) -> list[Number]:
    """One written caption an image against all references of that image -> exact_match, token_f1, bleu_1 to bleu_4, rouge_l, cider, meteor.

    `tokenizer` "auto" is "ptb" where Java and pycocoevalcap are there, and "simple" otherwise. Metrics that cannot be computed are left
    out and get a line in `missing`; scores of each image are added to `columns`. exact_match and
    token_f1 always see the simple words.

    Raises:
        ValueError: unlike counts, none, an image without references, or a tokeniser that is not installed.
    """
    if not written or len(written) != len(references):
        raise ValueError(f"captions must be compared image by image; seen {len(written)} written and references of {len(references)}")
    if any(isinstance(each, str) or not len(each) for each in references):
        raise ValueError("each image needs a list of one reference or more; seen a bare string or an empty list; leave images without references out")
    name = choose_tokenizer(tokenizer)
    count, missing = len(written), [] if missing is None else missing
    fewest, most = min(map(len, references)), max(map(len, references))
    against = f"{most} reference{'s' * (most > 1)} an image" if fewest == most else f"{fewest} to {most} references an image"
    scores: dict[str, list] = {
        "exact_match": [int(any(words(one) == words(true) for true in of)) for one, of in zip(written, references, strict=True)],
        "token_f1": [max(token_f1(one, true) for true in of) for one, of in zip(written, references, strict=True)],
    }
    exact, f1 = (sum(each) / count for each in scores.values())
    found = [
        number("exact_match", exact, count, f"share of images whose lower-case words are those of a reference in order, {against}"),
        number("token_f1", f1, count, f"F1 of lower-case words with repeats, the best reference, mean over images, {against}"),
    ]
    own, true = tokenized(written, references, name)
    packages = (PACKAGE,) if name == "ptb" else ()
    spelled = f"{name} tokeniser, {against}"
    scores |= {"bleu": bleu_sums(own, true), "rouge_l": rouge_l_scores(own, true)}
    for n, value in enumerate(bleu(own, true), 1):
        found.append(number(f"bleu_{n}", value, count, f"BLEU-{n} over the whole set, closest reference length, {spelled}", *packages))
    found.append(number("rouge_l", rouge_l(own, true), count, f"ROUGE-L, beta {BETA}, mean over images, {spelled}", *packages))
    if count > 1:
        told = f"CIDEr, {name} tokeniser, CIDEr-D x10, sigma {SIGMA:g}, document frequencies of this set's references, mean over images, {against}"
        told += cider_warning(count)
        scores["cider"] = cider_scores(own, true)
        found.append(number("cider", cider(own, true), count, told, *packages))
    else:
        missing.append("cider: of one image it is always 0, for every word is in all of its documents; give two images or more")
    if name == "ptb":
        try:
            found.append(number("meteor", meteor(own, true), count, f"METEOR 1.5, English, over the whole set, {spelled}", *packages))
        except (OSError, ValueError) as error:
            missing.append(f"meteor: {error}")
    else:
        missing.append(f"meteor: {ptb_lacks() or 'it comes with the ptb tokeniser only; ask for that'}")
    if columns is not None:
        columns |= {name: Column(list(range(count)), each) for name, each in scores.items()}
    return found


# -- words ------------------------------------------------------------------------------------------------------------


def ptb_lacks() -> str:
    """What the ptb tokeniser and METEOR lack on this machine; "" if they can run."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed; pip install 'openvision3[captions]', and Java"
    return "" if shutil.which("java") else "java is not on the PATH; install a Java runtime, such as openjdk"


def choose_tokenizer(name: str) -> str:
    """ "auto", "simple" or "ptb" -> the tokeniser to use. Raises ValueError if it cannot run."""
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer {name} is none of {', '.join(TOKENIZERS)}")
    if name == "ptb" and ptb_lacks():
        raise ValueError(f"tokenizer ptb cannot run: {ptb_lacks()}; the tokenizer simple needs nothing")
    return name if name != "auto" else "simple" if ptb_lacks() else "ptb"


def tokenized(written: Sequence[str], references: Sequence[Sequence[str]], name: str) -> tuple[list[Words], list[list[Words]]]:
    """Split all captions into words; the shapes are kept."""
    flat = [*written, *(caption for of in references for caption in of)]
    made = iter(ptb_words(flat) if name == "ptb" else map(words, flat))
    return [next(made) for _ in written], [[next(made) for _ in of] for of in references]


def ptb_words(captions: Sequence[str]) -> list[Words]:
    """Lower-case Penn Treebank words without COCO's punctuation, in one run of Java for all captions.

    Raises:
        ValueError: Java failed, with what it said.
    """
    lines = [" ".join(caption.split()) for caption in captions]  # a line is a caption: no other line break may stand in it
    jar = _folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    try:
        done = subprocess.run(command, input="".join(line + "\n" for line in lines).encode("utf-8", "replace"), capture_output=True, check=False)
    except OSError as error:
        raise ValueError(f"the ptb tokeniser cannot run: {error}; the tokenizer simple needs nothing") from error
    found = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(found) != len(lines):
        said = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["nothing"])[0]
        raise ValueError(f"the ptb tokeniser gave {len(found)} lines for {len(lines)} captions, java said: {said}; the tokenizer simple needs nothing")
    return [[word for word in line.split() if word not in PUNCTUATION] for line in found]


def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None and found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations)))


# -- scores -----------------------------------------------------------------------------------------------------------


def ngrams(caption: Words) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to LONGEST words occurs."""
    return Counter(tuple(caption[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(caption) - n + 1))


def bleu(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole set: geometric means of clipped precisions times the brevity penalty.

    The length to reach is that of the closest reference, of two equally close ones the shorter. The small numbers stand where
    COCO has them: where nothing is right, next to nothing comes out, not 0.
    """
    sums = torch.tensor(bleu_sums(written, references), dtype=torch.float64).sum(0)
    return [float(bleu_of_sums(sums, n)) for n in range(1, LONGEST + 1)]


def bleu_sums(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[list[int]]:
    """The sums of BLEU for each image: matched and written n-grams for n = 1 to 4, written words, reference words."""
    found = []
    for own, of in zip(written, references, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in of:
            most |= ngrams(reference)
        right = [0] * LONGEST
        for gram, times in (ngrams(own) & most).items():
            right[len(gram) - 1] += times
        guessed = [max(0, len(own) - n) for n in range(LONGEST)]
        found.append([*right, *guessed, len(own), min((abs(len(reference) - len(own)), len(reference)) for reference in of)[1]])
    return found


def rouge_l(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean over images of F_beta from the longest common subsequence, its precision and its recall each of the best reference.

    A caption without words counts as one empty word, as at COCO.
    """
    return sum(rouge_l_scores(written, references)) / len(written)


def rouge_l_scores(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Of each image."""
    found = []
    for own, of in zip(written, references, strict=True):
        own = own or [""]
        common = [(_common_subsequence(own, reference or [""]), len(reference or [""])) for reference in of]
        precision, recall = max(shared for shared, _ in common) / len(own), max(shared / length for shared, length in common)
        found.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision and recall else 0.0)
    return found


def _common_subsequence(first: Words, second: Words) -> int:
    """Length of the longest common subsequence, row by row."""
    above = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if word == other else max(row[place], above[place + 1]))
        above = row
    return above[-1]


def cider(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D: ten times the mean over images, references and n of clipped cosines of tf-idf vectors, with a penalty on length.

    A document is an image: df counts the images of whose references one has the n-gram. Lengths are counted in bigrams, as
    pycocoevalcap does, which differs from words for captions of none and one alone.
    """
    return sum(cider_scores(written, references)) / len(written)


FEW_DOCUMENTS = 1_000


def cider_warning(count: int) -> str:
    """The warning for a CIDEr of few images; empty for many. N-grams are weighted by their frequency in this set alone."""
    return f"; document frequencies of {count} images: compare with no other set" if count < FEW_DOCUMENTS else ""


def cider_scores(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Of each image, times ten."""
    frequency: Counter[tuple[str, ...]] = Counter()
    for of in references:
        frequency.update({gram for reference in of for gram in ngrams(reference)})
    documents = math.log(len(references))

    def vectors(caption: Words) -> tuple[dict[tuple[str, ...], float], list[float]]:
        """tf-idf of each n-gram, and the norm for each n."""
        weights = {gram: times * (documents - math.log(max(1, frequency[gram]))) for gram, times in ngrams(caption).items()}
        squares = [0.0] * LONGEST
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]

    found = []
    for own, of in zip(written, references, strict=True):
        score = 0.0
        weights, norms = vectors(own)
        for reference in of:
            true_weights, true_norms = vectors(reference)
            dots = [0.0] * LONGEST
            for gram in weights.keys() & true_weights.keys():
                dots[len(gram) - 1] += min(weights[gram], true_weights[gram]) * true_weights[gram]
            cosines = sum(dot / (a * b) for dot, a, b in zip(dots, norms, true_norms, strict=True) if a and b)
            delta = max(0, len(own) - 1) - max(0, len(reference) - 1)
            score += cosines / LONGEST * math.exp(-(delta**2) / (2 * SIGMA**2)) / len(of)
        found.append(10 * score)
    return found


def meteor(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR 1.5 of pycocoevalcap over the whole set, on words of the ptb tokeniser.

    Raises:
        OSError, ValueError: its program or its data are not there, or it gave no number.
    """
    for path in (_folder() / "meteor" / "meteor-1.5.jar", _folder() / "meteor" / "data" / "paraphrase-en.gz"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; install {PACKAGE} again")
    from pycocoevalcap.meteor.meteor import Meteor

    images = range(len(written))
    true, own = {i: [" ".join(one) for one in references[i]] for i in images}, {i: [" ".join(written[i])] for i in images}
    try:
        return Meteor().compute_score(true, own)[0]
    except ValueError as error:
        raise ValueError(f"Java's METEOR gave no number ({error}); it needs 2 GB of memory") from error
