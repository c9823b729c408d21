"""The verb `openvision3 calibrate`: what a model knows of itself, fitted on held-out data and saved with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import Annotated

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, output_folder, parse
from openvision3.experiments.calibrate import CalibrationOptions
from openvision3.settings import PathName


@dataclass(kw_only=True)
class Options(CalibrationOptions):
    """Save with a model what its training images look like, when it is unsure, and how often its answers are right."""

    model: Positional[Annotated[PathName, arg(metavar="MODEL", help="a shipped name, a model folder or a run folder; the calibration is saved in it")]]
    out: PathName = "calibration"
    """the folder of calibration.json and reliability.png"""
    device: Device = "auto"
    vae: PathName = ""
    """folder of the VAE, for a model whose own VAE is not found"""
    json: bool = False
    """print what was measured as JSON"""


def calibrate(argv: Sequence[str]) -> int:
    """Fit, print what was measured, and save it in the model folder."""
    options = parse(Options, argv, "openvision3 calibrate")
    from openvision3.data.problems import reasons_in_words
    from openvision3.data.shards.tars import plain
    from openvision3.experiments import calibrate as calibrating
    from openvision3.files import check_writable
    from openvision3.pipeline import load
    from openvision3.progress import track

    out = output_folder(options.out, (*options.train, *options.val, *options.outside))
    pipeline = load(options.model, device=options.device, vae=options.vae)
    assert pipeline.folder is not None
    check_writable(pipeline.folder, "MODEL")
    result = calibrating.calibrate(pipeline, options, plain if options.json else track)
    calibrating.save(pipeline, result, pipeline.folder, out)
    if options.json:
        print(dumps(result.calibration.measured, indent=2, ensure_ascii=False))
        return 0
    for name, values in result.calibration.measured.items():
        if "unsure" in values:
            captions = ""
            if "confidence" in values:
                captions = f"; {100 * values['captions_right']:.1f}% of the captions are right, mean confidence {100 * values['confidence']:.1f}%"
            print(f"{name}: {100 * values['unsure']:.1f}% of {values['images']} images are called unsure{captions}")
        else:
            print(f"{name}: {100 * values['right']:.1f}% of {values['answers']} answers are right, calibration error {100 * values['calibration_error']:.1f}%")
    if len(result.problems):
        print(f"left out: {reasons_in_words(result.problems)}")
    print(f"saved in {pipeline.folder}; plot: {out / 'reliability.png'}")
    return 0
