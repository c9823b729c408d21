"""Train the small VAE that ships with the package (AutoencoderTiny, 16 channels, 8x).

    python tools/train_embedded_vae.py --data openmoji 'drawings/*-train-*.tar' 'DATA/pictures/train-*.tar' --weights 1 3 1 --only source!=stamps \
        --held-out DATA --init embedded --out runs/vae

L1 + squared error + the logarithm of each image's squared error (which PSNR measures, so that flat drawings count as much as busy photographs) +
a perceptual feature distance (EfficientNet-Lite0) + a penalty that holds every latent channel near zero mean and unit variance; a little noise on
the latents, so that the decoder forgives what a ViT predicts. The rate is constant after a warm-up and falls to zero over the last `--cooldown` steps,
so `--steps` may be changed when a run goes on: the same command resumes. `--out/ema` always holds the averaged weights in diffusers' format.

Beside the data, a share of the training pictures is synthetic (coloured 1/f noise and dead leaves, drawn here from random
numbers): flat drawings alone teach a VAE little about the textures of photographs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny as _AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from PIL import Image

from openvision3.data import openmoji
from openvision3.data.crops import crop_resized, random_crop_box
from openvision3.data.images import ImageError, from_uint8, to_tensor
from openvision3.data.names import DataOptions, open_source
from openvision3.data.shards.source import ShardSource
from openvision3.data.sources import MixedSource, Source
from openvision3.data.view import View
from openvision3.data.workers import outlive_signals
from openvision3.device import choose_device, choose_precision, dtype_of
from openvision3.evaluate.metrics.reconstruction import psnr
from openvision3.hub import load_vae
from openvision3.networks.perceptual import EfficientNetDistance
from openvision3.progress import processor_name
from openvision3.train.config import PretrainConfig
from openvision3.train.loop import autocast
from openvision3.train.optimizer import Muon

AutoencoderTiny: Any = _AutoencoderTiny  # diffusers' lazy module hides its types

ARCHITECTURE = {
    "latent_channels": 16,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_encoder_blocks": (0, 2, 3, 5),
    "num_decoder_blocks": (6, 5, 3, 0),
}

FLOOR = 1e-5
"""squared error below which an image counts as rebuilt (56 dB)"""


def init_weights(vae: Any) -> None:
    """Variance-preserving convolutions, residual branches that start at zero, an output that starts at mid grey.

    PyTorch's default shrinks the signal in every layer, and these networks have no norms to bring it back.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            torch.nn.init.zeros_(module.conv[-1].weight)
    for network in (vae.encoder, vae.decoder):
        for layer in network.layers:
            if isinstance(layer, torch.nn.Conv2d) and layer.in_channels == layer.out_channels:
                layer.weight.data.div_(math.sqrt(2.0))  # no ReLU follows a change of resolution
        network.layers[-1].weight.data.mul_(0.5)
    torch.nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)


def load_grown(vae: Any, weights: Any) -> None:
    """Start from the weights of another VAE of this shape. Blocks that it lacks stay as they are: at first they change nothing.

    Raises:
        ValueError: other widths, or fewer blocks than the weights have.
    """

    def by_place(network: Any) -> dict[tuple[int, int], torch.nn.Module]:
        """Layers by (how many other layers come before, how many blocks since)."""
        places, others, blocks = {}, 0, 0
        for layer in network.layers:
            if isinstance(layer, AutoencoderTinyBlock):
                blocks += 1
            else:
                others, blocks = others + 1, 0
            places[others, blocks] = layer
        return places

    for new, old in ((vae.encoder, weights.encoder), (vae.decoder, weights.decoder)):
        layers, old_layers = by_place(new), by_place(old)
        if not old_layers.keys() <= layers.keys():
            raise ValueError("--init has more blocks than --architecture; give at least as many at each resolution")
        for place, layer in old_layers.items():
            try:
                layers[place].load_state_dict(layer.state_dict())
            except RuntimeError as error:
                raise ValueError(f"the weights of --init do not fit --architecture: {error}") from error


def make_optimizers(vae: Any, rate: float, dtype: torch.dtype) -> tuple[list[torch.optim.Optimizer], list[tuple[torch.nn.Parameter, torch.nn.Parameter]]]:
    """Muon for the 3x3 convolutions between hidden layers, AdamW for the rest.

    Muon takes matrices: `flat` pairs each convolution's weight with a matrix on the same storage.
    """
    flat, others = [], []
    for parameter in vae.parameters():
        if parameter.ndim == 4 and min(parameter.shape[:2]) > 16:
            rows = parameter.data.permute(0, 2, 3, 1)
            flat.append((parameter, torch.nn.Parameter(rows.view(len(rows), -1))))
        else:
            others.append(parameter)
    muon = Muon([matrix for _, matrix in flat], learning_rate=rate, weight_decay=0.0, dtype=dtype)
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)], flat


def one_over_f(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise whose amplitude falls as f^-a, a in [0.7, 1.8], channels correlated as in natural pictures. (H, W, 3) in [0, 1]."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) / frequency ** rng.uniform(0.7, 1.8)
    noise = np.fft.irfft2(spectrum, (size, size))
    noise -= noise.mean((1, 2), keepdims=True)
    noise /= noise.std((1, 2), keepdims=True) + 1e-6
    grey = rng.uniform(0, 0.9)
    noise = grey * noise[:1] + (1 - grey) * noise
    return (rng.uniform(0.2, 0.8, (3, 1, 1)) + noise * rng.uniform(0.05, 0.25)).clip(0, 1).transpose(1, 2, 0)


def dead_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Overlapping discs and boxes of power-law size, some with 1/f texture. (H, W, 3) in [0, 1]."""
    canvas = one_over_f(rng, size)
    y, x = np.mgrid[:size, :size]
    texture = one_over_f(rng, size) - 0.5
    for _ in range(int(rng.integers(20, 90))):
        radius = 3 * (1 - rng.uniform(0, 0.999)) ** -0.6
        cx, cy = rng.uniform(0, size, 2)
        angle = rng.uniform(0, math.pi)
        u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        v = ((y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)) * rng.uniform(0.4, 2.5)
        inside = (np.maximum(abs(u), abs(v)) if rng.random() < 0.4 else np.hypot(u, v)) < radius
        canvas[inside] = (rng.uniform(0, 1, 3) + texture[inside] * rng.uniform(0, 1.5)).clip(0, 1)
    return canvas


class TrainingPictures(torch.utils.data.Dataset):
    """Endless random training images, each a function of (seed, position)."""

    def __init__(self, source: Source, weights: list[float], size: int, seed: int, synthetic: float, textures: int = 384):
        self.source, self.size, self.seed, self.synthetic = source, size, seed, synthetic
        sizes = [len(part) for part in source.sources] if weights and isinstance(source, MixedSource) else [len(source)]
        self.bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.shares = torch.tensor(weights or [1.0])
        rng = np.random.default_rng(seed)
        make = [one_over_f, dead_leaves]
        self.textures = [Image.fromarray((make[i % 2](rng, 192) * 255).astype(np.uint8)) for i in range(textures)]

    def __len__(self) -> int:
        return 1 << 60

    def texture(self, generator: torch.Generator) -> Image.Image:
        texture = self.textures[int(torch.randint(len(self.textures), (1,), generator=generator))]
        return crop_resized(texture, random_crop_box(192, 192, generator, (0.3, 1.0)), self.size)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, bool]:
        """(pixels, whether a texture stands in for an image that cannot be read)."""
        generator = torch.Generator().manual_seed(hash((self.seed, position)) & 0x7FFFFFFF)
        kind, flip, jitter, invert = torch.rand(4, generator=generator).tolist()
        image = None if kind < self.synthetic else self.drawn(generator)
        pixels = to_tensor(self.texture(generator) if image is None else image)
        if flip < 0.5:
            pixels = pixels.flip(2)
        if jitter < 0.3:  # other colours, same shapes
            pixels = pixels[torch.randperm(3, generator=generator)]
            if invert < 0.3:
                pixels = -pixels
        elif jitter < 0.5:
            gain, lift = torch.rand(2, 3, 1, 1, generator=generator)
            pixels = (pixels * (0.5 + 0.5 * gain) + 0.5 * (lift - 0.5)).clamp(-1, 1)
        return pixels, image is None and kind >= self.synthetic

    def drawn(self, generator: torch.Generator) -> Image.Image | None:
        """A crop of a random training image; None if it cannot be read."""
        part = int(torch.multinomial(self.shares, 1, generator=generator))
        index = int(torch.randint(self.bounds[part], self.bounds[part + 1], (1,), generator=generator))
        try:
            image = from_uint8(self.source.crop(index, self.size, generator)[0])
        except ImageError:
            return None
        if self.source.key(index).startswith("openmoji/") and torch.rand(1, generator=generator).item() < 0.2:
            scale, x, y = torch.rand(3, generator=generator).tolist()
            emoji = openmoji.load_emoji().train
            character = emoji[int(torch.randint(len(emoji), (1,), generator=generator))].character
            image = openmoji.draw(character, self.size, scale=0.6 + scale, shift=(0.4 * x - 0.2, 0.4 * y - 0.2), background=self.texture(generator))
        return image


def held_out_shards(folder: Path | None) -> dict[str, list[str]]:
    """The `val` shards of each set (sub-folder) in that folder, if any."""
    shards = {part.name: sorted(map(str, part.glob("val-*.tar"))) for part in sorted(folder.iterdir()) if part.is_dir()} if folder else {}
    return {name: paths for name, paths in shards.items() if paths}


def held_out_sets(folder: Path | None, size: int, count: int) -> dict[str, torch.Tensor]:
    """The evaluation images, at most `count` of each set: OpenMoji of the val side, and the `val` shards in that folder, if any."""
    emoji = openmoji.load_emoji().evaluation("val", count)
    sets = {"openmoji": torch.stack([to_tensor(openmoji.draw(e.character, size)) for e in emoji])}
    for name, shards in held_out_shards(folder).items():
        source = open_source(tuple(shards))
        sets[name] = torch.stack([to_tensor(source.image(i, size)) for i in range(min(len(source), count))])
    return sets


@torch.no_grad()
def mean_psnr(vae: Any, images: torch.Tensor, precision: str) -> float:
    """Mean PSNR of uint8 reconstructions over images, in dB."""
    values = []
    for batch in images.split(64):
        with autocast(batch.device.type, precision):
            images_hat = vae.decoder(vae.encoder(batch.contiguous(memory_format=torch.channels_last)))
        values.append(psnr(batch, images_hat))
    return torch.cat(values).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["openmoji"])
    parser.add_argument("--weights", type=float, nargs="*", default=[], help="share of each name of --data; not set: every image alike")
    parser.add_argument("--only", default="", help="keep shard samples whose JSON has this value, as in source=clipart or source!=stamps")
    parser.add_argument("--held-out", type=Path, default=None, help="folder with SET/val-*.tar to measure on")
    parser.add_argument("--held-out-count", type=int, default=256, help="most images of each set")
    parser.add_argument("--init", default="", help="start from the weights of a VAE: embedded, or a folder in diffusers' layout")
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--cooldown", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--squared", type=float, default=1.0, help="weight of the squared error")
    parser.add_argument("--log-squared", type=float, default=0.1, help="weight of the logarithm of each image's squared error")
    parser.add_argument("--perceptual", type=float, default=0.03, help="weight of the EfficientNet-Lite0 feature distance")
    parser.add_argument("--latent-noise", type=float, default=0.05)
    parser.add_argument("--synthetic", type=float, default=0.15)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", default="{}", help="JSON that overrides AutoencoderTiny's settings")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    args = parser.parse_args()
    try:
        train(args)
    except (ValueError, OSError) as error:
        print(f"train_embedded_vae: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def train(args: argparse.Namespace) -> None:
    """Raises ValueError, OSError: data or settings that cannot be used."""
    if min(args.steps, args.batch, args.save_every) < 1 or args.size % 8 or args.size < 8:
        raise ValueError(f"steps {args.steps}, batch {args.batch} and save-every {args.save_every} must be positive, size {args.size} a multiple of 8")
    only = PretrainConfig(only=(args.only,) if args.only else ()).only_values
    try:
        architecture = ARCHITECTURE | json.loads(args.architecture)
    except (ValueError, TypeError) as error:
        raise ValueError(f"architecture {args.architecture!r} is not a JSON object of AutoencoderTiny's settings: {error}") from error
    source = open_source(tuple(args.data), DataOptions(only=only, view=View((0.15, 1.0)), weights=tuple(args.weights)))
    parts = source.sources if isinstance(source, MixedSource) else [source]
    trained_on = {Path(path).resolve() for part in parts if isinstance(part, ShardSource) for path in part.files()}
    both = trained_on & {Path(path).resolve() for shards in held_out_shards(args.held_out).values() for path in shards}
    if both:
        raise ValueError(f"{min(both)} is held out and cannot be trained on; name the training shards, such as train-*.tar")

    torch.manual_seed(args.seed)
    device = choose_device()
    precision, why = choose_precision(args.precision, device)
    print(f"device {device}, precision {precision} ({why})", flush=True)
    vae = AutoencoderTiny(**architecture).to(device, memory_format=torch.channels_last)
    init_weights(vae)
    if args.init:
        load_grown(vae, load_vae(args.init).network)
    ema = copy.deepcopy(vae).requires_grad_(False)
    distance = EfficientNetDistance(stages=4).to(device)
    optimizers, flat = make_optimizers(vae, args.learning_rate, dtype_of(precision))

    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "state.pt"
    step, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        print(f"going on from step {step}", flush=True)

    print(f"{len(source)} training images; {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    sets = {name: images.to(device) for name, images in held_out_sets(args.held_out, args.size, args.held_out_count).items()}
    dataset = TrainingPictures(source, args.weights, args.size, args.seed, args.synthetic)
    probe = torch.stack([dataset[i][0] for i in range(256)])  # latents leave with unit variance: every save measures the scale on these
    order = range(step * args.batch, args.steps * args.batch)
    ahead = 4 if args.workers else None
    loader = torch.utils.data.DataLoader(dataset, args.batch, sampler=order, num_workers=args.workers, prefetch_factor=ahead, worker_init_fn=outlive_signals)

    def save() -> None:
        state = {
            "vae": vae.state_dict(),
            "ema": ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "seconds": seconds,
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)
        with torch.no_grad():
            spread = torch.cat([ema.encoder(images.to(device)) for images in probe.split(32)]).std().item()
        ema.register_to_config(scaling_factor=round(1 / spread, 4))
        halved: Any = torch.nn.Module.to(copy.deepcopy(ema), torch.bfloat16)  # diffusers' own warns of an empty list
        halved.save_pretrained(args.out / "ema")
        card = {"command": shlex.join(["python", *sys.argv]), "steps": step, "batch": args.batch, "minutes": seconds / 60, "seed": args.seed}
        card["machine"] = f"{processor_name()}, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
        (args.out / "ema" / "training.json").write_text(json.dumps(card, indent=2) + "\n")

    stop = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop
        stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)

    sums, count, unreadable, spent, mark = torch.zeros(4), 0, 0, 0.0, time.perf_counter()
    for images, stands_in in loader:
        unreadable += int(stands_in.sum())
        left = args.steps - step
        rate = args.learning_rate * min(1.0, (step + 1) / 100, left / max(1, args.cooldown))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        images = images.to(device, memory_format=torch.channels_last)
        with autocast(device, precision):
            latents = vae.encoder(images)
            images_hat = vae.decoder(latents + args.latent_noise * torch.randn_like(latents)).float()
            some = slice(0, max(1, args.batch // 2))
            perceptual = distance(images[some], images_hat[some]) if args.perceptual else images_hat.new_zeros(())
        difference = images_hat - images
        by_image = difference.pow(2).flatten(1).mean(1)
        absolute, squared, logarithm = difference.abs().mean(), by_image.mean(), (by_image + FLOOR).log().mean()
        by_channel = latents.float().transpose(0, 1).flatten(1)
        penalty = by_channel.mean(1).pow(2).mean() + (by_channel.std(1) - 1).pow(2).mean()
        loss = absolute + args.squared * squared + args.log_squared * logarithm + args.perceptual * perceptual + 0.1 * penalty
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        for parameter, matrix in flat:
            assert parameter.grad is not None
            matrix.grad = parameter.grad.permute(0, 2, 3, 1).reshape(matrix.shape)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        for average, value in zip(ema.parameters(), vae.parameters(), strict=True):
            average.lerp_(value.detach(), 1 - decay)
        step += 1
        sums += torch.stack([absolute, squared, perceptual, penalty]).detach().cpu()
        count += 1
        if step % 50 == 0:
            now = time.perf_counter()
            seconds, spent, mark = seconds + now - mark, spent + now - mark, now
            speed, spent = count * args.batch / spent, 0.0
            l1, l2, feature, hold = (sums / count).tolist()
            line = f"step {step:6d}  l1 {l1:.4f}  l2 {l2:.4f}  feature {feature:.4f}  penalty {hold:.4f}  {speed:.1f} images/s  {seconds / 60:.1f} min"
            print(line + (f"  {unreadable} unreadable images, textures in their place" if unreadable else ""), flush=True)
            sums, count = torch.zeros(4), 0
        if step % args.save_every == 0 or stop or step == args.steps:
            now = time.perf_counter()
            seconds, spent, mark = seconds + now - mark, spent + now - mark, now
            save()
            row = {"step": step, "minutes": round(seconds / 60, 1), **{name: round(mean_psnr(ema, images, precision), 2) for name, images in sets.items()}}
            with open(args.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
            mark = time.perf_counter()
        if stop:
            raise SystemExit(75)

    print(f"the averaged weights are in {args.out / 'ema'}, scaling_factor {ema.config.scaling_factor}", flush=True)


if __name__ == "__main__":
    main()
