import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from openvision3.model import losses
from openvision3.model.losses import latent_loss, pixel_loss, temperature

T = torch.tensor([math.log(1 / 0.07)])


def contrastive_loss(images, texts, log_temperature, present=None):
    """One set of captions."""
    present = torch.ones(len(images), dtype=torch.bool) if present is None else present
    return losses.contrastive_loss(images, texts[:, None], log_temperature, present[:, None])


def caption_loss(logits, ids, pad_id=0):
    """The loss of logits that are given whole."""
    scored = ids[:, 1:] != pad_id
    words = logits.shape[-1]
    return losses.caption_loss(logits[:, :-1][scored], torch.eye(words), torch.zeros(words), ids[:, 1:][scored], scored.sum())


def embeddings(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (F.normalize(torch.randn(count, 8, generator=generator), dim=-1) for _ in range(2))


def by_two_loops(images, texts, temperature, present, captions=None):
    """Plain loops; of rows with the same of the `captions`, only the pair itself is scored."""
    rows = [i for i in range(len(images)) if present[i]]
    captions = captions or rows_apart(images)
    total = 0.0
    for i in rows:
        for one, other in ((images, texts), (texts, images)):
            scores = {
                j: temperature * sum(a * b for a, b in zip(one[i].tolist(), other[j].tolist(), strict=True))
                for j in rows
                if j == i or captions[j] != captions[i]
            }
            total += math.log(sum(math.exp(s) for s in scores.values())) - scores[i]
    return total / (2 * len(rows))


def rows_apart(images):
    return list(range(len(images)))


@pytest.mark.parametrize("present", [[True] * 5, [True, False, True, True, False]])
def test_rows_with_an_equal_caption_are_no_negatives_of_each_other_where_their_hashes_are_given(present):
    images, texts = embeddings()
    captions = [3, 3, 3, 4, 5]
    hashes = torch.tensor(captions)[:, None]
    loss = losses.contrastive_loss(images := images.requires_grad_(), texts[:, None], T, torch.tensor(present)[:, None], hashes)
    assert loss.item() == pytest.approx(by_two_loops(images, texts, 1 / 0.07, present, captions), rel=1e-5, abs=1e-6)
    assert loss.item() < contrastive_loss(images, texts, T, torch.tensor(present)).item()
    loss.backward()
    assert images.grad.isfinite().all()


def test_if_all_captions_are_equal_there_is_nothing_to_contrast():
    images, texts = embeddings()
    every = torch.ones(5, 1, dtype=torch.bool)
    assert losses.contrastive_loss(images, texts[:, None], T, every, torch.full((5, 1), 7)).item() == pytest.approx(0, abs=1e-6)


@given(st.lists(st.lists(st.integers(1, 30_000), min_size=1, max_size=12), min_size=2, max_size=6), st.integers(0, 5))
def test_texts_have_equal_hashes_if_and_only_if_they_are_equal_however_they_are_padded(texts, more):
    def padded(width):
        return torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])

    width = max(map(len, texts))
    hashes = losses.hash_texts(padded(width), 0)
    assert torch.equal(losses.hash_texts(padded(width + more), 0), hashes)
    for i, one in enumerate(texts):
        assert [h == hashes[i].item() for h in hashes.tolist()] == [other == one for other in texts]


@pytest.mark.parametrize("present", [[True] * 5, [True, False, True, True, False], [False, True, False, False, False]])
def test_contrastive_loss_equals_two_plain_loops(present):
    images, texts = embeddings()
    loss = contrastive_loss(images, texts, T, torch.tensor(present))
    assert loss.item() == pytest.approx(by_two_loops(images, texts, 1 / 0.07, present), rel=1e-5, abs=1e-6)
    if all(present):
        assert contrastive_loss(images, texts, T).item() == loss.item()


def test_absent_captions_get_no_gradient_and_give_none():
    images, texts = (e.requires_grad_() for e in embeddings())
    present = torch.tensor([True, False, True, True, False])
    contrastive_loss(images, texts, T, present).backward()
    for gradient in (images.grad, texts.grad):
        assert not gradient[~present].any() and gradient[present].abs().min() > 0


def test_contrastive_loss_without_any_caption_is_zero_with_zero_gradient():
    images, texts = (e.requires_grad_() for e in embeddings())
    temperature = T.clone().requires_grad_()
    loss = contrastive_loss(images, texts, temperature, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not images.grad.any() and not texts.grad.any() and not temperature.grad.any()


def test_temperature_is_clamped_at_100():
    images, texts = embeddings()
    hot, limit = contrastive_loss(images, texts, torch.tensor([9.0])), contrastive_loss(images, texts, torch.tensor([math.log(100)]))
    torch.testing.assert_close(hot, limit)
    assert temperature(torch.tensor([9.0])).item() == pytest.approx(100)
    assert contrastive_loss(images, texts, torch.tensor([math.log(99)])).item() != pytest.approx(limit.item(), rel=1e-4)


def test_a_temperature_beyond_its_limit_comes_back():
    images, texts = embeddings()
    log_temperature = torch.nn.Parameter(torch.tensor([math.log(101.0)]))
    optimizer = torch.optim.AdamW([log_temperature], lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        contrastive_loss(images, texts, log_temperature).backward()
        optimizer.step()
    assert temperature(log_temperature).item() < 99


def test_contrastive_loss_keeps_fp32_under_autocast():
    images, texts = embeddings(16)
    plain = contrastive_loss(images, texts, T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(images, texts, T), plain)


def random_captions(padding=3, pad_id=0):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 9, (3, 6 + padding), generator=generator)
    for row, length in enumerate((6, 3, 5)):
        ids[row, length:] = pad_id
    return ids, torch.randn(3, 6 + padding, 9, generator=generator)


def test_caption_loss_equals_a_hand_loop():
    ids, logits = random_captions()
    terms = []
    for row, length in enumerate((6, 3, 5)):
        for i in range(length - 1):  # the last scored word is the end token
            scores = logits[row, i].double().exp()
            terms.append(-math.log(scores[ids[row, i + 1]] / scores.sum()))
    assert len(terms) == 11
    assert caption_loss(logits, ids).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_caption_loss_ignores_length_and_logits_of_padding():
    ids, logits = random_captions()
    loss = caption_loss(logits, ids)
    shorter = caption_loss(logits[:, :6], ids[:, :6])
    changed = logits.clone()
    changed[1, 3:] = 50 * torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    assert shorter.item() == pytest.approx(loss.item(), rel=1e-6)
    assert caption_loss(changed, ids).item() == pytest.approx(loss.item(), rel=1e-6)


def test_caption_loss_follows_the_padding_mark():
    ids, logits = random_captions()
    other = torch.where(ids == 0, 10, ids)  # another tokenizer's padding
    wide = F.pad(logits, (0, 2), value=-1e4)
    torch.testing.assert_close(caption_loss(wide, other, pad_id=10), caption_loss(logits, ids, pad_id=0))
    assert caption_loss(wide, other, pad_id=0).item() > 1e3


def test_caption_loss_of_nothing_is_zero():
    loss = caption_loss(torch.randn(2, 4, 9, requires_grad=True), torch.zeros(2, 4, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("loss", [pixel_loss, latent_loss])
def test_l1_is_a_mean_over_all_values_of_the_global_batch(loss):
    a, b = torch.tensor([[[[1.0, -1.0], [0.5, 0.0]]]]), torch.tensor([[[[0.0, -1.0], [-0.5, 0.25]]]])
    assert loss(a, b, torch.tensor(1)).item() == pytest.approx((1 + 0 + 1 + 0.25) / 4)
    assert loss(a, b, torch.tensor(3)).item() == pytest.approx((1 + 0 + 1 + 0.25) / 12)
    fine = torch.full((2, 3, 64, 64), 0.1)
    assert loss(fine, (fine * 1.01).bfloat16(), torch.tensor(2)).dtype == torch.float32


def test_captions_of_several_sets_are_averaged_over_the_sets_that_anyone_has():
    images, texts = embeddings()
    _, others = embeddings(seed=1)
    present = torch.tensor([True, False, True, True, False])
    first, second = contrastive_loss(images, texts, T), contrastive_loss(images, others, T, present)
    every, none = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    both = losses.contrastive_loss(images, torch.stack([texts, others], 1), T, torch.stack([every, present], 1))
    torch.testing.assert_close(both, (first + second) / 2)
    torch.testing.assert_close(losses.contrastive_loss(images, torch.stack([texts, others], 1), T, torch.stack([every, none], 1)), first)


class Largest(TorchDispatchMode):
    """The most numbers that any result held."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            self.numbers = max(self.numbers, value.numel() if isinstance(value, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("kind", ["contrastive", "caption"])
def test_in_chunks_losses_and_gradients_are_the_same_and_the_logits_never_exist_as_a_whole(monkeypatch, kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "contrastive":
        inputs = [F.normalize(torch.randn(64, 8, generator=generator), dim=-1), F.normalize(torch.randn(64, 2, 8, generator=generator), dim=-1), T.clone()]
        present = torch.rand(64, 2, generator=generator) > 0.3

        def loss(images, texts, log_temperature):
            return losses.contrastive_loss(images, texts, log_temperature, present)
    else:
        inputs = [torch.randn(100, 8, generator=generator), torch.randn(50, 8, generator=generator), torch.randn(50, generator=generator)]
        targets = torch.randint(50, (100,), generator=generator)

        def loss(features, weight, bias):
            return losses.caption_loss(features, weight, bias, targets, torch.tensor(100))

    results = []
    for chunk in (2**24, 320):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        values = [value.clone().requires_grad_() for value in inputs]
        with Largest() as largest:
            total = loss(*values)
            gradients = torch.autograd.grad(total, values)
        results.append((total, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert largest.numbers <= 1024 < (4096 if kind == "contrastive" else 5000)
