"""A plugin of lmms-eval, which finds it by the entry point `lmms_eval.models`: `lmms-eval --model openvision3 --model_args pretrained=MODEL`.

MODEL is what `openvision3 evaluate vqa` takes, opened by the same function. lmms-eval is imported here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from openvision3.cli.evaluate import open_answering
from openvision3.data.images import open_image
from openvision3.device import choose_device
from openvision3.evaluate.options import VqaOptions
from openvision3.progress import track

TOKENS = 1024
"""the longest answer where a task names none, as in lmms-eval's own models"""


def manifest() -> ModelManifest:
    """What the entry point of pyproject.toml returns."""
    return ModelManifest("openvision3", simple_class_path=f"{__name__}.{OpenVision3.__name__}")


class OpenVision3(lmms):
    """A model that answers questions about one image, greedily. It raises what the model raises: lmms-eval would score an empty answer as a wrong one.

    Raises:
        ValueError: a device or an argument that does not exist, or MODEL cannot be opened.
    """

    is_simple = True

    def __init__(self, pretrained: str, device: str = "auto", precision: str = "fp32", batch_size: int | str = 1, **unused: Any):
        super().__init__()
        if strange := {name for name in unused if name not in ("max_batch_size", "num_gpus")}:  # lmms-eval's own
            raise ValueError(f"unknown argument {sorted(strange)[0]!r}. Choose from pretrained, device, precision, batch_size")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size {batch_size} must be a whole number from 1; it is not chosen by itself")
        self.batch_size = int(batch_size)
        self.functions = open_answering(VqaOptions(pretrained, device=choose_device(device), precision=precision))  # type: ignore[arg-type]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """(prompt, settings, doc_to_visual, number, task, split) of each request -> its answer, cut before the first of its words `until`."""
        answers: list[str] = []
        batches = [requests[start : start + self.batch_size] for start in range(0, len(requests), self.batch_size)]
        for batch in track(batches, f"{self.functions.name}, {self.batch_size} at a time", len(batches)):
            prompts, settings = [request.args[0] for request in batch], [request.args[1] for request in batch]
            images = [self._image(request) for request in batch]
            lengths = {int(one.get("max_new_tokens") or TOKENS) for one in settings}
            texts = [""] * len(batch)
            for length in lengths:
                rows = [row for row, one in enumerate(settings) if int(one.get("max_new_tokens") or TOKENS) == length]
                written = self.functions.answer([images[row] for row in rows], [prompts[row].replace("<image>", "").strip() for row in rows], length)
                for row, text in zip(rows, written, strict=True):
                    texts[row] = _cut(text, settings[row].get("until") or ())
            answers += texts
        return answers

    def _image(self, request: Any) -> Image.Image:
        _, _, doc_to_visual, number, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][number])
        if len(images) != 1 or not isinstance(images[0], Image.Image):
            raise ValueError(f"question {number} of {task} has {len(images)} images or another kind of input; choose a task of one image a question")
        return open_image(images[0])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("several rounds of answers are not supported; choose a task of one answer a question")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("scores of given answers are not supported; choose a task that generates its answers")


def _cut(text: str, until: str | Sequence[str]) -> str:
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text.strip()
