"""A trained generator: what `load_generator` returns and what `openvision3 generate` writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_generator import small_dit, small_generator, tokens_folder
from tiny_pipeline import make_pipeline

import openvision3 as ov3
from openvision3 import hub
from openvision3.cli import main
from openvision3.generate import folder
from openvision3.generate.dit import Condition
from openvision3.generate.flow import Sampling, guided
from openvision3.generate.generator import Generator
from openvision3.generate.rae import RAE
from openvision3.generate.space import Moments, open_space

QUICK = Sampling(steps=4)
TEXTS = ("red heart", "cat face", "green apple")


def written(root: Path, name: str, *, centre: float | None = 0.0, **changes) -> Path:
    """A generator folder with random weights that reach the output, and the statistics of tokens about `centre`, or none."""
    rae = RAE(small_generator(root, "unused", **changes), open_space(tokens_folder(root)))
    torch.manual_seed(0)
    rae.dit.init_weights()
    for parameter in rae.dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if centre is not None:
        moments = Moments(*rae.statistics.mean.shape)
        moments.add(centre + torch.randn(50, *rae.statistics.mean.shape, generator=torch.Generator().manual_seed(0)))
        rae.statistics.set(moments)
    folder.save(root / name, rae, (), training={"steps": 3}, weights=rae.state_dict())
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def place(root) -> Path:
    return written(root, "generator")


@pytest.fixture(scope="module")
def generator(place):
    return ov3.load_generator(place, device="cpu")


def test_an_image_depends_on_seed_number_and_text_and_not_on_its_company(generator):
    together = generator.sample([0, 1, 2], TEXTS, QUICK)
    alone = generator.sample([1], TEXTS[1:2], QUICK)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-4)
    assert (generator.sample([1], TEXTS[1:2], Sampling(steps=4, seed=1)) - alone).abs().max() > 1e-2
    assert (generator.sample([1], TEXTS[:1], QUICK) - alone).abs().max() > 1e-3
    assert (generator.sample([2], TEXTS[1:2], QUICK) - alone).abs().max() > 1e-2


def test_guidance_in_one_batch_is_the_formula_on_two(generator):
    """And it acts within its interval alone."""
    rae, condition = generator.rae, generator._condition(TEXTS[:2])
    noise = torch.randn(2, *rae.statistics.mean.shape, generator=torch.Generator().manual_seed(0))
    found = rae.draw(noise, condition, Sampling(steps=2, guidance=3.0, interval=(0.0, 0.6)))
    x, apart = noise, torch.tensor([True, True])
    with torch.no_grad():
        for now, then in ((1.0, 0.5), (0.5, 0.0)):
            t = torch.full((2,), now)
            one = rae._velocity(x, t, condition)
            if now <= 0.6:
                one = guided(one, rae._velocity(x, t, condition.with_dropped(apart)), 3.0)
            x = x + (then - now) * one
    torch.testing.assert_close(found, rae.statistics.restore(x), rtol=1e-3, atol=1e-3)


def test_a_weaker_generator_guides_by_its_own_prediction(root, place):
    weaker = written(root, "weaker", dit=small_dit(depth=1))
    strong = ov3.load_generator(place, device="cpu", weaker=weaker)
    condition = strong._condition(TEXTS[:1])
    noise = torch.randn(1, *strong.rae.statistics.mean.shape, generator=torch.Generator().manual_seed(0))
    found = strong.rae.draw(noise, condition, Sampling(steps=1, guidance=2.0), strong.weaker.rae)
    with torch.no_grad():
        t = torch.ones(1)
        velocity = 2 * strong.rae._velocity(noise, t, condition) - strong.weaker.rae._velocity(noise, t, condition)
    torch.testing.assert_close(found, strong.rae.statistics.restore(noise - velocity), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centre", [1.0, None])
def test_a_generator_of_tokens_that_are_normalised_otherwise_cannot_guide(root, place, centre):
    other = written(root, f"apart-{centre}", centre=centre)
    with pytest.raises(ValueError, match="it normalises tokens by other statistics; train both on the same images"):
        ov3.load_generator(place, weaker=other)
    assert ov3.load_generator(other, weaker=other).can_guide


def test_images_and_tokens_and_the_way_there(generator):
    steps: list[int] = []
    images = generator.generate(TEXTS[:2], count=2, sampling=QUICK, each=lambda step, drawn: steps.append((step, len(drawn), drawn[0].size)))
    assert [image.size for image in images] == [(32, 32)] * 4 and steps == [(step, 4, (32, 32)) for step in (1, 2, 3, 4)]
    tokens = generator.draw_tokens(TEXTS[:2], count=2, sampling=QUICK)
    assert tokens.shape == (4, 4, 64)
    assert ov3.to_pil(generator.decode(tokens))[3].tobytes() == images[3].tobytes()


def test_more_images_than_a_batch_holds_are_those_of_their_numbers(generator, monkeypatch):
    whole = generator.draw_tokens(TEXTS, sampling=QUICK)
    monkeypatch.setattr("openvision3.generate.generator.BATCH", 2)
    torch.testing.assert_close(generator.draw_tokens(TEXTS, sampling=QUICK), whole, rtol=1e-3, atol=1e-3)


def test_weights_in_bf16_load_and_draw_nearly_the_same(root, generator):
    rae = generator.rae
    folder.save(root / "half", rae, (), training={}, weights=rae.state_dict(), dtype=torch.bfloat16)
    saved = load_file(root / "half" / "model.safetensors")
    assert saved["dit.enter.weight"].dtype == torch.bfloat16 and saved["statistics.mean"].dtype == torch.float32
    assert torch.equal(saved["dit.time.frequencies"], rae.dit.time.frequencies)
    near, same = (one.sample([0], TEXTS[:1], QUICK) for one in (ov3.load_generator(root / "half", device="cpu"), generator))
    assert (near - same).abs().mean() < 0.1


def test_a_generator_without_a_condition_draws_so_many_images(root):
    plain = ov3.load_generator(written(root, "plain", condition="none"), device="cpu")
    assert len(plain.generate(count=3, sampling=QUICK)) == 3 and not plain.can_guide
    with pytest.raises(ValueError, match="draws on no condition"):
        plain.generate(count=1, sampling=Sampling(steps=2, guidance=2.0))
    for condition in ({"texts": "a red heart"}, {"labels": 0}):
        with pytest.raises(ValueError, match="draws without a condition; leave out texts and labels"):
            plain.generate(**condition)
    weaker = written(root, "plain-weaker", condition="none", dit=small_dit(depth=1))
    guided_by = ov3.load_generator(root / "plain", device="cpu", weaker=weaker)
    assert guided_by.can_guide and len(guided_by.generate(sampling=Sampling(steps=2, guidance=2.0))) == 1


def test_by_label(root):
    rae = RAE(small_generator(root, "unused", condition="label"), open_space(tokens_folder(root)), classes=3)
    rae.dit.init_weights()
    folder.save(root / "classes", rae, ("apple", "banana", "cherry"), training={}, weights=rae.state_dict())
    by_label = ov3.load_generator(root / "classes", device="cpu")
    assert len(by_label.generate(labels=["banana", 2], sampling=QUICK)) == 2
    assert torch.equal(by_label._condition(by_label._conditions((), "cherry")).labels, torch.tensor([2]))
    for label, words in (("bananna", "Did you mean 'banana'"), (3, "a number from 0 to 2"), (-1, "a number from 0 to 2")):
        with pytest.raises(ValueError, match=words):
            by_label.generate(labels=label)
    with pytest.raises(ValueError, match="draws by label: give labels, such as apple, banana, cherry"):
        by_label.generate("a red heart")


def test_a_generator_of_other_tokens_is_refused_by_their_hash(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(written(tmp_path, "generator"), copy)
    shutil.rmtree(tmp_path / "tokens")
    make_pipeline(seed=5).save(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"draws tokens of .* with sha256 .* now; name the model it was trained with in --tokens"):
        ov3.load_generator(copy)
    assert ov3.load_generator(copy, tokens=tokens_folder(root)).size == 32


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda place: (place / "model.safetensors").write_bytes(b"x" * 100), "is damaged or no model"),
        (lambda place: (place / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda place: (place / "config.json").write_text("{}"), "is not the config of a generator"),
        (lambda place: _without(place, "dit.leave.bias"), "1 tensors missing"),
        (lambda place: _changed(place, "format", 99), "is of format 99"),
        (lambda place: _changed(place, "dropp", 1), "Did you mean 'drop'|unknown field"),
    ],
)
def test_a_damaged_folder_is_one_line(place, tmp_path, damage, words):
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ov3.load_generator(copy)


def _without(place: Path, name: str) -> None:
    state = load_file(place / "model.safetensors")
    del state[name]
    save_file(state, place / "model.safetensors")


def _changed(place: Path, name: str, value: object) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {name: value}))


def test_names_of_the_other_kind_of_model_are_told_apart(place):
    with pytest.raises(ValueError, match="is a generator, which draws images; use it with openvision3 generate --model"):
        ov3.load(place)
    with pytest.raises(ValueError, match=r"is an openvision3 model, which rebuilds and understands images; .*; name a generator"):
        folder.read(hub.find_folder("mini"))


def test_the_command_writes_an_image_a_sheet_and_the_way(place, tmp_path, capsys):
    out = tmp_path / "new" / "drawn.png"
    common = ["--model", str(place), "--steps", "4", "--device", "cpu"]
    assert main(["generate", "red heart", *common, "--out", str(out), "--strip", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"red heart -> {out}", str(out.with_name("drawn-strip.png"))]
    assert Image.open(out).size == (32, 32)
    assert main(["generate", "red heart", "cat face", "-n", "2", *common, "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["condition"] for row in answer["images"]] == ["red heart", "red heart", "cat face", "cat face"] and answer["guidance"] == 4.0
    assert sorted(path.name for path in out.parent.iterdir()) == ["drawn-1.png", "drawn-2.png", "drawn-3.png", "drawn-4.png", "drawn-strip.png", "drawn.png"]
    assert Image.open(out).size[0] > 64
    assert main(["generate", "red heart", "-n", "4", *common, "--out", str(out), "--json"]) == 0 and capsys.readouterr().out
    assert Image.open(out).size[1] < 4 * 32, "the four images of one text lie in a square"
    assert main(["generate", "red heart", *common, "--weaker", str(place), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guidance"] == 2.0


def test_of_a_strip_only_what_is_shown_is_decoded(place, tmp_path, monkeypatch):
    decoded = []
    decode = Generator.decode
    monkeypatch.setattr(Generator, "decode", lambda self, tokens: decoded.append(len(tokens)) or decode(self, tokens))
    assert main(["generate", "red heart", "-n", "3", "--model", str(place), "--steps", "4", "--strip", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert decoded == [3, 1, 1]


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(place, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main(["generate", "red heart", "--model", str(place), "--steps", "3", "--seed", seed, "--out", str(tmp_path / f"{name}.png")]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "draws by text: give texts, such as 'a red heart', and no labels"),
        (["heart", "--label", "3"], "draws by text"),
        ([" "], "is no text to draw"),
        (["heart", "--out", "x.jpg"], "ends in .png"),
        (["heart", "--strip", "9"], "a strip of 0 to 4 images"),
        (["heart", "-n", "0"], "1 image or more"),
        (["heart", "--guidance", "-2"], "guidance -2"),
        (["heart", "--method", "rk4"], "Choose one of euler, heun"),
        (["heart", "--weaker", "nowhere"], "unknown generator 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code = main(["generate", *arguments, "--model", str(place), "--steps", "4", "--device", "cpu"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and words in lines[0] and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("text", "share"),
    [("\u65e5\u672c\u8a9e", "mostly unknown to this model's tokenizer (3 of the 3 tokens of all)"), ("red heart \u732b", "33 % of the 3 tokens of 1 texts")],
)
def test_the_share_of_a_text_that_is_unknown_is_told(place, tmp_path, capsys, text, share):
    assert main(["generate", text, "--model", str(place), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")]) == 0
    assert share in capsys.readouterr().err


def test_of_a_word_that_no_caption_had_the_shipped_generator_tells_the_share(recwarn):
    """Each letter of it is a token that is known, and so no token of it counts as unknown."""
    drawings = ov3.load_generator("drawings", device="cpu")
    for text, words in (("a red heart", []), ("a red xqztw", ["1 of 2 words, such as 'xqztw', are hardly known to this model"])):
        drawings._conditions(text, ())
        assert [str(warning.message)[: len(words[0])] for warning in recwarn] == words


def test_a_condition_of_a_network_that_was_never_given_one_is_not_guided(root):
    sure = ov3.load_generator(written(root, "sure", drop=0.0), device="cpu")
    with pytest.raises(ValueError, match=r"trained without dropped conditions \(drop 0\)"):
        sure.generate("red heart", sampling=Sampling(steps=2, guidance=2.0))
    assert isinstance(sure._condition(["red heart"]), Condition)


def test_info_describes_it(place, capsys):
    assert main(["info", str(place)]) == 0
    told = capsys.readouterr().out
    assert "draws images of 32 px by text: 4 tokens of 64" in told and "guidance        learnt" in told and "steps: 3" in told
    assert main(["info", str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "openvision3-generator"


def test_the_shipped_generator_draws_what_the_shipped_model_then_names():
    """By the eye of the model in whose tokens it draws: chance is 2 of 16."""
    texts = ["a green heart", "a red heart", "cat face", "rocket", "a house", "a yellow star", "pizza", "a red apple"]
    drawn = ov3.load_generator("drawings", device="cpu").generate(texts, count=2, sampling=Sampling(steps=20, guidance=2.0))
    model = ov3.load("mini", device="cpu")
    named = [max(model.classify(image, texts), key=lambda pair: pair[1])[0] for image in drawn]
    assert sum(name == texts[number // 2] for number, name in enumerate(named)) >= 12
