import itertools

import pytest
import torch
import torch.nn.functional as F
from shapes import BEGIN, CLASS, END, PAD, VOCABULARY, captions, torchs_layer

from openvision3.model.understanding import Captioner, CaptionerConfig, TextEncoder, TextEncoderConfig, class_embedding

PAPER = {  # width, depth, heads: the paper's line of text towers
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "M": (512, 12, 8),
    "B": (512, 12, 8),
    "L": (768, 12, 12),
    "So400m": (1152, 27, 16),
    "H": (1024, 24, 16),
}


def spread(network, std=0.25):
    """Weights large enough that the next word depends on all that it may see."""
    torch.manual_seed(0)
    network.init_weights()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return network


def text_encoder(**changes) -> TextEncoder:
    return spread(TextEncoder(TextEncoderConfig(**{"size": "tiny", "positions": 12, **changes}), VOCABULARY, 16, PAD))


def captioner(vocabulary=VOCABULARY, positions=16, std=0.35) -> Captioner:
    network = spread(Captioner(CaptionerConfig("tiny", positions), vocabulary, 48), std)
    torch.nn.init.zeros_(network.output_bias)
    return network


def tokens(rows=3, count=6, seed=1) -> torch.Tensor:
    return torch.randn(rows, count, 48, generator=torch.Generator().manual_seed(seed))


def log_probability(network, u, words, end) -> float:
    """Of one caption with its end token, from the teacher-forced pass."""
    ids = torch.tensor([[BEGIN, *words]])
    logits = network(u[None], ids)[0]
    logits[:, BEGIN] = -torch.inf
    table = logits.log_softmax(-1)
    return sum(table[i, word].item() for i, word in enumerate([*words, end] if end is not None else words))


@pytest.mark.parametrize("name", PAPER)
def test_every_text_size_of_the_paper_has_its_shapes(name):
    width, depth, heads = PAPER[name]
    with torch.device("meta"):
        texts, writer = TextEncoder(TextEncoderConfig(name), 32000, 768), Captioner(CaptionerConfig(name), 32000, 768)
    for tower, positions in ((texts, 80), (writer, 128)):
        assert tuple(tower.positions.shape) == (positions, width)
        assert tuple(tower.embedding.weight.shape) == (32000, width)
        assert len(tower.blocks) == depth
        assert tower.blocks[0].attention.heads == heads
        assert tuple(tower.blocks[-1].attention.qkv.weight.shape) == (3 * width, width)
        assert tower.blocks[0].mlp.approximate == "tanh"
    assert tuple(texts.projection.weight.shape) == (768, width)
    assert tuple(writer.embed_tokens.weight.shape) == (width, 768)


@pytest.mark.parametrize("make", [text_encoder, captioner])
def test_init_weights_reaches_every_parameter(make):
    network = make()
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    network.init_weights()
    assert not any(p.isnan().any() for p in network.parameters())


# -- text encoder ------------------------------------------------------------------------------------------------------


def test_a_texts_embedding_does_not_depend_on_padding():
    network = text_encoder()
    words = torch.cat([captions(1, 4, torch.Generator().manual_seed(0)), torch.tensor([[CLASS]])], 1)
    alone = network(words)
    for width in (6, 12):
        padded = torch.full((2, width), PAD)
        padded[0, :5] = words
        padded[1] = CLASS  # a neighbour of full length
        torch.testing.assert_close(network(padded)[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_text_is_read_in_both_directions_and_at_its_class_mark():
    network = text_encoder()
    text = torch.cat([captions(1, 4, torch.Generator().manual_seed(0)), torch.tensor([[CLASS]])], 1)
    embedding = network(text)
    for position in range(5):
        changed = text.clone()
        changed[0, position] = (text[0, position] + 7) % VOCABULARY or 1
        assert (network(changed) - embedding).abs().max() > 1e-3
    seen = []
    network.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    later = text.clone()
    later[0, 3] = (text[0, 3] + 7) % VOCABULARY or 1
    network(text), network(later)
    assert (seen[0][0, 0] - seen[1][0, 0]).abs().max() > 1e-4  # the first word sees the fourth


def test_a_text_embedding_is_that_of_torchs_layers_on_the_same_weights():
    network = text_encoder()
    ids = torch.full((3, 7), PAD)
    for row, length in enumerate((6, 2, 4)):
        ids[row, : length + 1] = torch.cat([captions(1, length, torch.Generator().manual_seed(row))[0], torch.tensor([CLASS])])
    x = network.embedding.weight[ids] + network.positions[:7]
    for block in network.blocks:
        x = torchs_layer(block, "tanh")(x, src_key_padding_mask=ids == PAD)
    last = torch.stack([x[0, 6], x[1, 2], x[2, 4]])
    expected = F.layer_norm(last, (64,), network.norm.weight, network.norm.bias, 1e-6) @ network.projection.weight.T
    torch.testing.assert_close(network(ids), expected, rtol=1e-3, atol=1e-3)


def test_a_row_of_padding_gives_numbers():
    ids = torch.full((2, 5), PAD)
    ids[1, 0] = CLASS
    assert text_encoder()(ids).isfinite().all()


# -- captioner ---------------------------------------------------------------------------------------------------------


def test_the_tokens_that_a_captioner_sees_in_training_depend_on_the_key_of_their_row_alone():
    network, u, keys = captioner(), tokens(4, 16), torch.tensor([7, 2**62 + 5, 9, 7])
    network.config.token_share = 0.35
    chosen = network.choose_tokens(u, keys)
    assert chosen.shape == (4, 6, 48)  # 5.6 of 16
    assert torch.equal(network.choose_tokens(u[1:3], keys[1:3]), chosen[1:3])
    places = (chosen[:, :, None] == u[:, None]).all(-1).float().argmax(-1)
    assert torch.equal(u.gather(1, places[:, :, None].expand(-1, -1, 48)), chosen)  # tokens of the same row
    assert all(len(set(row)) == 6 for row in places.tolist())  # none twice
    assert torch.equal(places[0], places[3]) and set(places[0].tolist()) != set(places[2].tolist())


def test_every_token_is_as_likely_to_be_seen_as_any_other():
    network = captioner()
    network.config.token_share = 0.25
    places = network.choose_tokens(torch.arange(8.0).view(1, 8, 1).expand(4000, 8, 1), torch.arange(4000))
    shares = places.flatten().long().bincount(minlength=8) / 4000
    assert (shares - 0.25).abs().max() < 0.03  # 4.4 standard deviations


def test_logits_with_cache_equal_those_without():
    network, u = captioner(), tokens()
    ids = torch.cat([torch.full((3, 1), BEGIN), captions(3, 8, torch.Generator().manual_seed(2))], 1)
    whole = network(u, ids)
    caches = network.read(u)
    steps = torch.stack([network.step(ids[:, i], i, caches) for i in range(9)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_logits_are_those_of_torchs_layers_on_the_same_weights():
    network, u = captioner(), tokens()
    ids = torch.cat([torch.full((3, 1), BEGIN), captions(3, 4, torch.Generator().manual_seed(2))], 1)
    x = torch.cat([u @ network.embed_tokens.weight.T + network.embed_tokens.bias, network.embedding.weight[ids] + network.positions[:5]], 1)
    hidden = torch.zeros(11, 11, dtype=torch.bool)
    for row in range(11):
        for column in range(11):
            hidden[row, column] = column > row and not (row < 6 and column < 6)
    for block in network.blocks:
        x = torchs_layer(block, "tanh")(x, src_mask=hidden)
    expected = F.layer_norm(x[:, 6:], (64,), network.norm.weight, network.norm.bias, 1e-6) @ network.embedding.weight.T + network.output_bias
    torch.testing.assert_close(network(u, ids), expected, rtol=1e-3, atol=1e-3)


def test_words_see_their_past_and_every_token_only():
    network, u = captioner(), tokens(1)
    ids = torch.cat([torch.full((1, 1), BEGIN), captions(1, 6, torch.Generator().manual_seed(2))], 1)
    logits = network(u, ids)
    later = ids.clone()
    later[0, 4:] = BEGIN
    assert torch.equal(network(u, later)[:, :4], logits[:, :4])
    assert (network(u, later)[:, 4:] - logits[:, 4:]).abs().amax(-1).min() > 1e-3
    for position in range(6):
        changed = u.clone()
        changed[0, position] += 1
        assert (network(changed, ids) - logits).abs().amax(-1).min() > 1e-5


def test_tokens_see_each_other():
    network, u = captioner(), tokens(1)
    changed = u.clone()
    changed[0, -1] += 1
    first = network.read(u)[1].keys[:, :, 0]  # second block: the first token after one attention
    assert (network.read(changed)[1].keys[:, :, 0] - first).abs().max() > 1e-4


def test_greedy_takes_the_likeliest_word_until_the_end_mark():
    network, u = captioner(), tokens(8)
    written = network.write(u, BEGIN, END, max_length=8)
    lengths = set()
    for row, words in zip(u, written, strict=True):
        expected: list[int] = []
        for _ in range(8):
            logits = network(row[None], torch.tensor([[BEGIN, *expected]]))[0, -1]
            logits[BEGIN] = -torch.inf
            word = int(logits.argmax())
            if word == END:
                break
            expected.append(word)
        assert words == expected
        lengths.add(len(words))
    assert len(lengths) > 1 and min(lengths) < 8  # some have met their end token, at different places


def test_a_caption_stops_at_its_end_mark_whatever_its_neighbours_do():
    network, u = captioner(), tokens(8)
    together = network.write(u, BEGIN, END, max_length=8)
    assert together == [network.write(row[None], BEGIN, END, max_length=8)[0] for row in u]
    assert not any(END in words or BEGIN in words for words in together)
    with torch.no_grad():
        network.output_bias[END] += 1e4
    assert network.write(u, BEGIN, END, max_length=8) == [[]] * 8
    assert network.write_beam(u, BEGIN, END, max_length=8) == [[]] * 8


def test_the_begin_mark_is_never_written():
    network = captioner()
    with torch.no_grad():
        network.output_bias[BEGIN] += 1e4
    assert not any(BEGIN in words for words in network.write(tokens(), BEGIN, END, max_length=6))
    assert not any(BEGIN in words for words in network.write_beam(tokens(), BEGIN, END, max_length=6))
    generator = torch.Generator().manual_seed(0)
    assert not any(BEGIN in words for words in network.write(tokens(), BEGIN, END, max_length=6, top_p=1.0, generator=generator))


def test_a_tiny_nucleus_equals_greedy():
    network, u = captioner(), tokens(8)
    greedy = network.write(u, BEGIN, END, max_length=8)
    assert network.write(u, BEGIN, END, max_length=8, top_p=1e-6, generator=torch.Generator().manual_seed(0)) == greedy


def test_sampling_repeats_with_its_generator_and_follows_the_probabilities():
    network, u = captioner(std=0.1), tokens(1).expand(4000, -1, -1)

    def draw(seed, **options):
        return network.write(u, BEGIN, END, max_length=1, generator=torch.Generator().manual_seed(seed), **options)

    assert draw(0, top_p=1.0) == draw(0, top_p=1.0) != draw(1, top_p=1.0)
    logits = network(u[:1], torch.tensor([[BEGIN]]))[0, 0]
    logits[BEGIN] = -torch.inf
    for top_p, temperature in ((1.0, 1.0), (0.5, 1.0), (0.9, 0.3)):
        expected = (logits / temperature).softmax(-1)
        kept, mass = [], 0.0
        for word in expected.argsort(descending=True).tolist():
            kept.append(word)
            mass += expected[word].item()
            if mass >= top_p:
                break
        counts = torch.zeros(VOCABULARY)
        for words in draw(2, top_p=top_p, temperature=temperature):
            counts[words[0] if words else END] += 1
        assert set(counts.nonzero().flatten().tolist()) <= set(kept)
        for word in kept:
            assert abs(counts[word].item() / 4000 - expected[word].item() / mass) < 0.04


@pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
def test_a_beam_of_one_equals_greedy(penalty):
    network, u = captioner(), tokens(12)
    greedy = network.write(u, BEGIN, END, max_length=8)
    assert network.write_beam(u, BEGIN, END, max_length=8, beams=1, length_penalty=penalty) == greedy
    assert len({len(words) for words in greedy}) > 1


@pytest.mark.parametrize("penalty", [pytest.param(0.0, marks=pytest.mark.slow), 0.6, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_beam_that_holds_every_caption_finds_the_best_one(penalty):
    """Six words, captions of at most 3: brute force over all of them. So it also scores at least what greedy does."""
    network, better = captioner(vocabulary=6, positions=4, std=0.1), 0
    for row in tokens(8, seed=4):
        scores = {}
        for length in range(4):
            for words in itertools.product([w for w in range(6) if w not in (BEGIN, END)], repeat=length):
                end, counted = (END, length + 1) if length < 3 else (None, 3)
                scores[words] = log_probability(network, row, words, end) / counted**penalty
        best = tuple(network.write_beam(row[None], BEGIN, END, max_length=3, beams=200, length_penalty=penalty)[0])
        assert scores[best] == pytest.approx(max(scores.values()), abs=1e-4)
        greedy = tuple(network.write(row[None], BEGIN, END, max_length=3)[0])
        assert scores[best] >= scores[greedy] - 1e-4
        better += scores[best] > scores[greedy] + 1e-3
    assert better > 0  # and the search is worth something


def test_a_beam_of_four_scores_at_least_what_greedy_does():
    network, u, better = captioner(), tokens(8), 0
    for row in u:
        scores = []
        for words in (network.write_beam(row[None], BEGIN, END, max_length=6, length_penalty=0.0)[0], network.write(row[None], BEGIN, END, max_length=6)[0]):
            scores.append(log_probability(network, row, words, END if len(words) < 6 else None))
        assert scores[0] >= scores[1] - 1e-4
        better += scores[0] > scores[1] + 1e-3
    assert better > 0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: TextEncoderConfig("XL"), "unknown size 'XL'"),
        (lambda: CaptionerConfig("XL"), "unknown size 'XL'"),
        (lambda: CaptionerConfig("tiny", 1), "positions 1"),
        (lambda: CaptionerConfig("tiny", token_share=0.0), "token_share 0.0 must be above 0 and at most 1"),
        (lambda: CaptionerConfig("tiny", token_share=1.1), "token_share 1.1 must be above 0 and at most 1"),
        (lambda: text_encoder()(torch.ones(1, 13, dtype=torch.long)), "13 pieces are longer than .* 12 positions"),
        (lambda: captioner()(tokens(1), torch.ones(1, 17, dtype=torch.long)), "17 pieces are longer than .* 16 positions"),
        (lambda: captioner().write(tokens(), BEGIN, END, max_length=16), "max_length 16 must be from 1 to 15"),
        (lambda: captioner().write_beam(tokens(), BEGIN, END, max_length=0), "max_length 0 must be from 1 to 15"),
        (lambda: captioner().write_beam(tokens(), BEGIN, END, max_length=4, beams=0), "beams 0"),
        (lambda: captioner().write(tokens(), BEGIN, END, max_length=4, top_p=1.5), "top_p 1.5"),
        (lambda: captioner().write(tokens(), BEGIN, END, max_length=4, top_p=0.5, temperature=0.0), "temperature 0.0"),
        (lambda: captioner().write(tokens(), BEGIN, END, max_length=4, top_p=0.5, temperature=float("nan")), "temperature nan"),
        (lambda: captioner().write_beam(tokens() * float("nan"), BEGIN, END, max_length=4), "NaN or infinity"),
        (lambda: captioner()(torch.zeros(1, 6, 32), torch.ones(1, 3, dtype=torch.long)), r"\(1, 6, 32\) .* pass \(B, N, 48\)"),
        (lambda: text_encoder()(torch.ones(2, 0, dtype=torch.long)), r"\(2, 0\)"),
    ],
)
def test_what_is_wrong_gets_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_class_embedding_is_the_mean_direction_of_its_texts_at_unit_length():
    torch.manual_seed(0)
    first, second = F.normalize(torch.randn(3, 8), dim=-1), F.normalize(torch.randn(1, 8), dim=-1)
    found = class_embedding([first * torch.tensor([[1.0], [5.0], [0.2]]), second])
    mean = first.sum(0) / 3
    assert torch.allclose(found[0], mean / mean.norm()) and torch.allclose(found[1], second[0])
