"""What the forks of each ablation change in their parent."""

import pytest

from openvision3.experiments.ablate import plan_runs
from openvision3.experiments.ablations import ABLATIONS, OF_CHATS, OF_GENERATORS, Fork, Parent, question
from openvision3.generate.recipes import drawings_dit_tiny
from openvision3.settings import flat, to_dict
from openvision3.train.config import PretrainConfig
from openvision3.train.recipes import RECIPES, base_low_res, mini_low_res
from openvision3.understand.recipes import chat_align

OF_MODELS = tuple(name for name in ABLATIONS if name not in (*OF_GENERATORS, *OF_CHATS))


def base_at_40_steps() -> Parent:
    config = base_low_res()
    config.steps, config.model.vae.name = 40, "embedded"
    return Parent("base_low_res", config)


def forks(name: str, parent: Parent) -> list[Fork]:
    return list(ABLATIONS[name](parent).forks)


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_says_its_question_hypothesis_source_and_result(name):
    first, *rest = (ABLATIONS[name].__doc__ or "").splitlines()
    assert question(name) == first and first.endswith("?")
    assert [line.strip().partition(":")[0] for line in rest if line.strip() and ":" in line and line[4] != " "][:3] == ["Hypothesis", "Source", "Result"]


@pytest.mark.parametrize("name", OF_MODELS)
@pytest.mark.parametrize("recipe", ["mini_low_res", "base_low_res"])
def test_every_fork_of_every_grid_is_a_valid_run_of_its_own(name, recipe):
    config = RECIPES[recipe]()
    config.steps = 40
    if recipe == "base_low_res":
        config.model.vae.name = "embedded"
    parent = Parent(recipe, config)
    rows = forks(name, parent)
    folders = [plan_runs(fork, parent).runs[-1][0] for fork in rows]
    assert len(set(folders)) >= len(rows) - (name == "pixel_share")  # equal compute at the parent's own share is the parent
    assert all(len(folder) < 150 for folder in folders)
    assert len({fork.label for fork in rows}) == len(rows)


def drawing_at_40_steps() -> Parent:
    config = drawings_dit_tiny()
    config.steps, config.size = 40, 128  # times are shifted there
    return Parent("drawings_dit_tiny", config)


@pytest.mark.parametrize("name", [name for name in OF_GENERATORS if name != "spaces"])
def test_every_fork_of_a_generator_is_a_run_of_its_own_at_the_compute_of_the_first(name):
    parent = drawing_at_40_steps()
    plans = [plan_runs(fork, parent) for fork in forks(name, parent)]
    assert len({plan.runs[0][0] for plan in plans}) == len(plans) == 2
    assert plans[0].runs[0] == ("base", plans[0].runs[0][1]), "the first fork is the recipe itself, which all grids share"
    assert plans[1].operations() == pytest.approx(plans[0].operations(), rel=1 / 40)


def test_the_spaces_are_those_of_a_synergy_and_no_others():
    parent = drawing_at_40_steps()
    with pytest.raises(ValueError, match="name the runs of an ablation synergy in --tokens"):
        forks("spaces", parent)
    parent.config.tokens = "grid/base/seed-{seed}"
    assert [fork.changes.get("tokens") for fork in forks("spaces", parent)] == [
        None,
        *(f"grid/encoder_learns_from={who}/seed-{{seed}}" for who in ("understanding", "reconstruction", "nothing")),
        "vae:embedded",
    ]


def test_the_towers_are_those_of_a_synergy():
    config = chat_align()
    config.tower = "grid/base/seed-{seed}"
    others = [f"grid/encoder_learns_from={who}/seed-{{seed}}" for who in ("understanding", "reconstruction", "nothing")]
    assert [fork.changes.get("tower") for fork in forks("towers", Parent("chat_align", config))] == [None, *others]


@pytest.mark.parametrize(("names", "parent"), [(OF_MODELS, base_at_40_steps()), (OF_GENERATORS[1:], drawing_at_40_steps())])
def test_no_fork_of_one_grid_lies_in_the_folder_of_another(names, parent):
    by_folder: dict[str, dict] = {}
    for name in names:
        for fork in forks(name, parent):
            for folder, config in plan_runs(fork, parent).runs:
                values = flat(to_dict(config))
                assert by_folder.setdefault(folder, values) == values, folder


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("balance", "model.loss.omega_rec", [0.5, 1, 2, 4, 8, 20]),
        ("decoder_size", "model.latent_decoder.size", ["M", "B", "L"]),
        ("encoder_size", "model.encoder.size", ["M", "B", "L"]),
        ("tau", "model.loss.tau", [0, 0.4, 0.8, 1.2]),
    ],
)
def test_the_papers_balances_sizes_and_strengths_are_in_the_grids(name, field, values):
    assert [fork.changes[field] for fork in forks(name, base_at_40_steps())] == values


def test_a_folder_is_named_by_what_its_fork_changes():
    parent = base_at_40_steps()
    names = [plan_runs(fork, parent).runs[0][0] for fork in (*forks("synergy", parent)[:2], *forks("encoder_size", parent)[2:])]
    assert names == ["base", "encoder_learns_from=understanding", "encoder.size=L"]


def phases(number: int, config: PretrainConfig, recipe: str) -> list[PretrainConfig]:
    parent = Parent(recipe, config)
    return [run for _, run in plan_runs(forks("two_phases", parent)[number], parent).runs]


def test_the_second_phase_keeps_what_was_set_for_the_first_and_changes_by_ratios():
    base = base_low_res()
    base.steps, base.batch, base.optimizer.learning_rate, base.model.vae.name = 20_000, 1024, 3.2e-5, "embedded"
    base.model.loss.perceptual = "lpips-alex"
    low, high = phases(0, base, "base_low_res")
    assert (high.batch, high.size, high.model.loss.lambda_perceptual, high.model.loss.perceptual) == (512, 256, 0.5, "lpips-alex")
    assert high.optimizer.learning_rate == pytest.approx(3.2e-5 * 6.4e-6 / 2.56e-4) and low.steps * low.batch == 10 * high.steps * high.batch


def test_two_phases_train_a_tenth_at_the_larger_size_from_the_weights_of_the_first():
    base = mini_low_res()
    base.steps = 50
    low, high = phases(0, base, "mini_low_res")
    assert (low.size, low.steps, high.size, high.steps) == (64, 50, 128, 5) and high.optimizer.learning_rate < low.optimizer.learning_rate
    [alone] = phases(1, base, "mini_low_res")
    assert alone.size == 128 and alone.optimizer.learning_rate == low.optimizer.learning_rate


def test_the_operations_of_a_frozen_encoder_are_its_forward_alone():
    parent = Parent("mini_low_res", mini_low_res())
    operations = {fork.label: plan_runs(fork, parent).operations() for fork in forks("synergy", parent)}
    assert operations["heads on a frozen random encoder"] < 0.9 * operations["both"]


@pytest.mark.parametrize("name", ["pixel_share", "two_phases"])
def test_equal_compute_costs_what_the_parent_costs_to_within_a_step(name):
    base = mini_low_res()
    base.steps = 200
    parent = Parent("mini_low_res", base)
    rows = forks(name, parent)
    wanted = next(plan_runs(fork, parent).operations() for fork in rows if fork.then or (name == "pixel_share" and fork.changes == {"pixel_share": 0.25}))
    equal = [plan_runs(fork, parent) for fork in rows if fork.equal_compute]
    assert equal
    for one in equal:
        assert one.operations() == pytest.approx(wanted, rel=1 / one.runs[0][1].steps)
