"""The plugin of lmms-eval against a stand-in for the two classes of it that are used (its interface of version 0.7)."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

OWN = """
from openvision3.evaluate.protocol import AnsweringFunctions
calls = []

def model(device, precision):
    def answer(images, prompts, max_tokens):
        calls.append((len(images), max_tokens))
        assert all(image.mode == "RGB" for image in images)
        return [f"{prompt} {image.width} {max_tokens} STOP more" for image, prompt in zip(images, prompts)]
    return AnsweringFunctions("own", answer)
"""


@pytest.fixture
def plugin(monkeypatch):
    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None

    class Lmms:
        def __init__(self):
            self.task_dict = {}

    parts = {"lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest}}
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *parts):
        module = ModuleType(name)
        vars(module).update(parts.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "openvision3.cli.lmms_eval", raising=False)
    yield importlib.import_module("openvision3.cli.lmms_eval")
    sys.modules.pop("openvision3.cli.lmms_eval", None)


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:model"


def requests(count: int, **settings) -> tuple[list[SimpleNamespace], dict]:
    documents = {"task": {"test": [[Image.new("L", (10 + number, 8))] for number in range(count)]}}
    made = [SimpleNamespace(args=(f"<image>\nquestion {number}", settings, lambda document: document, number, "task", "test")) for number in range(count)]
    return made, documents


def test_the_entry_point_names_a_class_of_this_package(plugin):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["lmms_eval.models"]["openvision3"].partition(":")
    manifest = getattr(importlib.import_module(module), function)()
    where, _, name = manifest.simple_class_path.rpartition(".")
    assert manifest.model_id == "openvision3" and getattr(importlib.import_module(where), name).is_simple


def test_answers_come_in_the_order_of_the_requests_cut_where_a_task_says(plugin, own):
    model = plugin.OpenVision3(own, device="cpu", batch_size="2")
    asked, model.task_dict = requests(5, max_new_tokens=16, until=["STOP"], temperature=0)
    assert model.generate_until(asked) == [f"question {number} {10 + number} 16" for number in range(5)]
    assert sys.modules["openvision3_peer_own"].calls == [(2, 16), (2, 16), (1, 16)]


def test_requests_of_several_lengths_are_answered_by_their_own(plugin, own):
    model = plugin.OpenVision3(own, batch_size=4)
    short, model.task_dict = requests(2, max_new_tokens=3)
    long, _ = requests(2)
    assert [text.split()[3] for text in model.generate_until([short[0], long[1], short[1]])] == ["3", "1024", "3"]


def test_a_question_without_one_image_and_an_unknown_argument_are_refused(plugin, own):
    model = plugin.OpenVision3(own)
    asked, model.task_dict = requests(1)
    model.task_dict["task"]["test"][0] = []
    with pytest.raises(ValueError, match="question 0 of task has 0 images"):
        model.generate_until(asked)
    with pytest.raises(ValueError, match="unknown argument 'devise'"):
        plugin.OpenVision3(own, devise="cpu")
    for size in ("auto", 0):
        with pytest.raises(ValueError, match=f"batch_size {size} must be a whole number from 1"):
            plugin.OpenVision3(own, batch_size=size)
