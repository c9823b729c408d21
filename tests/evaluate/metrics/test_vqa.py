"""The rules of each benchmark on answers written by hand, and the scores against plain counts."""

from __future__ import annotations

import json
import random
import re

import pytest

from openvision3.evaluate.metrics.vqa import ALL, BENCHMARKS, COGNITION, PERCEPTION, Question, load_columns, measure
from openvision3.evaluate.protocol import values
from openvision3.evaluate.statistics import difference, with_interval


def question(answer: str = "yes", key: str = "1", image: str = "a.jpg", part: str = "random", **more) -> Question:
    return Question(key, image, "Is there a dog in the image?", answer, part, **more)


CHOICES = ("rock", "sand", "water", "snow")

READ = {
    "pope": {
        "Yes.": "yes",
        "No.": "no",
        "yes, there is": "yes",
        "No, there is no dog.": "no",
        "There is not a dog": "no",
        "The image shows a cat. There is no dog.": "yes",  # only the first sentence counts
        "NO": "yes",  # the words are No, no and not
        "Nothing": "yes",
        "no\nthere": "yes",  # words are split at spaces alone
        " No": "no",
        "": "yes",
        "Nein": "yes",
        "いいえ": "yes",
    },
    "mme": {
        "Yes.": "yes",
        "No": "no",
        "yes, there is": "yes",
        "not sure": "no",  # within the first four characters
        "I do not": "",
        "": "",
        "Ja": "",
        "いいえ": "",
        "  YES": "yes",
        "y": "",
        "know": "no",
    },
    "seedbench": {"B": "B", "b": "", "(B)": "", "B.": "", "B. sand": "", "": "", "E": "", " C\n": "C", "sand": "", "Ｂ": ""},
    "scienceqa": {
        "B": "B",
        "B. sand": "B",
        "B.": "",
        "(B)": "",
        "b": "",
        "The answer is C.": "C",
        "The answer is C": "",  # the pattern asks for a character behind the letter
        "I think. The answer is B. No, The answer is C.": "",
        "E": "",  # there are four choices
        "": "",
        "Die Antwort ist B.": "",
    },
    "gqa": {"Dog.": "dog", "dog": "dog", " A dog ": "a dog", "dogs": "dogs", "": "", "Yes..": "yes", "Hund": "hund", "t-shirt": "t-shirt"},
}


@pytest.mark.parametrize(("benchmark", "written", "read"), [(name, *pair) for name, rules in READ.items() for pair in rules.items()])
def test_an_answer_is_read_as_the_official_script_reads_it(benchmark, written, read):
    assert BENCHMARKS[benchmark].read(written, question(choices=CHOICES)) == read


PIECES = (
    *("Yes", "No", "yes", "no", "not", "NO", "know", "ja", "是", "dog", "A", "B", "E", "F", "b", "(B)", "The answer is ", "The answer is B."),
    *(" ", ".", ",", "\n", "\t", "\u3000", ". ", ": "),
)


def test_answers_put_together_at_random_are_read_by_the_rules_too():
    chance = random.Random(0)
    for _ in range(4000):
        written = "".join(chance.choice(PIECES) for _ in range(chance.randrange(6))).strip()  # as LLaVA's scripts keep an answer
        count = chance.randrange(2, 6)
        one = question("ABCDE"[chance.randrange(count)], choices=tuple("rstuv"[:count]))
        denied = re.search(r"(?:^| )(?:No|no|not)(?: |\Z)", written.split(".")[0].replace(",", ""))
        beginning = written.lower()[:4]
        letter = [found[1] for found in [re.fullmatch(r"([A-E])(\. .*)?", written, re.DOTALL)] if found] or re.findall(r"The answer is ([A-Z]).", written)
        expected = {
            "pope": "no" if denied else "yes",
            "mme": "yes" if "yes" in beginning else "no" if "no" in beginning else "",
            "seedbench": written if written in tuple("ABCDE"[:count]) else "",
            "scienceqa": letter[0] if len(letter) == 1 and letter[0] in "ABCDE"[:count] else "",
            "gqa": re.sub(r"\.+\Z", "", written).lower(),
        }
        assert {benchmark: BENCHMARKS[benchmark].read(written, one) for benchmark in expected} == expected, written


@pytest.mark.parametrize(
    ("written", "right", "accept", "is_right"),
    [
        ("A cat.", "cat", (), True), ("the Cat", "cat", (), True), ("kitten", "cat", ("kitten",), True), ("cat and dog", "cat", (), False),
        ("", "cat", (), False),
        ("C", "C", (), True), ("c.", "C", (), True), ("B", "C", (), False), ("A", "A", (), True),
        ("Yes, it does.", "yes", (), True), ("no", "yes", (), False), ("No cat is there", "no", (), True), ("Nein", "no", (), False),
    ],
)  # fmt: skip
def test_answers_of_our_conversations_are_right_but_for_case_article_and_punctuation(written, right, accept, is_right):
    one = question(right, accept=accept)
    assert (BENCHMARKS["conversations"].read(written, one) == one.answer) == is_right


def test_prompts_are_those_of_llavas_evaluation():
    one = Question("1", "a.jpg", "What is this? Please answer yes or no.", "B", "x", CHOICES, hint="It is cold.")
    options = "A. rock\nB. sand\nC. water\nD. snow\nAnswer with the option's letter from the given choices directly."
    assert BENCHMARKS["mme"].prompt(one) == "What is this?\nAnswer the question using a single word or phrase."
    assert BENCHMARKS["pope"].prompt(one) == BENCHMARKS["gqa"].prompt(one) == f"{one.text}\nAnswer the question using a single word or phrase."
    assert BENCHMARKS["scienceqa"].prompt(one) == f"Context: It is cold.\n{one.text}\n{options}"
    assert BENCHMARKS["seedbench"].prompt(Question("1", "a", "Where?", "B", "x", CHOICES)) == f"Where?\n{options}"


def asked(count: int, parts: tuple[str, ...], seed: int = 0) -> list[tuple[Question, str]]:
    """Yes or no questions, two an image, answered at random."""
    chance = random.Random(seed)
    return [
        (question(chance.choice(("yes", "no")), f"{part}/{number}", f"{number // 2}.jpg", part), chance.choice(("Yes", "no", "No, not")))
        for part in parts
        for number in range(count)
    ]


def test_pope_counts_true_and_false_answers_as_its_script_does():
    answered = asked(100, ("random", "popular", "adversarial"))
    numbers = values(measure("pope", answered, 128)[0])
    for part in ("random", "popular", "adversarial", ALL):
        pairs = [(written == "Yes", one.answer == "yes") for one, written in answered if part in (one.part, ALL)]
        true_yes, false_yes, missed = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True)))
        precision, recall = true_yes / (true_yes + false_yes), true_yes / (true_yes + missed)
        expected = {
            "accuracy": sum(said == true for said, true in pairs) / len(pairs),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes_ratio": sum(said for said, _ in pairs) / len(pairs),
        }
        assert {name: numbers[f"{part}: {name}"] for name in expected} == pytest.approx(expected)


def test_a_model_that_never_says_yes_has_a_precision_of_0_and_no_error():
    numbers = values(measure("pope", [(one, "no") for one, _ in asked(10, ("random",))], 128)[0])
    assert numbers["random: precision"] == numbers["random: f1"] == numbers["random: recall"] == numbers["random: yes_ratio"] == 0


def test_answers_that_are_neither_yes_nor_no_are_told_although_pope_takes_them_for_yes():
    numbers = values(measure("pope", [(question(key=str(place)), written) for place, written in enumerate(("yes", "a dog", "", "NO"))], 128)[0])
    assert numbers["unmatched"] == 0.5 and numbers["random: yes_ratio"] == 1


def mme_answers(chance: random.Random, count: int = 6) -> list[tuple[Question, str]]:
    return [
        (Question(f"{part}/{image}/{answer}", f"{part}/{image}.png", "Is it?", answer, part), chance.choice(("yes", "no", "maybe")))
        for part in (*PERCEPTION, *COGNITION)
        for image in range(count)
        for answer in ("yes", "no")
    ]


def test_mme_sums_accuracy_and_accuracy_of_pairs_over_its_subtasks():
    answered = mme_answers(random.Random(1))
    numbers = values(measure("mme", answered, 128)[0])
    totals = {}
    for part in (*PERCEPTION, *COGNITION):
        right = [written == one.answer for one, written in answered if one.part == part]
        totals[part] = 100 * sum(right) / len(right) + 100 * sum(all(right[start : start + 2]) for start in range(0, len(right), 2)) / (len(right) / 2)
        assert numbers[f"{part}: score"] == pytest.approx(totals[part])
        assert numbers[f"{part}: score"] == pytest.approx(100 * (numbers[f"{part}: accuracy"] + numbers[f"{part}: accuracy_plus"]))
    assert numbers["perception"] == pytest.approx(sum(totals[part] for part in PERCEPTION))
    assert numbers["cognition"] == pytest.approx(sum(totals[part] for part in COGNITION))


def test_mmes_sums_need_every_subtask_and_leave_out_images_with_one_answer():
    answered = [pair for pair in mme_answers(random.Random(1)) if pair[0].part != "OCR"][1:]  # the first image has one answer left
    numbers, _, missing = measure("mme", answered, 128)
    found = {one.metric: one for one in numbers}
    assert "perception" not in found and "cognition" in found and dict(missing)["perception"].endswith("lacks OCR")
    assert found["existence: score"].count == 10 and found["count: score"].count == 12


def test_right_letters_and_words_are_counted_over_all_and_by_part():
    answered = [(question("B", str(n), f"{n}.jpg", "Location" if n % 3 else "Counting", choices=CHOICES), "B" if n % 2 else "b") for n in range(12)]
    numbers = values(measure("seedbench", answered, 128)[0])
    assert numbers["accuracy"] == 0.5 and numbers["Counting: accuracy"] == 0.5 and numbers["unmatched"] == 0.5 and numbers["commonest_answer"] == 1


@pytest.mark.parametrize(("benchmark", "metric"), [("pope", "random: f1"), ("pope", "random: accuracy"), ("mme", "perception")])
def test_intervals_are_over_images_and_hold_the_value(benchmark, metric):
    answered = asked(200, ("random",)) if benchmark == "pope" else mme_answers(random.Random(2))
    numbers, columns, _ = measure(benchmark, answered, 128)
    found = next(with_interval(one, columns) for one in numbers if one.metric == metric)
    assert found.low < found.value < found.high and "bootstrap over samples" in found.interval
    doubled = [(Question(f"{one.key}+", one.image, one.text, one.answer, one.part), written) for one, written in answered]
    if benchmark == "pope":  # copies of the questions of an image are no further images: the interval must not shrink
        numbers, columns, _ = measure(benchmark, answered + doubled, 128)
        again = next(with_interval(one, columns) for one in numbers if one.metric == metric)
        assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=1e-9)


@pytest.mark.parametrize("metric", ["random: f1", "random: accuracy"])
def test_two_models_are_compared_over_the_same_images(metric):
    answered = asked(200, ("random",))
    better = [(one, one.answer if place % 3 else written) for place, (one, written) in enumerate(answered)]
    columns, other = measure("pope", answered, 128)[1], measure("pope", better, 128)[1]
    found = difference(metric, "better", "chance", other, columns)
    assert found.low > 0 and found.p < 0.05
    assert difference(metric, "a", "a", columns, columns).p == 1


def test_columns_of_written_answers_are_those_of_the_evaluation(tmp_path):
    answered = asked(20, ("random", "popular"))
    rows = [
        {"model": "m", "benchmark": "pope", "key": one.key, "image": one.image, "question": one.text, "answer": one.answer, "part": one.part,
         "choices": [], "accept": [],
         "written": written, "error": None}
        for one, written in answered
    ]  # fmt: skip
    rows.append({**rows[0], "key": "failed", "written": "", "error": "failed: out of order"})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_columns(tmp_path / "answers.jsonl") == {"m": measure("pope", answered, 128)[1]}
