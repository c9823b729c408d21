"""RAE's public weights compute in our network what they compute in theirs."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image
from public_dit import public_output, public_state
from safetensors.torch import save_file
from tiny_peers import save_rae

from openvision3.cli import main
from openvision3.generate.dit import Condition
from openvision3.generate.flow import Sampling
from openvision3.generate.generator import load_generator
from openvision3.generate.public import read_public
from openvision3.generate.rae import noise_of

SIZES = {"unlike widths": (24, 2, 3, 32, 4), "equal widths": (32, 2, 2, 32, 4)}
"""width, heads, depth, width and heads of the head"""


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("size", SIZES)
def test_imported_weights_predict_what_the_public_network_predicts(tmp_path, size, ending):
    state = public_state(*SIZES[size])
    path = tmp_path / f"stage2{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    public = read_public(path)
    assert (public.channels, public.classes, public.config.stored_positions, public.config.heads) == (5, 4, 9, SIZES[size][1])
    generator = torch.Generator().manual_seed(1)
    tokens, t, labels = torch.randn(6, 9, 5, generator=generator), torch.rand(6, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = public_output(state, tokens, t, labels, SIZES[size][2])
    with torch.no_grad():
        found = public.network()(tokens, t, (3, 3), Condition(labels=labels))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_of_a_training_state_the_averaged_weights_are_read(tmp_path):
    online, average = public_state(*SIZES["unlike widths"], seed=1), public_state(*SIZES["unlike widths"], seed=2)
    torch.save({"model": online, "ema": average, "steps": 7}, tmp_path / "last.pt")
    assert torch.equal(read_public(tmp_path / "last.pt").weights["leave.bias"], average["final_layer.linear.bias"])


def test_without_the_buffers_of_rotations_the_heads_of_unknown_widths_are_asked_for_and_taken(tmp_path):
    _, heads, _, _, head_heads = SIZES["unlike widths"]
    whole = public_state(*SIZES["unlike widths"])
    save_file({name: value for name, value in whole.items() if "_rope" not in name}, tmp_path / "without.safetensors")
    save_file(whole, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"heads is not known: there is no enc_feat_rope.*--dit.heads, elsewhere"):
        read_public(tmp_path / "without.safetensors")
    with pytest.raises(ValueError, match=r"5 attention heads do not fit width 24: set --dit.heads or --heads"):
        read_public(tmp_path / "without.safetensors", (5, head_heads))
    found, expected = read_public(tmp_path / "without.safetensors", (heads, head_heads)), read_public(tmp_path / "whole.safetensors")
    assert found.config == expected.config and all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def test_public_weights_draw_with_the_rae_whose_tokens_they_were_trained_on(tmp_path, capsys):
    save_rae(tmp_path / "rae", "mae")
    rae, file, out = f"peer:rae-mae={tmp_path / 'rae'}", tmp_path / "stage2_model.safetensors", tmp_path / "drawn.png"
    state = public_state(*SIZES["unlike widths"], grid=2, channels=64)
    save_file(state, file)
    argv = ["generate", "--label", "3", "--model", str(file), "--steps", "4", "--guidance", "1", "--device", "cpu", "--out", str(out)]
    assert main(argv) == 2
    assert "does not say whose tokens it draws; name its RAE, such as --tokens peer:rae-dinov2" in capsys.readouterr().err
    assert main([*argv, "--tokens", rae]) == 0 and Image.open(out).size == (32, 32)
    tokens = noise_of([0], 0, (4, 64))
    times = 1 - torch.arange(5) / 4  # 256 values: not shifted
    for t, after in itertools.pairwise(times.tolist()):
        tokens = tokens + (after - t) * public_output(state, tokens, torch.tensor([t]), torch.tensor([3]), SIZES["unlike widths"][2])
    without = tmp_path / "without.safetensors"
    save_file({name: value for name, value in state.items() if "_rope" not in name}, without)
    drawn = out.read_bytes()
    command = [*(str(without) if word == str(file) else word for word in argv), "--tokens", rae]
    assert main(command) == 2 and "elsewhere both with --heads TRUNK HEAD" in capsys.readouterr().err
    assert main([*command, "--heads", "2", "4"]) == 0 and out.read_bytes() == drawn
    assert main([*argv, "--tokens", rae, "--heads", "4", "4"]) == 2 and "has 2 and 4 attention heads, not 4 and 4; leave --heads out" in capsys.readouterr().err
    generator = load_generator(file, tokens=rae, device="cpu")
    torch.testing.assert_close(generator.draw_tokens(labels=3, sampling=Sampling(steps=4)), tokens, rtol=1e-3, atol=1e-3 * float(tokens.abs().max()))
    save_file(public_state(*SIZES["unlike widths"], grid=2), file)
    assert main([*argv, "--tokens", rae]) == 2
    assert "draws tokens of 5 channels, and those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("blocks.1.mlp.w12.bias"), "trunk.1.mlp.fc_in.bias"),
        (lambda state: state.pop("t_embedder.W"), "t_embedder.W is missing"),
        (lambda state: state.update({"blocks.0.attn.q_norm.weight": torch.ones(12)}), "blocks.0.attn.q_norm.weight is unknown"),
        (lambda state: state.update({"final_layer.linear.weight": torch.ones(5, 31)}), r"leave.weight is \(5, 31\), the network needs \(5, 32\)"),
        (lambda state: [state.pop(name) for name in [*state] if name.startswith("s_embedder")], "has no s_embedder"),
    ],
)
def test_another_layout_is_refused_by_the_tensor_that_does_not_fit(tmp_path, change, words):
    state = public_state(*SIZES["unlike widths"])
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words):
        read_public(tmp_path / "w.safetensors")


def test_a_cut_file_is_one_line(tmp_path):
    save_file(public_state(*SIZES["unlike widths"]), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged or no model"):
        read_public(tmp_path / "w.safetensors")
