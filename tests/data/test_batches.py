"""A batch is a function of (seed, step): not of workers, not of where a run began, not of broken neighbours."""

import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import take

from openvision3.data import openmoji
from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches, evaluation_batches, to_device
from openvision3.data.folders import FolderSource
from openvision3.data.images import to_tensor
from openvision3.data.labelled import Classes, read_classes
from openvision3.data.openmoji import EmojiSource
from openvision3.data.order import Mix, ShardShuffle, Shuffle
from openvision3.data.problems import Problems, count_reasons
from openvision3.data.shards.source import ShardSource
from openvision3.data.sources import MixedSource
from openvision3.data.text import TextTokenizer
from openvision3.distributed import Ranks
from openvision3.draws import draw_seed
from openvision3.train.config import PretrainConfig


@pytest.fixture(scope="module")
def emoji() -> EmojiSource:
    return EmojiSource(openmoji.load_emoji().train[::80], aliases=True)


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return TextTokenizer.train([e.name for e in openmoji.load_emoji().train], 500)


@pytest.fixture
def broken(tmp_path) -> FolderSource:
    """Twelve noise pictures, of which 3 is no picture, 5 has no caption, 7 is blank and 9 is one pixel."""
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"number {i}")
    (tmp_path / "03.png").write_bytes(b"<html>")
    (tmp_path / "05.txt").unlink()
    (tmp_path / "07.txt").write_text(" \n")
    Image.new("RGB", (1, 1)).save(tmp_path / "09.png")
    return FolderSource(tmp_path)


def batches(source, words, *, captions=1, **options) -> TrainingBatches:
    plan = {"size": 16, "batch": 5, "seed": 0} | {name: options.pop(name) for name in BatchPlan.__dataclass_fields__ if name in options}
    return TrainingBatches(source, words, BatchPlan(TextShape(8, 10, captions), **plan), **options)


def same(one: list[dict], other: list[dict]) -> bool:
    assert len(one) == len(other)
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True))


def test_batches_are_the_same_with_no_worker_and_with_two(emoji, words, broken):
    mixed = MixedSource([emoji, broken])
    alone, two = (batches(mixed, words, captions=2, pixel_share=0.5, workers=n) for n in (0, 2))
    assert same(take(alone, 3, 12), take(two, 3, 12))
    assert list(alone.problems) == list(two.problems) and alone.problems.counts == two.problems.counts


def test_a_run_that_starts_later_gets_the_same_batches(emoji, words):
    whole = take(batches(emoji, words, pixel_share=0.25), 0, 25)
    assert same(whole[13:], take(batches(emoji, words, pixel_share=0.25), 13, 12))


def test_the_same_seed_gives_the_same_batches_twice_and_another_seed_others(emoji, words):
    one = take(batches(emoji, words), 0, 3)
    assert same(one, take(batches(emoji, words), 0, 3))
    other = take(batches(emoji, words, seed=1), 0, 3)
    for key in ("images", "sample_key", "draw_key"):
        assert not torch.equal(one[0][key], other[0][key])


def test_preparing_batches_leaves_the_global_random_stream_alone(emoji, words):
    states = []
    for workers in (0, 1):
        torch.manual_seed(5)
        take(batches(emoji, words, workers=workers), 0, 2)
        states.append(torch.rand(3))
    torch.manual_seed(5)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], torch.rand(3))


def test_every_sample_comes_once_an_epoch_in_a_new_order_and_a_new_view(emoji, words):
    made = batches(emoji, words)
    count = len(emoji)
    epochs = [[made.sample(epoch * count + i)[:2] for i in range(count)] for epoch in range(2)]
    first, second = ([key for key, _ in epoch] for epoch in epochs)
    assert sorted(first) == sorted(second) == sorted(emoji.key(i) for i in range(count))
    assert first != second
    views = dict(epochs[0]), dict(epochs[1])
    assert sum(torch.equal(views[0][key], views[1][key]) for key in first) <= 1


def test_families_share_batches_every_other_epoch_and_no_sample_is_lost(words):
    source = EmojiSource(tuple(e for e in openmoji.load_emoji().train if e.group == "People & Body")[:300])
    made = batches(source, words, families=True)

    def order(epoch: int) -> list[int]:
        return [made.index(epoch * len(source) + i) for i in range(len(source))]

    def neighbours(indices: list[int]) -> float:
        return np.mean([source.family(a) == source.family(b) for a, b in itertools.pairwise(indices)])

    for epoch in (0, 1, 2, 3):
        assert sorted(order(epoch)) == list(range(len(source)))
    assert order(1) != order(3)
    assert neighbours(order(1)) > 0.7 > 0.2 > neighbours(order(0))


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_balanced_families_have_their_shares_in_an_epoch_of_the_usual_length(words, balance):
    source = EmojiSource(tuple(e for e in openmoji.load_emoji().train if e.group in {"People & Body", "Food & Drink"})[:400])
    made = batches(source, words, family_balance=balance)
    sizes = Counter(source.family(i) for i in range(len(source)))
    shares = {family: size ** (1 - balance) for family, size in sizes.items()}
    total = sum(shares.values())
    seen: set[int] = set()
    for epoch in range(3):
        indices = [made.index(epoch * len(source) + i) for i in range(len(source))]
        shown = Counter(source.family(i) for i in indices)
        wanted = {family: len(source) * share / total for family, share in shares.items()}
        assert all(abs(shown[family] - wanted[family]) < 1 for family in sizes)
        times = Counter(indices)
        for family in sizes:  # within a family, all come equally often
            members = [times[i] for i in range(len(source)) if source.family(i) == family]
            assert max(members) - min(members) <= 1
        seen.update(indices)
    assert len(seen) > len(times)  # other members in other epochs
    assert max(sizes.values()) > 10 and min(sizes.values()) == 1
    again = batches(source, words, family_balance=balance)
    assert [again.index(i) for i in range(900)] == [made.index(i) for i in range(900)]


def test_a_family_is_an_emoji_in_all_skin_tones_and_genders_and_a_picture_is_its_own(broken):
    families = {e.name: e.family for e in openmoji.load_emoji().every}
    assert families["woman running dark skin tone"] == families["person running"] == "running"
    assert families["pizza"] == "pizza"
    assert EmojiSource(tuple(e for e in openmoji.load_emoji().train if e.name == "person")).family(0) == "openmoji/person"
    both = MixedSource([EmojiSource(openmoji.load_emoji().train[:2]), broken])
    assert both.family(2) == both.key(2)


def test_images_travel_as_uint8_and_are_scaled_to_the_last_bit_where_the_loop_moves_them(emoji, words):
    """Scaled in the worker they were four times the bytes of shared memory; the numbers are those of one image read by itself."""
    made = batches(emoji, words, workers=1)
    batch = take(made, 0, 1)[0]
    assert batch["images"].dtype == torch.uint8 and batch["images"].nbytes == 5 * 3 * 16 * 16
    assert torch.equal(batch["images"], torch.stack([made.sample(position)[1] for position in range(5)]))
    moved = to_device(batch, "cpu")
    assert moved["images"].dtype == torch.float32 and all(torch.equal(moved[name], batch[name]) for name in batch if name != "images")
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_device({"images": every}, "cpu")["images"], every.float().div(127.5).sub(1.0))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_a_gpu_are_pinned_whole_and_those_for_a_cpu_are_not(emoji, words, monkeypatch, workers):
    pinned = set()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.add(id(self)) or self)
    batch = take(batches(emoji, words, pixel_share=0.5, workers=workers, pinned=True), 0, 1)[0]
    assert {"draw_key", "pixel_rows", "word_positions"} < batch.keys() and all(id(value) in pinned for value in batch.values())
    pinned.clear()
    take(batches(emoji, words, workers=workers), 0, 1)
    assert not pinned


def test_word_positions_name_the_words_that_are_predicted(emoji, words):
    for batch in take(batches(emoji, words), 0, 3):
        following = batch["caption_ids"][:, 1:]
        assert torch.equal(following.flatten()[batch["word_positions"]], following[following != words.pad_id])


def test_a_row_belongs_together(emoji, words):
    made = batches(emoji, words)
    for batch in take(made, 0, 2):
        for row in range(5):
            index = next(i for i in range(len(emoji)) if draw_seed(emoji.key(i)) == batch["sample_key"][row])
            pieces = words.ids(emoji.captions(index)[0])
            assert batch["caption_ids"][row].tolist()[: len(pieces) + 2] == [words.begin_id, *pieces, words.end_id][:10]
            assert batch["text_ids"][row, 0].tolist()[: len(pieces) + 1] == [*pieces[:7], words.class_id]


def test_a_broken_sample_is_replaced_counted_once_and_the_batch_stays_full(broken, words):
    made = batches(broken, words, batch=4)
    rows = take(made, 0, 9)  # three epochs
    assert all(len(batch["images"]) == 4 for batch in rows)
    usable = {draw_seed(broken.sample_key(i)) for i in (0, 1, 2, 4, 6, 8, 10, 11)}
    seen = {int(key) for batch in rows for key in batch["sample_key"]}
    assert seen == usable
    assert count_reasons(made.problems) == {"no caption": 2, "not an image": 1, "too small": 1}
    assert {Path(p["key"]).name for p in made.problems} == {"03.png", "05.png", "07.png", "09.png"}


def test_a_good_neighbour_is_the_same_beside_a_broken_sample(broken, words):
    made = batches(broken, words)
    before = {key: image for key, image, *_ in map(made.sample, range(12))}
    (broken.folder / "00.png").write_bytes(b"")
    after = batches(broken, words)
    for position in range(12):
        if made.source.key(made.index(position)) != broken.key(0):
            key, image, *_ = after.sample(position)
            if key in before:
                assert torch.equal(image, before[key])
    assert any(p["reason"] == "empty" for position in range(12) for p in after.sample(position)[4])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_one_usable_sample_stops_with_the_reason_in_one_line(tmp_path, words, workers):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"cannot be used, the last because of: not an image") as caught:
        take(batches(FolderSource(tmp_path), words, workers=workers), 0, 1)
    assert "\n" not in str(caught.value)


def test_nine_broken_in_ten_do_not_stop_a_run(tmp_path, words):
    for i in range(50):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
        (tmp_path / f"{i}.txt").write_text("x")
    for i in range(5):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    made = batches(FolderSource(tmp_path), words, batch=20)
    take(made, 0, 10)
    assert count_reasons(made.problems) == {"not an image": 45}


def test_a_shard_that_vanishes_is_counted_not_fatal(tmp_path, emoji, words):
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i in range(30):
            for name, data in ((f"{i}.jpg", out.getvalue()), (f"{i}.txt", b"x")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = MixedSource([emoji, ShardSource([str(tmp_path / "s.tar")])])
    (tmp_path / "s.tar").unlink()
    made = batches(source, words)
    take(made, 0, -(-len(source) // 5))
    assert count_reasons(made.problems) == {"vanished": 30}


def test_problems_found_when_the_data_was_opened_are_there_from_the_start(emoji, words):
    source = EmojiSource(emoji.emoji, problems=[{"key": "x", "reason": "damaged shard", "detail": ""}])
    assert batches(source, words).problems.take_new() == list(source.problems)


def test_the_first_caption_is_predicted_and_contrasted_and_others_are_drawn(words):
    source = EmojiSource((openmoji.Emoji("\U0001f600", "grinning face", ("grin", "smile", "happy"), None),), aliases=True)
    made = batches(source, words, captions=2)
    drawn = [made.sample(position)[3] for position in range(40)]
    assert {first for first, _ in drawn} == {"grinning face"}
    assert {second for _, second in drawn} == {"grin", "smile", "happy"}
    assert made.sample(0)[3] == made.sample(0)[3]


def test_captions_that_are_not_there_are_marked_absent(words):
    names = [openmoji.Emoji("\U0001f600", "one", (), None), openmoji.Emoji("\U0001f601", "two", ("second",), None)]
    made = batches(EmojiSource(tuple(names), aliases=True), words, captions=2, batch=2)
    batch = take(made, 0, 1)[0]
    for row in range(2):
        one = batch["sample_key"][row] == draw_seed("openmoji/1F600")
        assert batch["text_present"][row].tolist() == ([True, False] if one else [True, True])
        second = words.ids("" if one else "second")
        assert batch["text_ids"][row, 1, : len(second) + 1].tolist() == [*second, words.class_id]


def test_one_random_sentence_is_contrasted_and_the_whole_caption_fills_in_and_is_predicted(words, broken):
    for text in broken.folder.glob("*.txt"):
        text.write_text("red heart. blue car, sign")
    for count, expected in ((1, {("red heart",), ("blue car, sign",)}), (2, {(part, "red heart. blue car, sign") for part in ("red heart", "blue car, sign")})):
        made = TrainingBatches(broken, words, BatchPlan(TextShape(8, 10, count, sentences=True), size=16, batch=5, seed=0))
        samples_made = [made.sample(position) for position in range(30)]
        assert {sample.texts for sample in samples_made} == expected
        assert {sample.caption for sample in samples_made} == {"red heart. blue car, sign"}


def test_other_captions_stand_beside_the_random_sentence(words):
    source = EmojiSource((openmoji.Emoji("\U0001f600", "grinning face", ("grin",), None),), aliases=True)
    made = TrainingBatches(source, words, BatchPlan(TextShape(8, 10, 2, sentences=True), size=16, batch=1, seed=0))
    assert made.sample(0)[3] == ("grinning face", "grin")


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25, 1 / 3, 0.5, 0.6, 0.75, 1.0])
def test_pixel_rows_are_the_share_asked_for_and_reach_every_row(emoji, words, share):
    made = batches(emoji, words, batch=8, pixel_share=share)
    none = torch.empty(0) if share == 0 else torch.arange(8)
    rows = [made.add_draws({}, step, range(8)).get("pixel_rows", none).tolist() for step in range(120)]
    assert abs(sum(map(len, rows)) / (120 * 8) - share) < 0.01
    assert {row for step in rows for row in step} == (set(range(8)) if share else set())
    assert all(step == sorted(set(step)) for step in rows)


def test_draw_keys_are_unlike_for_every_row_and_step(emoji, words):
    made = batches(emoji, words)
    keys = torch.cat([made.add_draws({}, step, range(5))["draw_key"] for step in range(50)])
    assert len(keys.unique()) == 250


def test_a_batch_larger_than_the_data_is_filled_from_further_epochs(words):
    source = EmojiSource(openmoji.load_emoji().train[:3])
    batch = take(batches(source, words, batch=7), 0, 1)[0]
    assert sorted(torch.unique(batch["sample_key"], return_counts=True)[1].tolist()) == [2, 2, 3]


@pytest.mark.parametrize(("samples", "batch", "times"), [(3, 7, "2 or 3 times"), (4, 8, "2 times"), (5, 6, "1 or 2 times")])
def test_the_arithmetic_of_too_few_samples_is_shown(samples, batch, times):
    from openvision3.data.batches import fewer_than_a_batch

    assert f"{samples} samples are fewer than a batch of {batch}: every step shows each of them {times}" in fewer_than_a_batch(samples, batch)


@pytest.mark.parametrize(("options", "message"), [({"batch": 0}, "batch 0 cannot be divided"), ({"pixel_share": 1.5}, "between 0 and 1")])
def test_illegal_sizes_are_named(emoji, words, options, message):
    with pytest.raises(ValueError, match=message):
        batches(emoji, words, **options)


def test_an_empty_source_is_an_error_at_once(words):
    with pytest.raises(ValueError, match="holds no sample"):
        batches(EmojiSource(()), words)


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(broken) -> tuple[FolderSource, Classes]:
    """`broken` with a class for each picture, cat for even numbers and dog for odd ones; 8 has none, and 10 is of another class."""
    labels = [("cat", "dog")[i % 2] for i in range(12)]
    labels[8], labels[10] = "", "fox"
    (broken.folder / "captions.csv").write_text("\n".join(["file,label", *(f"{i:02d}.png,{label}" for i, label in enumerate(labels))]))
    return FolderSource(broken.folder), Classes(("cat", "dog"), {"cat": 0, "dog": 1})


def test_each_row_has_the_class_of_its_sample_whatever_the_workers_and_ranks(labelled, words):
    source, classes = labelled
    of = {draw_seed(source.sample_key(i)): i % 2 for i in range(12)}
    whole = take(batches(source, words, batch=6, labels=classes), 0, 6)
    for batch in whole:
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].tolist() == [of[int(key)] for key in batch["sample_key"]]
    assert {int(label) for batch in whole for label in batch["labels"]} == {0, 1}
    for rank in range(2):
        made = batches(source, words, batch=6, labels=classes, ranks=Ranks(rank, 2), workers=2 * rank)
        assert [batch["labels"].tolist() for batch in take(made, 2, 2)] == [batch["labels"][3 * rank : 3 * rank + 3].tolist() for batch in whole[2:4]]


def test_a_sample_without_a_class_is_replaced_and_counted(labelled, words):
    source, classes = labelled
    made = batches(source, words, batch=6, labels=classes)
    take(made, 0, 6)
    assert count_reasons(made.problems) == {"no caption": 2, "not an image": 1, "no label": 1, "too small": 1, "class not in the list": 1}
    assert {p["key"][-6:]: p["reason"] for p in made.problems if "caption" not in p["reason"]} == {
        "03.png": "not an image",
        "08.png": "no label",
        "09.png": "too small",
        "10.png": "class not in the list",
    }
    nothing = batches(source, words, labels=Classes(("catt",), {"catt": 0}))
    with pytest.raises(
        ValueError, match=r"256 samples in a row cannot be used, the last because of: class not in the list \(class \w+ is none of the 1 classes"
    ):
        nothing.check_room()


def test_labels_and_the_lack_of_a_tokenizer_change_nothing_else(emoji, words):
    classes = read_classes(emoji, "name")
    plain, labelled, textless = (
        take(batches(emoji, tokenizer, pixel_share=0.5, labels=labels), 0, 4) for tokenizer, labels in ((words, None), (words, classes), (None, classes))
    )
    assert same(plain, [{name: value for name, value in batch.items() if name != "labels"} for batch in labelled])
    assert all(batch.keys() == {"images", "labels", "sample_key", "draw_key", "pixel_rows"} for batch in textless)
    assert same(textless, [{name: batch[name] for name in textless[0]} for batch in labelled])


def test_without_a_tokenizer_no_caption_is_needed(labelled):
    source, classes = labelled
    made = batches(source, None, batch=6, labels=classes)
    seen = {int(key) for batch in take(made, 0, 6) for key in batch["sample_key"]}
    assert seen == {draw_seed(source.sample_key(i)) for i in (0, 1, 2, 4, 5, 6, 7, 11)} and "no caption" not in count_reasons(made.problems)


def test_evaluation_sees_every_usable_picture_once_in_order_and_names_the_rest(broken):
    (broken.folder / "11.png").write_bytes(b"")
    problems = Problems()
    got = list(evaluation_batches(broken, 16, 4, problems))
    keys = [Path(key).stem for _, names, _, _ in got for key in names]
    assert keys == ["00", "01", "02", "04", "05", "06", "07", "08", "09", "10"]
    assert [len(images) for _, _, images, _ in got] == [4, 4, 2]
    assert [c for _, _, _, texts in got for c in texts][4] == ()
    assert count_reasons(problems) == {"not an image": 1, "empty": 1}
    assert torch.equal(got[0][2][0], to_tensor(broken.image(0, 16)))


SCRIPT = """
import sys, torch
from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches
from openvision3.data.openmoji import EmojiSource, load_emoji
from openvision3.data.text import TextTokenizer
source = EmojiSource(load_emoji().train[:50])
words = TextTokenizer.train([e.name for e in source.emoji])
made = TrainingBatches(source, words, BatchPlan(TextShape(8, 8), size=16, batch=4, seed=0), workers=2).from_step(0)
next(made), next(made)  # one from each worker
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    next(made)
print("went on", flush=True)
raise SystemExit(75)  # with the workers still there: the interpreter must get out all the same
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
def test_ctrl_c_does_not_take_the_workers_from_a_run_that_wants_to_save():
    ignoring = "import signal; signal.signal(signal.SIGINT, lambda *_: None)\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.Popen(
        [sys.executable, "-c", ignoring + SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    assert run.stdout.readline() == "ready\n"
    os.killpg(run.pid, signal.SIGINT)
    out, _ = run.communicate("\n", timeout=60)
    assert out == "went on\n"
    assert run.returncode == 75


# --- lanes: the shards of a machine ---------------------------------------------------------------------------------------


class Shards:
    """Samples in shards that would have to be fetched, of these sizes; `before` others stand before them in a mix."""

    problems = ()

    def __init__(self, sizes, before=0):
        self.starts, self.before = [0, *np.cumsum(sizes).tolist()], before

    def __len__(self):
        return self.before + self.starts[-1]

    def order(self, seed, epoch, lanes=1):
        if not self.before:
            return ShardShuffle(self.starts, 16, seed, epoch, lanes)
        counts = (self.before, self.starts[-1])
        return Mix(counts, counts, [lambda turn: Shuffle(self.before, 1, turn), lambda turn: ShardShuffle(self.starts, 16, 2, turn, lanes)], seed, epoch, lanes)

    def fetched(self, batches, steps) -> set[tuple[int, int]]:
        """(shard, round) of the rows of one machine."""
        places = [batches.place(step * batches.batch + row) for step in steps for row in batches.rows]
        return {(int(np.searchsorted(self.starts, index - self.before, "right")) - 1, turn) for index, turn in places if index >= self.before}


def machines(source, count, batch=128, lanes=16) -> list[TrainingBatches]:
    return [
        TrainingBatches(source, None, BatchPlan(TextShape(8, 8), size=16, batch=batch, seed=3, lanes=lanes), ranks=Ranks(rank, count)) for rank in range(count)
    ]


@pytest.mark.parametrize(("count", "lanes", "fetches"), [(1, 16, 64), (2, 16, 64), (8, 16, 64), (16, 16, 64), (32, 16, 128), (64, 64, 64), (8, 1, 512)])
def test_each_shard_of_an_epoch_is_fetched_by_one_machine(count, lanes, fetches):
    source = Shards([128] * 64)
    assert sum(len(source.fetched(each, range(64))) for each in machines(source, count, lanes=lanes)) == fetches


@pytest.mark.parametrize("count", [2, 4, 8])
def test_shards_of_unlike_sizes_are_fetched_by_two_machines_only_where_they_are_cut(count):
    sizes = np.random.default_rng(0).integers(1, 256, 64).tolist()
    source = Shards(sizes)
    epochs = 3
    touched = [source.fetched(each, range(epochs * len(source) // 128)) for each in machines(source, count)]
    assert sum(map(len, touched)) <= epochs * (64 + count - 1)


def test_in_a_mix_too_each_shard_is_fetched_by_one_machine():
    source = Shards([128] * 64, before=1000)
    touched = [source.fetched(each, range(3 * len(source) // 128)) for each in machines(source, 8)]
    assert sum(map(len, touched)) <= 64 * (1 + max(turn for each in touched for _, turn in each))


def test_what_stands_in_a_row_of_a_step_depends_neither_on_the_processes_nor_on_where_the_run_began():
    source = Shards(np.random.default_rng(0).integers(1, 60, 40).tolist())
    steps = range(3 * len(source) // 128 + 1)
    one, later = machines(source, 1)[0], machines(source, 1)[0]
    whole = [one.place(step * 128 + row) for step in steps for row in range(128)]
    for count in (2, 8):
        ranks = machines(source, count)
        assert [each.place(step * 128 + row) for step in steps for each in ranks for row in each.rows] == whole
    assert [later.place(position) for position in range(20 * 128, len(whole))] == whole[20 * 128 :]
    full = Counter(place for place in whole if place[1] < 2)
    assert len(full) == full.total() == 2 * len(source), "two whole epochs hold each sample once each"


def test_a_sample_that_cannot_be_used_is_replaced_by_one_of_its_lane():
    made = machines(Shards([100] * 7), 1)[0]
    for entry in range(0, 2100, 37):
        others = [made._instead(entry, attempt) for attempt in range(1, 128)]
        assert {other % 16 for other in others} == {entry % 16}
        assert {other // 700 for other in others} == {entry // 700}
        assert len(set(others)) > 20


def test_lanes_divide_the_batch():
    with pytest.raises(ValueError, match="lanes 16 do not divide the batch of 24"):
        machines(Shards([100] * 7), 1, batch=24)
    with pytest.raises(ValueError, match="lanes 3 do not divide the batch of 64"):
        PretrainConfig(lanes=3, batch=64)
