"""The trainable of a generator: texts in groups change no number, and the host waits nowhere for a device that computes on its own."""

from __future__ import annotations

import pytest
import torch
from fake_device import DEVICE, fake_device
from tiny_generator import small_generator, tokens_folder

from openvision3.data.batches import to_device
from openvision3.generate.dit import Condition
from openvision3.generate.flow import Sampling
from openvision3.generate.rae import RAE
from openvision3.generate.space import open_space
from openvision3.model import lengths


@pytest.fixture(scope="module")
def rae(tmp_path_factory) -> RAE:
    root = tmp_path_factory.mktemp("waits")
    return RAE(small_generator(root, "unused"), open_space(tokens_folder(root))).to(DEVICE)


def test_texts_that_a_cpu_computes_in_groups_of_like_lengths_give_the_loss_and_gradients_of_all_at_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = RAE(small_generator(tmp_path, "unused", drop=0.3), open_space(tokens_folder(tmp_path)))
    for weight in model.dit.init_weights().parameters():
        weight.data.normal_(std=0.1)  # from zero, words would change nothing
    pieces = torch.tensor([9, 2, 12, 3, 1, 7, 5])
    text_ids = torch.randint(5, 50, (7, 1, 12)).masked_fill(torch.arange(12) >= pieces[:, None, None], model.space.text_encoder.pad_id)
    batch = {"images": torch.randn(7, 3, 32, 32), "text_ids": text_ids, "text_present": torch.ones(7, 1, dtype=torch.bool), "draw_key": torch.arange(7)}
    seen = []
    forward = model.dit.forward
    monkeypatch.setattr(model.dit, "forward", lambda *inputs: seen.append(inputs[3].words.shape[1]) or forward(*inputs))

    def results(group: int) -> list[torch.Tensor]:
        monkeypatch.setattr(lengths, "GROUP", group)
        model.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.dit.parameters() if p.grad is not None)]

    torch.testing.assert_close(results(3), results(100), rtol=1e-4, atol=1e-6)
    assert seen == [3, 9, 12, 12]


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_training_step_does_not_wait_for_the_device(rae, pieces):
    batch = {
        "images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        "text_ids": torch.ones(4, 2, 12, dtype=torch.long),
        "text_present": torch.ones(4, 2, dtype=torch.bool),
        "draw_key": torch.arange(4),
    }
    with fake_device() as device:
        rows = to_device(device.pin(batch), DEVICE)
        for piece in [rows] if pieces == 1 else rae.prepare([rows] * pieces):
            rae(piece)[0].backward()
    assert device.operations > 100 and not device.mixed and not device.waits


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_drawing_does_not_wait_for_the_device_between_steps_inside_and_outside_of_the_interval_of_guidance(rae, method):
    tokens, channels = rae.statistics.mean.shape
    words, present = torch.zeros(2, 5, rae.space.word_width, device=DEVICE), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    noise = torch.zeros(2, tokens, channels, device=DEVICE)
    with fake_device() as device:
        rae.draw(noise, Condition(words=words, present=present), Sampling(steps=6, method=method, guidance=2.0, interval=(0.2, 0.7)))
    assert device.operations > 500 and not device.mixed and not device.waits
