"""RAE's public weights compute in our network what they compute in theirs."""

from __future__ import annotations

import pytest
import torch
from public_dit import public_output, public_state
from safetensors.torch import save_file

from openvision3.generate.dit import Condition
from openvision3.generate.public import read_public

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


def test_without_the_buffers_of_rotations_the_heads_of_known_widths_are_known_and_others_are_asked_for(tmp_path):
    state = {name: value for name, value in public_state(*SIZES["unlike widths"]).items() if "_rope" not in name}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="heads is not known: there is no enc_feat_rope"):
        read_public(tmp_path / "w.safetensors")


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
