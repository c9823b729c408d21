"""The diffusion transformer: what conditions it, and that its words, labels and head do what they should. `test_public` has the parity of its blocks."""

from __future__ import annotations

import pytest
import torch

from openvision3.generate.dit import Condition, DiT, DiTConfig, dit_config

GRID = (2, 3)


def small(words: str = "keys", *, head: int = 1, classes: int = 0, word_width: int = 0, qk_norm: bool = True) -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(32, 2, 2, head_width=48, head_depth=head, head_heads=2, qk_norm=qk_norm, words=words)  # type: ignore[arg-type]
    dit = DiT(config, 8, classes, word_width).init_weights().eval()
    for parameter in dit.parameters():  # modulations begin at zero, and nothing would reach the output
        torch.nn.init.normal_(parameter, std=0.2)
    return dit


def inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, 8, generator=generator), torch.rand(rows, generator=generator)


def texts(rows: int = 3, length: int = 4) -> Condition:
    generator = torch.Generator().manual_seed(2)
    return Condition(words=torch.randn(rows, length, 16, generator=generator), present=torch.arange(length) < torch.tensor([[4], [2], [1]])[:rows])


def test_a_new_network_predicts_nothing_whatever_it_is_given():
    dit = DiT(DiTConfig(32, 2, 2, head_width=48, head_depth=1, head_heads=2), 8, 3).init_weights()
    x, t = inputs()
    assert dit(x, t, GRID, Condition(labels=torch.tensor([0, 1, 2]))).abs().max() == 0


@pytest.mark.parametrize(("size", "millions"), [("S", 196.5), ("B", 294.3), ("L", 621.7), ("XL", 838.7)])
def test_sizes_are_those_of_the_publication(size, millions):
    config = dit_config(size)
    config.stored_positions = 256
    with torch.device("meta"):
        dit = DiT(config, 768, 1000)
    numbers = sum(value.numel() for value in dit.state_dict().values())
    assert numbers / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("words", ["keys", "cross"])
def test_padding_of_a_text_is_not_seen_and_its_words_are(words):
    dit, (x, t), condition = small(words, word_width=16), inputs(), texts()
    with torch.no_grad():
        before = dit(x, t, GRID, condition)
        other = condition.words.clone()
        other[~condition.present] = 7.0
        assert torch.equal(dit(x, t, GRID, condition._replace(words=other)), before)
        other = condition.words.clone()
        other[1, 1] += 1.0
        changed = (dit(x, t, GRID, condition._replace(words=other)) - before).abs().amax((1, 2))
    assert changed[1] > 1e-4 and changed[0] == changed[2] == 0


@pytest.mark.parametrize("words", ["keys", "cross"])
def test_the_order_of_words_in_memory_does_not_matter_but_which_words_are_there_does(words):
    """Positions are in the words already: the text encoder has put them there."""
    dit, (x, t), condition = small(words, word_width=16), inputs(1), texts(1)
    turned = Condition(words=condition.words.flip(1), present=condition.present.flip(1))
    with torch.no_grad():
        torch.testing.assert_close(dit(x, t, GRID, condition), dit(x, t, GRID, turned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["label", "keys", "cross"])
def test_a_dropped_row_does_not_depend_on_its_condition_and_the_others_do(kind):
    dit = small("keys" if kind == "label" else kind, classes=3 if kind == "label" else 0, word_width=0 if kind == "label" else 16)
    x, t = inputs()
    one = Condition(labels=torch.tensor([0, 1, 2])) if kind == "label" else texts()
    other = Condition(labels=torch.tensor([1, 2, 0])) if kind == "label" else one._replace(words=one.words + 1, present=torch.ones_like(one.present))
    dropped = torch.tensor([True, False, True])
    with torch.no_grad():
        first, second = (dit(x, t, GRID, condition.with_dropped(dropped)) for condition in (one, other))
    changed = (first - second).abs().amax((1, 2))
    assert changed[0] < 1e-5 and changed[2] < 1e-5 and changed[1] > 1e-4


@pytest.mark.parametrize("head", [0, 1])
def test_the_trunk_reaches_the_output_through_the_head_alone_if_there_is_one(head):
    dit = small(head=head, classes=3)
    x, t = inputs()
    condition = Condition(labels=torch.tensor([0, 1, 2]))
    with torch.no_grad():
        before = dit(x, t, GRID, condition)
        dit.enter.weight.add_(0.1)  # the trunk's own embedding of the noisy tokens
        assert (dit(x, t, GRID, condition) - before).abs().max() > 1e-4
        if head:
            dit.to_head.weight.zero_()
            silent = dit(x, t, GRID, condition)
            dit.enter.weight.add_(0.1)
            assert torch.equal(dit(x, t, GRID, condition), silent)


def test_rows_do_not_see_each_other():
    dit, (x, t), condition = small(word_width=16), inputs(), texts()
    with torch.no_grad():
        alone = dit(x[1:2], t[1:2], GRID, Condition(condition.labels, condition.words[1:2], condition.present[1:2]))
        torch.testing.assert_close(dit(x, t, GRID, condition)[1:2], alone, rtol=1e-5, atol=1e-5)


def test_the_place_of_a_token_matters():
    """Two equal noisy tokens at different places are predicted differently."""
    dit = small(classes=1)
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(3)).expand(1, 6, 8)
    with torch.no_grad():
        found = dit(x, torch.tensor([0.5]), GRID, Condition(labels=torch.tensor([0])))[0]
    assert (found - found[:1]).abs().amax(1)[1:].min() > 1e-4


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: dit_config("XXL"), "unknown size of a DiT 'XXL'"),
        (lambda: DiTConfig(width=30, heads=4), "multiple of heads"),
        (lambda: DiTConfig(width=12, heads=2), "multiple of 4"),
        (lambda: DiTConfig(words="sum"), "words cannot be 'sum'"),
        (lambda: DiT(DiTConfig(32, 1, 2, head_depth=0), 8, 3, 16), "by labels or by texts"),
        (lambda: small(classes=3)(*inputs(), GRID), "draws by labels"),
        (lambda: small(word_width=16)(*inputs(), GRID), "draws by texts"),
    ],
)
def test_what_does_not_fit_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
