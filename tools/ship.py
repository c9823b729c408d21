"""Put a finished training into the package: its weights in bf16, and the commands that repeat it.

    python tools/ship.py mini runs/mini_low_res runs/mini_high_res --rename /data/drawings=DRAWINGS /data=DATA --licence 'CC BY-SA 4.0 ...'
    python tools/ship.py vae runs/vae/ema runs/vae_more/ema --fingerprints first.safetensors more.safetensors --rename /data=DATA
    python tools/ship.py generators/drawings runs/drawings_dit_tiny runs/larger --rename /data/drawings=DRAWINGS --licence 'CC BY-SA 4.0 ...'
    python tools/ship.py chats/small runs/chat_instruct --rename /data/talk=TALK --licence 'CC BY-SA 4.0 ...'

The runs are the stages in their order; the last one ships. `--rename` replaces text of this machine in the recorded commands and names of data; a path
that is left is refused. Then: `openvision3 calibrate`, `make results`, `make card`; of a generator `tools/generator_card.py`, of a chat model
`tools/chat_card.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import Positional

from openvision3 import hub
from openvision3.data.fingerprint import FILE as FINGERPRINT
from openvision3.data.fingerprint import Fingerprint
from openvision3.generate import folder as generators
from openvision3.pipeline import load
from openvision3.understand import folder as chats
from openvision3.understand.language import SMOLLM2, language_sha256

COMMANDS = "command.txt"
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TOWER, LANGUAGE = "mini", SMOLLM2
"""what a shipped chat model sees and speaks through: what everyone has or can fetch"""
PATH = re.compile(r"""(?<![\w.:/~\])}-])/[\w.-]+/[^\s"']*""")
"""an absolute path, which is of this machine; no address and no globbed or relative path"""


@dataclass
class Options:
    """What ships."""

    which: Positional[str]
    """the folder of the package that is replaced: mini, vae, generators/NAME or chats/NAME"""
    runs: Positional[tuple[Path, ...]]
    """run folders; vae: folders that tools/train_embedded_vae.py wrote (OUT/ema)"""
    rename: tuple[str, ...] = ()
    """OLD=NEW pairs, applied in their order"""
    licence: str = ""
    """the terms of the weights, in words; the VAE has none of its own"""
    fingerprints: tuple[Path, ...] = ()
    """vae: fingerprints of the data of its stages (openvision3 data fingerprint), saved as one; the mini's run has its own"""

    def __post_init__(self):
        if wrong := [pair for pair in self.rename if not pair.rpartition("=")[0]]:
            raise ValueError(f"--rename {wrong[0]} must look like OLD=NEW")
        if not re.fullmatch(r"mini|vae|(generators|chats)/[\w.-]+", self.which):
            raise ValueError(f"{self.which} does not ship; choose one of mini, vae, generators/NAME and chats/NAME")
        if not self.runs:
            raise ValueError("name at least one run")
        if (self.which == "vae") != bool(self.fingerprints):
            raise ValueError("name the fingerprints of the VAE's data with --fingerprints; the mini's run has its own")

    def elsewhere(self, value: Any) -> Any:
        """The value, with the texts in it renamed."""
        if isinstance(value, str):
            for pair in self.rename:
                old, _, new = pair.rpartition("=")
                value = value.replace(old, new)
            return value
        if isinstance(value, dict):
            return {name: self.elsewhere(inner) for name, inner in value.items()}
        return [self.elsewhere(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_mini(options: Options, folder: Path) -> None:
    """The newest checkpoint of the last run, without the VAE, which has a folder of its own; the command of each run."""
    pipeline = load(options.runs[-1])
    if pipeline.fingerprint is None:
        raise ValueError(f"{options.runs[-1]} has no fingerprint of its data; train with --fingerprint")
    pipeline.training = options.elsewhere(pipeline.training) | {"licence": options.licence}
    pipeline.fingerprint.data = tuple(options.elsewhere(pipeline.fingerprint.data))
    pipeline.save(folder, dtype=torch.bfloat16, with_vae=False)
    write_commands(options, folder)


def write_commands(options: Options, folder: Path) -> None:
    """The first command of each run, and where it was stopped before its last step: those that resumed it say no more."""
    commands = [(run / COMMANDS).read_text(encoding="utf-8").splitlines()[0].split(" ", 1)[1] + stopped(run) for run in options.runs]
    (folder / COMMANDS).write_text("".join(f"openvision3 {options.elsewhere(command)}\n" for command in commands), encoding="utf-8")


def stopped(run: Path) -> str:
    planned = json.loads((run / "config.json").read_text(encoding="utf-8"))["steps"]
    step = int(hub.complete_checkpoints(run)[-1].name.removeprefix("step-"))
    return f"  # stopped at step {step:,}" if step < planned else ""


def write_generator(options: Options, folder: Path) -> None:
    """The averaged weights of the newest checkpoint of the last run."""
    rae, config, _ = generators.load(options.runs[-1])
    stages = [options.elsewhere(generators.read(generators.find(run)).training) for run in options.runs]
    training = chained(stages) | {"licence": options.licence}
    generators.save(folder, rae, config.label_names, training=training, weights=rae.state_dict(), dtype=torch.bfloat16)
    write_commands(options, folder)


def write_chat(options: Options, folder: Path) -> None:
    """What the last run has learned. Raises ValueError where it saw or spoke through other weights than those that come with it."""
    run = chats.find(options.runs[-1])
    config = chats.read(run)
    for part, name, sha256 in (("tower", TOWER, hub.weights_sha256(hub.find_folder(TOWER))), ("language", LANGUAGE, language_sha256(LANGUAGE))):
        seen = getattr(config, f"{part}_sha256")
        if seen != sha256:
            raise ValueError(f"{run} was trained with a {part} of sha256 {seen[:12]}..., but {name} has {sha256[:12]}...; train it with --{part} {name}")
    training = options.elsewhere(config.training) | {"licence": options.licence}
    config = replace(config, tower=TOWER, language=LANGUAGE, training=training)
    chats.save(folder, config, hub.read_tensors(run / "model.safetensors"), dtype=torch.bfloat16)
    write_commands(options, folder)


def write_vae(options: Options, folder: Path) -> None:
    """The weights of the last folder; training.json holds the stages, the last one first, each in the `started_from` of the one after it."""
    folder.mkdir()
    for name in VAE_FILES:
        shutil.copyfile(options.runs[-1] / name, folder / name)
    seen = Fingerprint.joined([Fingerprint.load(path) for path in options.fingerprints])
    seen.data = tuple(options.elsewhere(seen.data))
    seen.save(folder / FINGERPRINT)
    training = chained([options.elsewhere(json.loads((run / "training.json").read_text(encoding="utf-8"))) for run in options.runs])
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def chained(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the last stage, with that of the one before it in its `started_from`, and so on."""
    training: dict[str, Any] = {}
    for stage in stages:
        training = stage | ({"started_from": training} if training else {})
    return training


WRITERS = {"mini": write_mini, "vae": write_vae, "generators": write_generator, "chats": write_chat}


def check_no_path(folder: Path) -> None:
    """Raises ValueError where a file of text names a place of this machine."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".md", ".txt") and file.name != "tokenizer.json" and (path := PATH.search(file.read_text(encoding="utf-8"))):
            raise ValueError(f"{file.name} would name {path[0]}, a place of this machine; give it another name with --rename, such as {path[0]}=DATA")


def main(options: Options) -> None:
    target = hub.ASSETS / options.which
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=hub.ASSETS) as made:  # whole, before the old one gives way
        new = Path(made) / "new"
        WRITERS[options.which.partition("/")[0]](options, new)
        check_no_path(new)
        if target.is_dir():
            target.rename(Path(made) / "old")
        new.rename(target)
    print(f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Annotated[Options, tyro.conf.OmitArgPrefixes], description=__doc__))
    except (ValueError, OSError) as error:
        print(f"ship: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
