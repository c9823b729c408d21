"""Models of transformers that write text: how they are opened, and how they write greedily. transformers is an extra, imported when it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from openvision3.contents import short

EXTRA = "{} is not installed; pip install 'openvision3[{}]'"
READERS = {"causal language model": "AutoModelForCausalLM", "image-to-text model": "AutoModelForImageTextToText"}
"""kind of model -> the class of transformers that reads it"""
KEPT = (
    *("decoder_start_token_id", "bos_token_id", "eos_token_id", "forced_bos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)
"""what greedy decoding keeps of a model's own settings: where an answer starts and ends, and what a model may never write"""
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""for `from_pretrained`: what does not fit is reported and not a text on the terminal, see `check_complete`"""
LENGTHS = ("max_position_embeddings", "max_seq_len")
"""the names by which a config says how many tokens its model can read"""


def library(extra: str = "transformers") -> Any:
    """transformers without its progress bars and warnings. Raises ValueError where it is not installed; `extra` is ours that holds it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(EXTRA.format("transformers", extra)) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


@contextlib.contextmanager
def opening(name: str, kind: str, *, extra: str = "transformers", absent: str = "", hint: str = "") -> Iterator[Any]:
    """`library`, whose errors become one line about the model `name`, a key of READERS.

    `absent` is said in place of the reason where files cannot be read, `hint` after the reason.
    """
    transformers = library(extra)
    try:
        yield transformers
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is not installed: {short(error)}") from error
    except Exception as error:  # every library below transformers has its own classes
        reason = short(error)
        if absent and isinstance(error, OSError):
            reason = absent
        elif "Unrecognized configuration class" in str(error):
            reason = f"it is no {kind}; choose one that {READERS[kind]} of transformers reads"
        raise ValueError(f"the {kind} {name} cannot be opened: {reason}{hint}") from error


def check_complete(name: str, report: dict[str, Any]) -> None:
    """`report`: what `from_pretrained` returns beside a model, with REPORTED.

    Raises:
        ValueError: weights are missing or have other shapes than config.json says. transformers would leave random numbers in their place.
    """
    if missing := report["missing_keys"]:
        raise ValueError(f"{name} lacks {len(missing)} of the model's weights, such as {min(missing)}; get it again")
    if unlike := report["mismatched_keys"]:
        key, seen, expected = min(unlike)
        raise ValueError(
            f"{len(unlike)} weights of {name} have other shapes than its config.json says, such as {key}: {tuple(seen)} in place of {tuple(expected)}; "
            "get it again, or make its parts of one width"
        )


def open_image_text(name: str, dtype: torch.dtype, *, absent: str = "", **where: Any) -> tuple[Any, Any]:
    """(an `AutoModelForImageTextToText` in evaluation mode, its processor), ready to write for several prompts at once. `where` is of `from_pretrained`.

    Raises:
        ValueError: transformers is not installed or cannot open it, or weights or the text tokenizer are missing.
    """
    with opening(name, "image-to-text model", absent=absent) as transformers:
        processor: Any = transformers.AutoProcessor.from_pretrained(name, **where)
        network, report = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **REPORTED, **where)
    check_complete(name, report)
    words: Any = getattr(processor, "tokenizer", None)
    if words is None:
        raise ValueError(f"{name} has no text tokenizer; name a folder that holds model and processor, as save_pretrained writes them")
    if not getattr(network.config, "is_encoder_decoder", False):
        words.padding_side = "left"  # so that an answer follows its prompt directly
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    return network.eval(), processor


def in_template(processor: Any, prompt: str, without: str) -> str:
    """A prompt about one image in the processor's chat template.

    `without` is what the model reads if there is no template, and what the user says in one that takes texts alone, as those of language models do.
    """
    if not getattr(processor, "chat_template", None):
        return without
    from jinja2 import TemplateError

    def said(content: Any) -> str:
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)

    parts = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
    try:
        text = said(parts)
    except (TypeError, TemplateError):  # it joins or strips what it takes for a text
        return said(without)
    return said(without) if str(parts[0]) in text else text  # or writes the list itself


def decode_greedily(network: Any, words: Any, *, ends: Sequence[int] = (), never: Sequence[int] = ()) -> Any:
    """From now on the network writes its likeliest words, padded and ended as its tokenizer `words` says. Returns its new settings.

    They take the place of its own and of those of its parts, of which KEPT is kept. A penalty on repetition counts padding, so an answer would depend
    on its batch; it cannot be taken back by None, because transformers fills that from the model's own settings. `ends` end an answer in place of the
    model's own; `never` may not be written.
    """
    from transformers import GenerationConfig

    for part in network.modules():
        if own := getattr(part, "generation_config", None):
            kept = {name: getattr(own, name, None) for name in KEPT}
            if ends or kept["eos_token_id"] is None:
                kept["eos_token_id"] = [*ends] or words.eos_token_id
            kept["suppress_tokens"] = sorted({*(kept["suppress_tokens"] or ()), *never}) or None
            part.generation_config = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=words.pad_token_id, **kept)
    return network.generation_config


def most_tokens(config: Any) -> int | None:
    """How many tokens a language model can read; None where its config sets no limit, as those of Bloom (ALiBi) and of recurrent models."""
    return next((limit for name in LENGTHS if isinstance(limit := getattr(config, name, None), int) and limit > 0), None)
