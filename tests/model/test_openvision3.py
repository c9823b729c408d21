import math

import pytest
import torch
import torch.nn.functional as F
from shapes import BEGIN, END, PAD, VOCABULARY, batch, fitted_network, tiny_config, tiny_model, tiny_network, tiny_vae

from openvision3.model import lengths, losses
from openvision3.model.openvision3 import LossConfig, OpenVision3
from openvision3.model.vae import VAE
from openvision3.networks.perceptual import EfficientNetDistance

PARTS = {"latent", "pixel", "perceptual", "contrastive", "caption"}


def zero(*arguments):
    """In place of a loss: nothing, and no gradient."""
    return arguments[0].sum() * 0


def test_forward_is_the_papers_equations():
    weights = {"omega_rec": 0.7, "omega_und": 1.3, "alpha": 0.6, "beta": 0.4, "lambda_perceptual": 0.5}
    model, rows = tiny_model(tau=0.0, **weights), batch(sets=2)
    loss, parts = model(rows)

    x = rows["images"]
    z = model.vae.encode(x)
    u, pooled = model.encoder(z)
    z_hat = model.latent_decoder(u, (2, 2))
    x_hat = model.vae.decode(z_hat)
    pixel, latent = (x - x_hat).abs().mean(), (z - z_hat).abs().mean()
    perceptual = EfficientNetDistance()(x, x_hat)
    contrastive = 0
    for k in range(2):
        cosines = F.normalize(pooled, dim=-1) @ F.normalize(model.text_encoder(rows["text_ids"][:, k]), dim=-1).T / 0.07
        contrastive = contrastive - (cosines.log_softmax(0).diagonal().mean() + cosines.log_softmax(1).diagonal().mean()) / 4
    ids = rows["caption_ids"]
    scores = model.captioner(u, ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    caption = -scores[ids[:, 1:] != PAD].mean()
    expected = 0.7 * (pixel + 0.4 * latent + 0.5 * perceptual) + 1.3 * (caption + 0.6 * contrastive)

    for name, value in {"pixel": pixel, "latent": latent, "perceptual": perceptual, "contrastive": contrastive, "caption": caption}.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(parts) == PARTS


def test_texts_that_a_cpu_computes_in_groups_of_like_lengths_give_the_loss_and_gradients_of_all_at_once(monkeypatch):
    model, rows = tiny_model(), batch(7, sets=2)
    rows["text_ids"][2, 1], rows["text_present"][2, 1] = PAD, False
    rows["caption_ids"] = rows["caption_ids"][[6, 1, 5, 0, 4, 2, 3]]

    def results(group: int) -> list[torch.Tensor]:
        monkeypatch.setattr(lengths, "GROUP", group)
        model.zero_grad()
        loss, _ = model(rows)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    widths = []
    features = model.captioner.features
    monkeypatch.setattr(model.captioner, "features", lambda tokens, ids: widths.append(ids.shape[1]) or features(tokens, ids))
    torch.testing.assert_close(results(3), results(100), rtol=1e-4, atol=1e-6)
    assert widths == [5, 7, 8, 10]  # three groups, each as wide as its longest, then all at once


# -- what is frozen, what learns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", sorted(PARTS))
def test_each_branch_alone_moves_the_encoder_and_never_the_vae(branch, monkeypatch):
    for name in PARTS - {"perceptual", branch}:
        monkeypatch.setattr(losses, f"{name}_loss", zero)
    model = tiny_model(lambda_perceptual=1.0 if branch == "perceptual" else 0.0)
    before = {name: value.clone() for name, value in model.vae.state_dict().items()}
    loss, _ = model(batch())
    loss.backward()
    assert {p.grad for p in model.vae.parameters()} == {None}
    for name, parameter in model.encoder.named_parameters():
        if name.startswith("pool") and branch != "contrastive":
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad.abs().max() > 0, name
    moved = {
        name
        for name in ("latent_decoder", "text_encoder", "captioner")
        if any(p.grad is not None and p.grad.any() for p in model.get_submodule(name).parameters())
    }
    assert moved == {"contrastive": {"text_encoder"}, "caption": {"captioner"}}.get(branch, {"latent_decoder"})
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5).step()
    after = model.vae.state_dict()
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


def test_no_loss_no_gradient(monkeypatch):
    for name in PARTS - {"perceptual"}:
        monkeypatch.setattr(losses, f"{name}_loss", zero)
    model = tiny_model()
    loss, _ = model(batch())
    loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_trained_state_is_all_that_learns():
    model = tiny_model(lambda_perceptual=0.5)
    model(batch())  # builds the perceptual network, which is not the model's
    state = model.trained_state()
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    other = tiny_model(seed=1, lambda_perceptual=0.5)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("vae.") for name in missing)
    assert model(batch())[0].item() == other(batch())[0].item()


def test_init_weights_reaches_every_parameter_on_a_meta_built_model():
    vae = tiny_vae()
    with torch.device("meta"):
        model = OpenVision3(tiny_config(), vae, VOCABULARY, PAD)
    for part in (model.encoder, model.latent_decoder, model.text_encoder, model.captioner):
        part.to_empty(device="cpu")
    model.log_temperature = torch.nn.Parameter(torch.empty(1))
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            torch.nn.init.constant_(parameter, math.nan)
    model.init_weights()
    assert not any(p.isnan().any() for p in model.parameters())
    assert model.temperature.item() == pytest.approx(1 / 0.07)
    assert model(batch())[0].isfinite()


# -- learning --------------------------------------------------------------------------------------------------------------


def learn(model: OpenVision3, rows, steps: int) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    history = []
    for _ in range(steps):
        loss, parts = model(rows)
        history.append({"loss": loss.item()} | {name: value.item() for name, value in parts.items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return history


def test_one_batch_overfits_on_all_five_losses():
    rows = batch()
    model = tiny_model(VAE(fitted_network(rows["images"])), lambda_perceptual=0.5, tau=0.1, omega_rec=4.0)
    history = learn(model, rows, 150)
    for name in PARTS:
        assert history[-1][name] < 0.4 * history[0][name], name

    with torch.no_grad():  # and what it has learnt, it can say and draw
        tokens = model.encode(rows["images"])
        written = model.captioner.write(tokens, BEGIN, END, max_length=12)
        assert written == [[w for w in row if w not in (BEGIN, END, PAD)] for row in rows["caption_ids"].tolist()]
        matches = model.embed_images(rows["images"]) @ model.embed_texts(rows["text_ids"][:, 0]).T
        assert matches.argmax(1).tolist() == [0, 1, 2, 3]
        error = (model.decode(tokens, (2, 2)) - rows["images"]).abs().mean().item()
        assert error < 0.3 * rows["images"].abs().mean().item()


def test_the_same_seed_gives_the_same_losses_twice():
    first, second, other = (learn(tiny_model(seed=seed), batch(), 5) for seed in (0, 0, 1))
    assert first == second
    assert first[-1]["loss"] != other[-1]["loss"]


# -- draws and batches -------------------------------------------------------------------------------------------------------


def test_no_draw_key_is_no_noise():
    rows = batch()
    still = {name: value for name, value in rows.items() if name != "draw_key"}
    noisy, calm = tiny_model(tau=0.8), tiny_model(tau=0.0)
    assert noisy(still)[0].item() == calm(still)[0].item() == calm(rows)[0].item()
    assert noisy(rows)[1]["latent"].item() != noisy(still)[1]["latent"].item()
    for name in ("contrastive", "caption"):  # noise is for reconstruction only
        assert noisy(rows)[1][name].item() == noisy(still)[1][name].item()


def test_the_captioner_sees_part_of_the_tokens_where_draws_are_and_nothing_else_changes():
    model, rows = tiny_model(), batch()
    whole, whole_still = model(rows)[1], model({name: value for name, value in rows.items() if name != "draw_key"})[1]
    model.config.captioner.token_share = 0.5
    part, still = model(rows)[1], model({name: value for name, value in rows.items() if name != "draw_key"})[1]
    assert still == whole_still
    assert part["caption"] != whole["caption"] and {**part, "caption": 0} == {**whole, "caption": 0}
    tokens = model.captioner.choose_tokens(model.encode(rows["images"]), rows["draw_key"])
    assert tokens.shape[1] == 2
    logits, words = model.captioner(tokens, rows["caption_ids"])[:, :-1], rows["caption_ids"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), words, ignore_index=model.pad_id)
    torch.testing.assert_close(part["caption"], expected.detach())


def test_two_half_batches_rebuild_what_the_whole_batch_does():
    model, rows = tiny_model(), batch()
    latent, pixel = (
        torch.stack([model(half)[1][name] for half in ({k: v[i : i + 2] for k, v in rows.items()} for i in (0, 2))]).mean() for name in ("latent", "pixel")
    )
    _, parts = model(rows)
    torch.testing.assert_close(latent, parts["latent"])
    torch.testing.assert_close(pixel, parts["pixel"])


def test_pixel_rows_are_the_rows_that_are_decoded():
    model, rows = tiny_model(tau=0.0, beta=0.4), batch()
    seen = []
    model.vae.network.decoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    _, parts = model(rows | {"pixel_rows": torch.tensor([2, 0])})
    chosen = {name: value[[2, 0]] for name, value in rows.items()}
    assert seen == [2]
    assert parts["pixel"].item() == pytest.approx(model(chosen)[1]["pixel"].item(), rel=1e-5)
    assert parts["latent"].item() == model(rows)[1]["latent"].item()
    seen.clear()
    loss, parts = model(rows | {"pixel_rows": torch.tensor([], dtype=torch.long)})
    assert seen == [] and parts["pixel"].item() == 0
    assert loss.item() == pytest.approx((0.5 * 0.4 * parts["latent"] + parts["caption"] + parts["contrastive"]).item(), rel=1e-5)


def test_a_caption_set_counts_only_where_it_is():
    model, rows = tiny_model(), batch(sets=2)
    one = model(rows | {"text_ids": rows["text_ids"][:, :1], "text_present": rows["text_present"][:, :1]})[1]["contrastive"]
    rows["text_present"][:, 1] = False
    assert model(rows)[1]["contrastive"].item() == pytest.approx(one.item(), rel=1e-6)  # an empty set does not halve the loss
    rows["text_present"][1:3, 1] = True
    images = model.embed_images(rows["images"])
    texts = model.embed_texts(rows["text_ids"][1:3, 1])[:, None]
    second = losses.contrastive_loss(images[1:3], texts, model.log_temperature, torch.ones(2, 1, dtype=torch.bool))
    assert model(rows)[1]["contrastive"].item() == pytest.approx((one + second).item() / 2, rel=1e-4)
    rows["text_present"][:] = False
    assert model(rows)[1]["contrastive"].item() == 0


def test_without_text_present_every_caption_is_there():
    model, rows = tiny_model(), batch(sets=2)
    assert model({name: value for name, value in rows.items() if name != "text_present"})[0].item() == model(rows)[0].item()


# -- the balance of the branches ---------------------------------------------------------------------------------------------


def gradient_on_tokens(**weights: float) -> torch.Tensor:
    """Of the loss with these weights, taken at tokens that are leaves."""
    model, rows = tiny_model(tau=0.8, **weights), batch()
    tokens = model.encoder(model.vae.encode(rows["images"]))[0].detach().requires_grad_()
    model.encoder.forward = lambda latents: (tokens, model.encoder.pool(tokens))
    model(rows)[0].backward()
    return tokens.grad


def test_the_squares_are_those_of_each_branchs_gradient_on_the_tokens():
    rec, und = gradient_on_tokens(omega_rec=0.7, omega_und=0.0), gradient_on_tokens(omega_rec=0.0, omega_und=1.3)
    balanced, plain = (tiny_model(tau=0.8, omega_rec=0.7, omega_und=1.3, gradient_ratio=ratio) for ratio in (2.0, 0.0))
    loss, parts = balanced(batch())
    loss.backward()
    assert parts["reconstruction_squares"].sqrt().item() == pytest.approx(rec.norm().item(), rel=1e-4)
    assert parts["understanding_squares"].sqrt().item() == pytest.approx(und.norm().item(), rel=1e-4)
    plain(batch())[0].backward()
    for (name, one), other in zip(balanced.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7), name


def test_an_evaluation_weighs_as_the_config_says_and_measures_nothing():
    model = tiny_model(tau=0.0, gradient_ratio=1.0)
    expected, parts = tiny_model(tau=0.0).eval()(batch())
    model.omega_rec = 100.0
    loss, its_parts = model.eval()(batch())
    assert loss.item() == expected.item() and its_parts.keys() == parts.keys()


def test_a_ratio_needs_both_branches():
    for other in ({"encoder_learns_from": "understanding"}, {"omega_rec": 0.0}, {"omega_und": 0.0}):
        with pytest.raises(ValueError, match=r"^gradient_ratio 1.0 compares the gradients of two branches"):
            LossConfig(gradient_ratio=1.0, **other)


# -- micro-batches -----------------------------------------------------------------------------------------------------------


def split(rows: dict, count: int) -> list[dict]:
    """A batch -> micro-batches, as the loader makes them."""
    pieces = []
    for start in range(0, len(rows["images"]), count):
        piece = {name: value[start : start + count] for name, value in rows.items() if name not in ("pixel_rows", "pixel_images")}
        if "pixel_rows" in rows:
            piece["pixel_rows"] = torch.tensor([row - start for row in rows["pixel_rows"].tolist() if start <= row < start + count], dtype=torch.long)
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("pixel_rows, token_share", [(None, 1.0), ([0, 3], 1.0), ([], 1.0), ([0, 3], 0.5)])
@pytest.mark.parametrize("ratio, equal_captions", [(0.0, "contrast"), (1.0, "ignore")])
def test_losses_and_gradients_of_micro_batches_add_up_to_those_of_the_whole_batch(count, pixel_rows, token_share, ratio, equal_captions):
    rows = batch(sets=2)
    rows["text_ids"][2] = rows["text_ids"][0]
    rows["text_present"][1:, 1] = False
    if pixel_rows is not None:
        rows["pixel_rows"] = torch.tensor(pixel_rows, dtype=torch.long)
    whole, parted = (tiny_model(tau=0.8, lambda_perceptual=0.5, gradient_ratio=ratio, equal_captions=equal_captions) for _ in range(2))
    for model in (whole, parted):
        model.config.captioner.token_share = token_share
    loss, parts = whole(rows)
    loss.backward()
    prepared = parted.prepare(iter(split(rows, count)))
    assert all("images" not in piece for piece in prepared)  # what a large batch could not hold
    totals: dict = {}
    for piece in prepared:
        share, its_parts = parted(piece)
        share.backward()
        for name, value in {"loss": share.detach(), **its_parts}.items():
            totals[name] = totals.get(name, 0) + value
    torch.testing.assert_close(totals, {"loss": loss.detach(), **parts}, rtol=1e-5, atol=1e-6)
    for (name, one), other in zip(whole.named_parameters(), parted.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
        else:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-5 * one.grad.abs().max().item(), msg=name)


def test_latents_stand_for_the_pictures_that_nobody_looks_at():
    model, rows = tiny_model(tau=0.8), batch()
    rows["pixel_rows"] = torch.tensor([1, 2])
    cached = {name: value for name, value in rows.items() if name != "images"}
    cached |= {"latents": model.vae.encode(rows["images"]), "pixel_images": rows["images"][[1, 2]]}
    for (name, one), other in zip(model(rows)[1].items(), model(cached)[1].values(), strict=True):
        assert one.item() == other.item(), name


# -- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(16, 16), (16, 64), (80, 48)])
def test_any_height_and_width_that_are_multiples_of_16(height, width):
    model, rows = tiny_model(), batch(height=height, width=width)
    loss, _ = model(rows)
    assert loss.isfinite()
    tokens = model.encode(rows["images"])
    assert tokens.shape == (4, height * width // 256, 64)
    rebuilt = model.decode(tokens, (height // 16, width // 16))
    assert rebuilt.shape == rows["images"].shape
    latents_hat = model.latent_decoder(model.encoder(model.vae.encode(rows["images"]))[0], (height // 16, width // 16))
    torch.testing.assert_close(rebuilt, model.vae.decode(latents_hat))


def test_embeddings_are_unit_vectors_of_the_encoder_and_the_text_encoder():
    model, rows = tiny_model(), batch()
    images, texts = model.embed_images(rows["images"]), model.embed_texts(rows["text_ids"][:, 0])
    torch.testing.assert_close(images.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
    pooled = model.encoder(model.vae.encode(rows["images"]))[1]
    torch.testing.assert_close(images * pooled.norm(dim=1, keepdim=True), pooled)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_losses_under_autocast_are_fp32_and_close(dtype):
    model, rows = tiny_model(VAE(tiny_network(), dtype=torch.float32), lambda_perceptual=0.5), batch()
    plain = model(rows)[1]
    with torch.autocast("cpu", dtype):
        loss, parts = model(rows)
    loss.backward()
    assert loss.dtype == torch.float32 and {p.dtype for p in parts.values()} == {torch.float32}
    for name in PARTS:
        assert parts[name].item() == pytest.approx(plain[name].item(), rel=0.05), name
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# -- without a VAE -------------------------------------------------------------------------------------------------------------


def test_pixels_take_the_vaes_place_with_768_values_a_token():
    model, rows = tiny_model(VAE(None), patch=16, beta=0.0, tau=0.0), batch(height=32, width=48)
    assert model.latent_decoder.linear.out_features == 768
    assert tuple(model.encoder.patchify.weight.shape) == (64, 3, 16, 16)
    loss, parts = model(rows)
    assert parts["latent"].item() == pytest.approx(parts["pixel"].item(), rel=1e-6)  # latents are the images
    assert loss.item() == pytest.approx((0.5 * parts["pixel"] + parts["caption"] + parts["contrastive"]).item(), rel=1e-5)
    history = learn(model, rows, 60)
    assert history[-1]["pixel"] < 0.6 * history[0]["pixel"]
    assert model.decode(model.encode(rows["images"]), (2, 3)).shape == rows["images"].shape


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: tiny_model(patch=4), "patch 4 on a VAE of stride 8 spans 32 pixels, not 16; set --model.encoder.patch 2"),
        (lambda: tiny_model(VAE(None), beta=0.0), "spans 2 pixels, not 16; set --model.encoder.patch 16"),
        (lambda: tiny_model(VAE(None), patch=16), "beta 0.4 would count it again; set --model.loss.beta 0"),
        (lambda: tiny_model(VAE(tiny_network(channels=16))).decode(torch.zeros(1, 4, 64), (1, 2)), "4 tokens do not fill a grid of 1 x 2"),
        (lambda: tiny_model().encoder(torch.zeros(1, 16, 4, 4)), "16 channels, but this encoder was built for 4"),
        (lambda: tiny_model().encode(torch.zeros(1, 3, 40, 32)), "multiples of 16 pixels"),
        (lambda: tiny_model().encode(torch.zeros(1, 3, 33, 32)), "33 x 32 cannot be encoded"),
        (lambda: LossConfig(tau=-0.1), "tau -0.1"),
        (lambda: LossConfig(beta=math.nan), "beta nan"),
        (lambda: LossConfig(perceptual="lpips"), "unknown perceptual 'lpips'.* Choose one of efficientnet"),
        (lambda: LossConfig(perceptual="lpips-vgg", lambda_perceptual=0.5), "needs two local files: set lpips_backbone and lpips_linear"),
    ],
)
def test_what_is_wrong_gets_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
