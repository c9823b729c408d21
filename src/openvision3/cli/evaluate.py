"""The verbs of `openvision3 evaluate`: one command tells the truth about a tokenizer, and about its peers by the same code."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import Positional, arg

from openvision3.cli.common import output_folder, parse
from openvision3.settings import PathName, unknown

if TYPE_CHECKING:
    from openvision3.data.labelled import Labels
    from openvision3.data.names import DataOptions
    from openvision3.evaluate.overlap import Overlap
    from openvision3.evaluate.pictures import Pictures
    from openvision3.evaluate.pictures import Rows as EvaluatedRows
    from openvision3.evaluate.protocol import Functions, Number
    from openvision3.evaluate.results import NotRun, Results, Row, Scores
    from openvision3.evaluate.statistics import Columns
    from openvision3.evaluate.suite import Measured, Networks

T = TypeVar("T")

KINDS = ("reconstruction", "retrieval", "captioning", "zeroshot", "probe")
METRICS = ("psnr", "ssim", "distance", "kid", "lpips", "rfid")


@dataclass
class Options:
    """What is measured, on which pictures, how."""

    model: Positional[Annotated[PathName, arg(metavar="MODEL", help="a shipped name, a model folder or a run folder")]] = "mini"
    data: tuple[PathName, ...] = ("openmoji",)
    """openmoji (its test side), folders of pictures, shards and globs: data/{00000..00009}.tar"""
    out: PathName = "evaluation"
    """the folder of results.json, pictures.jsonl and report.html"""
    peer: tuple[str, ...] = ()
    """models by name, such as flux-vae,sd-vae,ours,vae: ours is MODEL, vae is its VAE alone; none: ours, beside vae where that can do it too.
    A probe of ours always stands beside vae, its floor. FILE.py:FUNCTION is a model of your own (docs/peers.md)"""
    peer_folder: tuple[PathName, ...] = ()
    """where a peer's weights are, as in flux-vae=weights/FLUX.1-schnell; none: where openvision3 fetch has put them"""
    protocol: Literal["", "rfid-val50k", "rfid-coco"] = ""
    """a published protocol that must hold: ImageNet val 50,000 or COCO val2017 5,000 pictures, ADM crop, 256 px, rFID"""
    count: int = 0
    """the first so many pictures; 0: all"""
    size: int = 0
    """side of the images in pixels; 0: that of MODEL (without MODEL the largest of the peers), and a peer that takes one size only gets its own"""
    crop: Literal["square", "adm"] = "square"
    """square: the central square, resized; adm: as guided diffusion's evaluation does it"""
    batch: int = 32
    """pictures at a time: it does not change the numbers"""
    metrics: tuple[str, ...] = ()
    """of reconstruction: psnr (also against noise), ssim, distance, kid, lpips, rfid; none: all whose weights are here"""
    sigmas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.8, 1.2)
    """reconstruction: strengths of noise on the tokens for the curve of errors"""
    inception: PathName = ""
    """weights-inception-2015-12-05-6726825d.pth, for rfid; none: where openvision3 fetch has put it"""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """the network of lpips"""
    lpips_backbone: PathName = ""
    """torchvision's alexnet or vgg16 checkpoint; none: where openvision3 fetch has put it"""
    lpips_linear: PathName = ""
    """the channel weights of LPIPS v0.1"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions, all of them count; none: the .txt member"""
    only: tuple[str, ...] = ()
    """keep shard samples whose JSON has these values, as in source=clipart"""
    index: PathName = ""
    """the folder where `data index` has put the indexes of shards; none: beside each shard"""
    cache: PathName = ""
    """the folder that remote shards are fetched into"""
    cache_gb: float = 100.0
    """most that the cache holds, in GB"""
    equal_captions: Literal["shared", "own"] = "shared"
    """retrieval: shared: a caption that several images have is right for all of them; own: only for the image it belongs to, as in CLIP_benchmark"""
    tokenizer: Literal["auto", "simple", "ptb"] = "auto"
    """captioning: how captions become words; ptb needs Java"""
    label_key: str = ""
    """zeroshot, probe: the JSON field with the class; none: the emoji's group, the sub-folder or the .cls member"""
    classes: PathName = ""
    """zeroshot, probe: a file of class names, one a line"""
    least: int = 20
    """probe: classes with fewer training pictures are left out"""
    prompts: Literal["auto", "templates", "names", "captions"] = "auto"
    """zeroshot: CLIP's 80 templates, bare names, or captions of the training pictures of a class; auto: captions for emoji groups, else templates"""
    train: tuple[PathName, ...] = ()
    """what MODEL was trained on, beside what is recorded with it: data, or fingerprints of data (openvision3 data fingerprint); samples of these
    have rows of their own. Data are also what a probe is fitted to; none: openmoji, where data is openmoji"""
    k: int = 20
    """probe: neighbours"""
    device: str = "auto"
    """auto, cpu or cuda"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what the models compute in"""
    vae: PathName = ""
    """the folder of MODEL's VAE, where its own is not at hand"""
    seed: int = 0
    """of noise and of subsets"""
    json: bool = False
    """results.json on stdout instead of the table"""

    def __post_init__(self):
        self.peer = tuple(name.strip() for each in self.peer for name in each.split(",") if name.strip())
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"metric {unknown[0]} is unknown; legal are {', '.join(METRICS)} (MODEL stands before the options)")
        for name, low in (("count", 0), ("size", 0), ("batch", 1), ("k", 1), ("least", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {low}")
        if self.size:
            from openvision3.data.crops import check_size

            check_size(self.size)
        if any(not 0 <= sigma < 100 for sigma in self.sigmas):
            raise ValueError(f"sigmas {self.sigmas} must be numbers from 0 on")
        for each in self.peer_folder:
            if "=" not in each:
                raise ValueError(f"peer_folder {each!r} must look like NAME=FOLDER, such as flux-vae=weights/FLUX.1-schnell")
        if self.protocol and (self.count or self.size not in (0, 256) or self.precision != "fp32"):
            raise ValueError(f"protocol {self.protocol} is over the whole set, at 256 px and in fp32; leave out --count, --size and --precision, or --protocol")
        if self.protocol:
            self.size, self.crop, self.metrics = 256, "adm", tuple(dict.fromkeys([*(self.metrics or ("psnr", "ssim")), "rfid"]))


def _broken(work: Evaluation) -> str:
    """How pictures that cannot be read have broken a published protocol; the rows then say that it does not hold. Empty where it holds."""
    name = work.options.protocol
    count, told = PROTOCOL_COUNTS.get(name, (0, ""))
    seen = sorted({row.number.count for row in work.results.rows if row.metric in ("psnr", "ssim", "rfid")} - {count})
    if not name or not seen:
        return ""

    def marked(row: Row) -> Row:
        return replace(row, number=replace(row.number, how=row.number.how.replace(f"protocol {name}", f"NOT protocol {name}, of which pictures are missing")))

    work.results.rows = [marked(row) for row in work.results.rows]
    return f"protocol {name} is over {told}, {count:,} of them; measured on {', '.join(f'{n:,}' for n in seen)}: the rows say that it does not hold"


PROTOCOL_COUNTS = {"rfid-val50k": (50_000, "the validation pictures of ImageNet"), "rfid-coco": (5_000, "the pictures of COCO val2017")}


@dataclass
class Evaluation:
    """One command: the models, the pictures, what was found."""

    options: Options
    kinds: tuple[str, ...]
    models: list[Functions]
    pictures: Pictures
    results: Results
    networks: Networks | None = None
    """what reconstructions are compared by"""
    embedded: dict[str, EvaluatedRows] = field(default_factory=dict)
    """unit vectors of all pictures by model, made once for all kinds that want them"""
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    """by (kind, model)"""
    at_size: dict[int, Pictures] = field(default_factory=dict)
    """the same images at each size: that of all models, and those of models that take no other"""
    overlap: Overlap | None = None
    """what training has seen of the samples; rank 0 alone looks"""
    parts: dict[str, set[int]] = field(default_factory=dict)
    """indices of the samples of each part that has rows of its own"""

    def pictures_of(self, model: Functions, kind: str) -> Pictures:
        """The images as this model gets them: at its own size where it takes no other and none was asked for. Rebuilding is compared at one size."""
        if not model.fixed or self.options.size or kind == "reconstruction":
            return self.pictures
        return self.at_size.setdefault(model.size, self.pictures.resized(model.size))

    def scores(self) -> Scores:
        """What each sample scored, by model."""
        from openvision3.evaluate.results import Scores

        found: dict[str, Columns] = {}
        for (_, model), done in self.measured.items():
            found.setdefault(model, {}).update(done.columns)
        return Scores(found, self.parts)  # type: ignore[arg-type]


def evaluate(argv: Sequence[str]) -> int:
    """Measure a model, and its peers by the same code: openvision3 evaluate WHAT [MODEL] --data DATA"""
    program = "openvision3 evaluate"
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    kind, rest = argv[0], list(argv[1:])
    if kind == "table":
        from openvision3.cli.results import table

        return table(rest)
    if kind not in (*KINDS, "all"):
        raise unknown("evaluation", kind, [*KINDS, "all", "table"])
    options = parse(Options, rest, f"{program} {kind}", description=f"{kind}: {WHAT[kind]}")
    if options.protocol and kind not in ("reconstruction", "all"):
        raise ValueError(f"protocol {options.protocol} is one of reconstruction; leave it out of {kind}")
    return run(kind, options, [program.split()[0], "evaluate", *argv])


WHAT = {
    "reconstruction": "how well pictures are rebuilt: PSNR, SSIM, feature distance, KID, LPIPS, rFID, error against noise",
    "retrieval": "R@1/5/10 from picture to caption and back",
    "captioning": "written captions: exact match, F1, BLEU, ROUGE-L, CIDEr, METEOR",
    "zeroshot": "the nearest class by its texts",
    "probe": "k-NN and a linear probe on frozen tokens, beside raw latents as the floor",
    "all": "everything that the data permit; what they do not is listed with what it needs",
    "table": "results of several evaluations on one page: openvision3 evaluate table RESULTS ... --out PAGE.html",
}

HELP = (
    "usage: openvision3 evaluate WHAT [MODEL] [--data DATA ...] [--peer NAMES] [--out FOLDER]\n\nwhat:\n"
    + "\n".join(f"  {name:15s} {told}" for name, told in WHAT.items())
    + "\n\npeers: openvision3 evaluate reconstruction --peer flux-vae,sd-vae,ours; all options: openvision3 evaluate reconstruction --help"
)


def run(kind: str, options: Options, command: Sequence[str]) -> int:
    """Measure, print the table, write the folder. Under torchrun the pictures are shared among the processes; the numbers are the same."""
    import torch

    from openvision3 import distributed
    from openvision3.device import choose_device
    from openvision3.evaluate.results import NotRun

    output_folder(options.out, (*options.data, *options.train))
    options.device = choose_device(options.device)
    if options.precision == "fp32":  # cuDNN would take TF32 for it
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with distributed.started(options.device) as ranks:
        start = time.perf_counter()
        with distributed.together():
            work = prepare(kind, options, command, ranks.rank)
        for place, each in enumerate(work.kinds, 1):
            MEASURE[each](work)
            work.pictures.share()
            work.results.skipped = list(work.pictures.problems)
            work.results.seconds = time.perf_counter() - start
            if ranks.rank == 0 and work.kinds[place:] and work.results.rows:  # so that a kill loses one kind and not all
                later = [NotRun(model.name, what, "not measured yet: stopped before") for what in work.kinds[place:] for model in work.models]
                with distributed.alone():
                    replace(work.results, not_run=[*work.results.not_run, *later]).save(Path(options.out))
        with distributed.together():
            if not work.results.rows:
                raise ValueError(_nothing(work))
        broken = _broken(work)
        if ranks.rank == 0:
            with distributed.alone():
                _tell(work)
        if broken:
            raise ValueError(broken)
    return 0


def _nothing(work: Evaluation) -> str:
    """Why there is not one number."""
    from openvision3.data.problems import reasons_in_words

    reasons = list(dict.fromkeys(each.needs for each in work.results.not_run))
    if work.pictures.problems and not any(set(work.pictures.chosen) & set(each.digests) for each in work.at_size.values()):
        read = f"none of {len(work.pictures.chosen)} pictures can be read: {reasons_in_words(work.pictures.problems)}"
        return f"{read}; `openvision3 data check` names them"
    return "; ".join(reasons) or "nothing could be measured"


def prepare(kind: str, options: Options, command: Sequence[str], rank: int) -> Evaluation:
    """Everything that can fail for want of a file, before anything is measured."""
    from openvision3.data.names import open_source
    from openvision3.data.openmoji import EmojiSource, load_emoji
    from openvision3.data.sources import Source
    from openvision3.evaluate.pictures import Pictures
    from openvision3.evaluate.results import Results
    from openvision3.evaluate.suite import reconstruction_networks
    from openvision3.progress import environment, track

    kinds = KINDS if kind == "all" else (kind,)
    networks = None
    if "reconstruction" in kinds:
        files = options.inception, options.lpips_net, options.lpips_backbone, options.lpips_linear
        networks = reconstruction_networks(options.metrics, *files, device=options.device)
    asked, idle = _asked(options, kinds)
    models, size = _models(options, asked, "reconstruction" in kinds)
    source: Source
    if options.data == ("openmoji",):
        source = EmojiSource(load_emoji().evaluation("test", options.count or 1_000_000))
    else:
        source = open_source(options.data, _data_options(options, "test"))
    watch = (lambda items, what, total: track(items, what, total)) if rank == 0 and not options.json else (lambda items, what, total: items)
    pictures = Pictures(source, size, options.batch, range(min(options.count or len(source), len(source))), watch)
    pictures.problems.extend(source.problems)
    if options.protocol:
        count, told = PROTOCOL_COUNTS[options.protocol]
        if len(pictures.chosen) != count:
            raise ValueError(f"protocol {options.protocol} is over {told}, {count:,} of them; seen {len(pictures.chosen):,}")
    results = Results(not_run=idle, command=_told(command), environment=environment())
    overlap = _overlap(options, kinds, asked, pictures) if rank == 0 else None
    return Evaluation(options, kinds, models, pictures, results, networks, at_size={size: pictures}, overlap=overlap)


def _overlap(options: Options, kinds: Sequence[str], asked: Sequence[str], pictures: Pictures) -> Overlap:
    """What is known of the training data: recorded with MODEL and its VAE, where they are measured, and named with --train."""
    from openvision3 import hub
    from openvision3.data.fingerprint import Fingerprint, take_fingerprint
    from openvision3.data.names import open_source
    from openvision3.evaluate.overlap import Known, Overlap, of_model

    known: list[Known] = []
    unknown: list[str] = []
    if {"ours", "vae"} & set(asked):
        folder = hub.find_folder(options.model)
        known, unknown = of_model(folder, options.model, options.vae or hub.read_config(folder).model.vae.name)
    files, names = _fingerprints(options.train)
    of_data = [Fingerprint.load(file) for file in files]
    if names and kinds != ("probe",):  # which compares with them itself
        source = open_source(names, _data_options(options))
        pictures.problems.extend(source.problems)
        of_data.append(take_fingerprint(source, names, pictures.problems, lambda items, what: pictures.watch(items, what, len(source))))
    if of_data:
        known.append(Known("--train", Fingerprint.joined(of_data), tuple(kind for kind in KINDS if kind != "probe") if names else ()))
        unknown = [who for who in unknown if who != options.model]
    return Overlap(known, tuple(unknown))


def _fingerprints(names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Names of training data -> those that are files of fingerprints, and the others."""
    files = [name for name in names if name.endswith(".safetensors") and os.path.isfile(name)]
    return files, tuple(name for name in names if name not in files)


def _told(command: Sequence[str]) -> str:
    import shlex

    return shlex.join(command)


def _data_options(options: Options, side: Literal["train", "test"] = "train") -> DataOptions:
    from openvision3.data.names import DataOptions
    from openvision3.settings import read_rules

    return DataOptions(
        side=side,
        caption_keys=options.caption_keys,
        only=read_rules(options.only),
        crop=options.crop,
        index=options.index,
        cache=options.cache,
        cache_gb=options.cache_gb,
    )


def _models(options: Options, asked: Sequence[str], rebuilt: bool = False) -> tuple[list[Functions], int]:
    """The models of these names, all of them loaded, and the side of the pictures, which does not depend on the order of the names.

    It is the one asked for, else MODEL's, else the largest of the peers' own: of those that rebuild, where images are to be `rebuilt`.
    """
    from openvision3 import distributed, hub
    from openvision3.evaluate.peers.table import load_peer, vae_functions
    from openvision3.pipeline import load

    folders = dict(each.split("=", 1) for each in options.peer_folder)
    unused = sorted(folders.keys() - {*asked, *options.peer})
    if unused:
        raise ValueError(f"peer_folder names {unused[0]}, which is not among the peers {', '.join(asked)}; add it to --peer")
    found: list[Functions] = []
    folder = distributed.from_first(str(hub.find_folder(options.model))) if {"ours", "vae"} & set(asked) and distributed.world() > 1 else options.model
    ours = load(folder, device=options.device, precision=options.precision, vae=options.vae) if {"ours", "vae"} & set(asked) else None
    for name in asked:
        if name == "ours":
            assert ours is not None
            found.append(ours.functions(options.model))
        elif name == "vae":
            assert ours is not None
            if ours.vae.network is not None:
                found.append(vae_functions(ours.vae, f"VAE {ours.vae.name}", options.precision))
        else:
            found.append(load_peer(name, folders.get(name, ""), options.device, options.precision))
            if distributed.rank() == 0 and found[-1].note.startswith("NOT "):
                print(f"openvision3: {name}: {found[-1].note.split(';')[0]}", file=sys.stderr)
    if len({model.name for model in found}) < len(found):
        raise ValueError(f"two models have the same name ({', '.join(model.name for model in found)}); give yours another one in its Functions")
    if not found or ("vae" in options.peer and ours is not None and ours.vae.network is None):
        raise ValueError("this model has no VAE to measure alone; leave vae out of --peer")
    largest = max([model.size for model in found if rebuilt and model.reconstruct] or [model.size for model in found])
    size, why = (options.size, "--size") if options.size else (ours.size, f"the size of {options.model}") if ours else (largest, "the largest size of a peer")
    if distributed.rank() == 0 and set(asked) - {"ours", "vae"}:
        print(f"openvision3: {_sizes_in_words(found, size, why, bool(options.size))}", file=sys.stderr)
    return found, size


def _sizes_in_words(models: Sequence[Functions], size: int, why: str, asked: bool) -> str:
    """One line on the side of the images, and on models that take one size only."""
    others = [f"{model.name} {model.size} px" for model in models if model.fixed and model.size != size]
    fate = "images are resized for them and not rebuilt" if asked else "they embed images of their own size, and rebuild none"
    return f"images of {size} px ({why})" + (f"; one size only: {', '.join(others)}: {fate}" if others else "")


def _asked(options: Options, kinds: Sequence[str]) -> tuple[list[str], list[NotRun]]:
    """The models to load, each once, and those that can do nothing of what is asked for. Raises ValueError: an unknown name, or none is left."""
    from openvision3.evaluate.peers import published
    from openvision3.evaluate.peers.own import is_own
    from openvision3.evaluate.peers.table import PEERS, unknown_peer
    from openvision3.evaluate.results import NotRun
    from openvision3.evaluate.suite import NEEDS

    names = options.peer or (("ours", "vae") if "reconstruction" in kinds else ("ours",))
    names = tuple(dict.fromkeys((*names, *(("vae",) if "probe" in kinds and "ours" in names else ()))))
    legal = ["ours", "vae", *PEERS, *published.ONLY]
    found: list[str] = []
    idle: list[NotRun] = []
    for name in names:
        if name not in legal and not is_own(name):
            raise unknown_peer(name, legal)
        can = [kind for kind, functions in NEEDS.items() if name in PEERS and set(functions) <= set(PEERS[name].can)]
        if name in published.ONLY:
            idle.append(NotRun(name, kinds[0], f"{name} stands with published numbers only, of reconstruction"))
        elif name in PEERS and not set(can) & set(kinds):
            idle.append(NotRun(name, kinds[0], f"{name} can be measured by {' and '.join(can)} only"))
        else:
            found.append(name)
    if not found:
        raise ValueError("; ".join(each.needs for each in idle) + "; name a --peer that can be measured here, such as ours")
    return found, idle


# -- each kind -----------------------------------------------------------------------------------------------------


def _each(work: Evaluation, kind: str, measure: Callable[[Functions], Measured]) -> None:
    """Measure every model; one that cannot goes to `not_run`."""
    from openvision3.distributed import OtherRankFailed
    from openvision3.evaluate.pictures import on_first
    from openvision3.evaluate.results import NotRun
    from openvision3.evaluate.statistics import with_interval

    for model in work.models:
        try:
            done = measure(model)
            done.numbers = on_first(lambda measured=done: [with_interval(each, measured.columns) for each in measured.numbers])  # type: ignore[misc]
        except (ValueError, OtherRankFailed) as error:  # CannotRun, or pictures and numbers that it cannot do with: the others are worth having
            work.results.not_run.append(NotRun(model.name, kind, str(error)))
            continue
        work.measured[kind, model.name] = done
        if done.text:
            print(f"openvision3: {kind} of {model.name}: {done.text}", file=sys.stderr)
        work.results.rows += rows(work, model, kind, done)
        work.results.not_run += [NotRun(model.name, metric, what) for metric, what in done.missing]
        work.results.left_out += [{"model": model.name, "of": kind, "reason": why, "count": count} for why, count in done.left_out.items()]


def rows(work: Evaluation, model: Functions, kind: str, done: Measured) -> list[Row]:
    """Numbers -> rows with the setting they were measured in: over the samples that training has not seen, over the seen ones, and over all."""
    from openvision3.evaluate.overlap import NOT_KNOWN
    from openvision3.evaluate.results import Row, Setting
    from openvision3.evaluate.statistics import subset_numbers

    options, pictures = work.options, work.pictures_of(model, kind)
    drawn = "emoji drawn at this size, white, 0.77 of the side"
    crop = "; ".join(([drawn] if "openmoji" in options.data else []) + ([CROPS[options.crop]] if set(options.data) - {"openmoji"} else []))
    keys = ", ".join(options.caption_keys) or "of the set"
    labelled = f"JSON field {options.label_key}" if options.label_key else "emoji group, sub-folder or .cls member"
    setting = Setting(
        ", ".join(f"{name} test" if name == "openmoji" else name for name in options.data),
        pictures.digest(done.used),
        f"{pictures.size}x{pictures.size}",
        crop,
        model.dtype,
        options.seed,
        labels="none" if done.labels == "none" else f"{labelled}; {done.labels}",
        captions="none" if done.captions == "none" else f"{keys}, sha256 {done.captions}",
        overlap=work.overlap.told(kind) if work.overlap is not None else NOT_KNOWN,
    )
    found: list[tuple[list[Number], Setting]] = []
    parts: dict[str, set[int]] = {}
    if work.overlap is not None:
        work.overlap.look(pictures, done.used)
        parts = work.overlap.parts(kind, done.used)
        work.parts |= {part: work.parts.get(part, set()) | samples for part, samples in parts.items()}
        for part, samples in parts.items() if len(parts) > 1 else ():
            of_part = replace(setting, data_sha256=pictures.digest(sorted(samples)))
            found.append((subset_numbers(done.numbers, done.columns, samples, part), of_part))
    whole = next(iter(parts)) if len(parts) == 1 else ""  # all are of one part: then these numbers are its
    found.append(([replace(each, part=whole) for each in done.numbers], setting))
    return [Row(model.name, model.sha256, number, of, model.note, model.licence) for numbers, of in found for number in numbers]


CROPS = {
    "square": "the central square, resized by Pillow's bicubic with antialias",
    "adm": "ADM: halved by a box filter while twice as large, bicubic to the shorter side, central square",
}


def _reconstruction(work: Evaluation) -> None:
    from openvision3.evaluate.suite import reconstruction

    networks, options = work.networks, work.options
    assert networks is not None
    told = f"protocol {options.protocol} (of its count, crop and size; that these are its pictures is not checked)" if options.protocol else ""
    _each(work, "reconstruction", lambda model: reconstruction(model, work.pictures, networks, options.sigmas, options.seed, told, options.metrics))


def _retrieval(work: Evaluation) -> None:
    from openvision3.evaluate.suite import image_embeddings, needs, retrieval

    def measure(model: Functions) -> Measured:
        needs(model, "retrieval")
        pictures = work.pictures_of(model, "retrieval")
        work.embedded[model.name] = image_embeddings(model, pictures)
        return retrieval(model, pictures, work.embedded[model.name], shared=work.options.equal_captions == "shared")

    _each(work, "retrieval", measure)


def _captioning(work: Evaluation) -> None:
    from openvision3.evaluate.suite import captioning

    _each(work, "captioning", lambda model: captioning(model, work.pictures, work.options.tokenizer))


def _zeroshot(work: Evaluation) -> None:
    from openvision3.evaluate.suite import class_texts, zeroshot

    options = work.options

    def read() -> tuple[Labels, list[list[str]], str]:
        kind = options.prompts
        if kind == "auto":
            kind = "captions" if options.data == ("openmoji",) and not options.label_key else "templates"
        training = _training(work, least=1) if kind == "captions" else None
        labels = _labels(work, like=training[1] if training else None)
        return (labels, *class_texts(labels, kind, training))

    found = _labelled(work, "zeroshot", read)
    if found is not None:
        labels, texts, how = found
        _each(work, "zeroshot", lambda model: zeroshot(model, work.pictures_of(model, "zeroshot"), labels, texts, how, work.embedded.get(model.name)))


def _probe(work: Evaluation) -> None:
    from openvision3.evaluate.pictures import Pictures
    from openvision3.evaluate.suite import probe

    options = work.options

    def read() -> tuple[Any, Labels, Labels]:
        source, train_labels = _training(work, options.least)
        return source, train_labels, _labels(work, like=train_labels)

    found = _labelled(work, "probe", read)
    if found is not None:
        source, train_labels, labels = found
        train = Pictures(source, work.pictures.size, options.batch, None, work.pictures.watch)
        train.problems.extend(source.problems)

        def measure(model: Functions) -> Measured:
            pictures = work.pictures_of(model, "probe")
            same = train if pictures.size == train.size else train.resized(pictures.size)
            return probe(model, same, train_labels, pictures, labels, options.k, options.device)

        _each(work, "probe", measure)
        work.pictures.problems.extend(train.problems)


MEASURE: dict[str, Callable[[Evaluation], None]] = {
    "reconstruction": _reconstruction,
    "retrieval": _retrieval,
    "captioning": _captioning,
    "zeroshot": _zeroshot,
    "probe": _probe,
}


def _labelled(work: Evaluation, kind: str, read: Callable[[], T]) -> T | None:
    """What `read` reads of the classes; None for data without any, or without training pictures, which are listed with what they lack."""
    from openvision3 import distributed
    from openvision3.evaluate.results import NotRun

    found: T | None = None
    lacking = ""
    try:
        found = read()
    except (ValueError, OSError) as error:
        lacking = str(error)
    lacking = next(filter(None, distributed.gather_objects(lacking)), "")  # what one rank lacks, none has
    if lacking:
        work.results.not_run += [NotRun(model.name, kind, lacking) for model in work.models]
        return None
    return found


def _names(options: Options) -> tuple[str, ...]:
    from openvision3.data.labelled import read_names

    return read_names(options.classes) if options.classes else ()


def _labels(work: Evaluation, like: Labels | None = None) -> Labels:
    from dataclasses import replace

    from openvision3.data.labelled import read_labels

    found = read_labels(work.pictures.source, work.options.label_key, () if like else _names(work.options), least=0, like=like)
    chosen = set(work.pictures.chosen)
    kept = [(index, number) for index, number in zip(found.indices, found.classes, strict=True) if index in chosen]
    return replace(found, indices=tuple(i for i, _ in kept), classes=tuple(n for _, n in kept))


def _training(work: Evaluation, least: int) -> tuple[Any, Labels]:
    from openvision3.data.labelled import read_labels
    from openvision3.data.names import open_source

    options = work.options
    names = _fingerprints(options.train)[1] or (("openmoji",) if options.data == ("openmoji",) else ())
    if not names:
        raise ValueError("training pictures with classes are needed; name them with --train")
    source = open_source(names, _data_options(options))
    return source, read_labels(source, options.label_key, _names(options), least=least)


# -- what is told --------------------------------------------------------------------------------------------------


def _tell(work: Evaluation) -> None:
    from openvision3.cli.results import print_tables, tell_left_out
    from openvision3.evaluate.overlap import FILE as OVERLAP
    from openvision3.evaluate.page import write_report
    from openvision3.evaluate.results import split, with_differences
    from openvision3.files import write_whole

    out = Path(work.options.out)
    tables = split(work.results.rows)
    work.results.differences = with_differences(tables, [(work.results.rows, work.scores())])
    if work.overlap is not None:
        out.mkdir(parents=True, exist_ok=True)
        seen = work.overlap.lines(work.pictures)
        write_whole(out / OVERLAP, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in seen))
        work.results.overlap = work.overlap.in_words(str(out / OVERLAP))
    path = work.results.save(out)
    page = write_report(out, work, tables)
    if work.options.json:
        print(path.read_text(encoding="utf-8"), end="")
    else:
        print_tables(tables, work.results.rows, work.results.not_run)
        tell_left_out(work.results)
        print(f"results: {path}\nreport: {page.resolve()}")
