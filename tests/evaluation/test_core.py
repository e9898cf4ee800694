"""The CORE protocol: golden draws and prompts, spans, decisions, resuming, and every error."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest

from looped_jax.evaluation import core
from looped_jax.evaluation.core import BundleError, Item, PromptError, ResumeError, Task
from looped_jax.evaluation.core import bundle as core_bundle
from looped_jax.evaluation.core.metric import TaskResult, decide
from looped_jax.evaluation.core.prompts import render, rows, shots

BUNDLE = Path(__file__).parents[2] / ".." / "shared" / "data" / "core" / "eval_bundle"
needs_bundle = pytest.mark.skipif(not BUNDLE.is_dir(), reason="needs shared/data beside us")


def encode(text):
    return list(text.encode())


def task(kind, items, *, shots=0, delimiter=" "):
    return Task("t", kind, shots, delimiter, 25.0, tuple(items))


def words(count):
    return [Item((f"ctx{i}",), (f"out{i}",), 0) for i in range(count)]


def test_golden_shuffle_and_draws():
    drawn = core.draw(task("language_modeling", words(8)), None)
    assert [item.contexts[0] for item in drawn.items] == [
        f"ctx{i}" for i in (0, 3, 7, 2, 1, 6, 4, 5)
    ]
    plain = task("language_modeling", words(8), shots=3)
    assert [item.contexts[0][3:] for item in shots(plain, 0)] == ["7", "4", "1"]
    assert [item.contexts[0][3:] for item in shots(plain, 3)] == ["1", "4", "2"]


def test_shots_are_drawn_from_the_other_items_as_the_protocol_says():
    """random.sample over a list without the item: the protocol in its own words."""
    plain = task("language_modeling", words(30), shots=10)
    for index in range(30):
        others = [i for i in range(30) if i != index]
        expected = random.Random(1234 + index).sample(others, 10)
        assert [int(item.contexts[0][3:]) for item in shots(plain, index)] == expected


def test_golden_prompts():
    choice = [Item(("Q1", "Q1"), ("a", "b"), 1), Item(("Q2", "Q2", "Q2"), ("a", "b", "c"), 2)]
    texts = render(task("multiple_choice", choice, shots=1, delimiter="\nAnswer: "), 1)
    assert texts[2] == "Q1\nAnswer: b\n\nQ2\nAnswer: c" and len(texts) == 3
    schema = [Item(("R", "S"), ("s.", "s."), 0), Item(("X", "Y"), ("z.", "z."), 0)]
    assert render(task("schema", schema, shots=1), 1)[0] == "R s.\n\nX z."
    found = render(task("language_modeling", words(3)[1:], shots=1), 1)
    assert found == ["ctx1 out1\n\nctx2", "ctx1 out1\n\nctx2 out2"]


def test_spans_of_each_kind():
    choice = task("multiple_choice", [Item(("Q", "Q"), ("ab", "ac"), 0)])
    first, second = rows(choice, 0, encode, 256, 100)
    assert first.tokens.tolist() == [256, *b"Q ab"] and (first.start, first.end) == (4, 5)
    assert (second.start, second.end) == (4, 5)
    schema = task("schema", [Item(("the cat", "the big dog"), ("ran", "ran"), 0)])
    for row in rows(schema, 0, encode, 256, 100):
        assert bytes(row.tokens[row.start : row.end].tolist()) == b" ran"
    (row,) = rows(task("language_modeling", words(1)), 0, encode, 256, 100)
    assert bytes(row.tokens[row.start : row.end].tolist()) == b" out0"


def test_long_prompts_lose_their_beginning_and_spans_move_along():
    (row,) = rows(task("language_modeling", words(1)), 0, encode, 256, 7)
    assert bytes(row.tokens.tolist()) == b"x0 out0" and (row.start, row.end, row.cut) == (
        2,
        7,
        False,
    )
    (row,) = rows(task("language_modeling", words(1)), 0, encode, 256, 4)
    assert bytes(row.tokens.tolist()) == b"out0"
    assert (row.start, row.end, row.cut) == (1, 4, True)


def test_prompts_that_cannot_be_scored_are_named():
    with pytest.raises(PromptError, match="task t, example 0: the options have no token in common"):
        rows(task("schema", [Item(("a", "b"), ("x", "y"), 0)]), 0, encode, 256, 9)
    lone = task("language_modeling", [Item(("a",), ("b",), 0)])
    with pytest.raises(PromptError, match="not the beginning of"):
        rows(lone, 0, lambda text: [len(text)], 256, 9)


def test_decisions():
    losses = np.array([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    assert decide("multiple_choice", losses, 1).tolist() == [True, False, False]
    assert decide("schema", losses, 0).tolist() == [False, True, True]  # the first on ties
    assert decide("multiple_choice", np.array([[np.nan], [3.0]]), 1).tolist() == [True]
    assert decide("language_modeling", np.array([[True, False]]), 0).tolist() == [True, False]


# Examples in the whole tasks, which turn six printed digits of an accuracy back into the fraction.
EXAMPLES = (
    10042, 2117, 20321, 2376, 1172, 100, 1221, 1838, 500, 5153, 10042, 273, 1267, 1000, 230, 1320,
    210, 32, 10570, 7983, 3270, 10000,
)  # fmt: skip


@needs_bundle
def test_published_gpt2_scores_are_recomputed_to_every_printed_digit():
    bundle = core.load_bundle(BUNDLE)
    with (BUNDLE / "openai-community-gpt2.csv").open() as file:
        lines = [[cell.strip() for cell in line] for line in csv.reader(file)]
    published = {line[0]: line[1:] for line in lines[1:]}
    assert [t.name for t in bundle.tasks] == list(published)[:-1] and len(bundle.tasks) == 22
    results = []
    for each, count in zip(bundle.tasks, EXAMPLES, strict=True):
        accuracy, centred = published[each.name]
        right = round(float(accuracy) * count)
        correct = np.arange(count)[:, None] < right
        results.append(TaskResult(each.name, each.baseline, correct))
        assert f"{results[-1].accuracy[0]:.6f}" == accuracy, each.name
        assert f"{results[-1].centered[0]:.6f}" == centred, each.name
    assert f"{core.core_mean(results)[0]:.6f}" == published["CORE"][1]


@needs_bundle
def test_every_task_of_the_bundle_renders():
    for each in core.load_bundle(BUNDLE).tasks:
        drawn = core.draw(each, 15)
        for index in range(3):
            for row in rows(drawn, index, encode, 256, 4000):
                assert 1 <= row.start <= row.end <= len(row.tokens)
                assert not row.cut


def write_bundle(folder):
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: one, dataset_uri: one.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}\n"
        "- {label: two, dataset_uri: two.jsonl, num_fewshot: [0], "
        "icl_task_type: language_modeling}\n"
    )
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\none,50\ntwo,0\n")
    choice = [{"query": f"q{i}", "choices": ["aa", "b"], "gold": i % 2} for i in range(6)]
    plain = [{"context": f"c{i}", "continuation": "d"} for i in range(5)]
    for name, items in (("one", choice), ("two", plain)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / "eval_data" / f"{name}.jsonl").write_text(lines)
    return folder


def fake_scores(rows):
    """Shorter spans score better at the first loop count, longer ones at the second."""
    size = np.array([[row.end - row.start] for row in rows], float)
    return np.hstack([size, -size]), np.array([[True, len(row.tokens) % 2 == 0] for row in rows])


def run(folder, **settings):
    settings = {"loop_counts": (1, 2), "max_len": 64} | settings
    bundle = core.load_bundle(folder)
    return core.evaluate_tasks(bundle, encode, 256, fake_scores, **settings)


def test_results_and_tables(tmp_path):
    one, two = run(write_bundle(tmp_path / "b"), rows_per_call=3)
    assert one.accuracy.tolist() == [0.5, 0.5] and one.centered.tolist() == [0, 0]
    assert two.accuracy.tolist() == [1, 0]
    assert core.core_mean([one, two]).tolist() == [0.5, 0]
    text = core.format_csv([one, two], 0).splitlines()
    assert [cell.strip() for cell in text[0].split(",")] == ["Task", "Accuracy", "Centered"]
    assert [cell.strip() for cell in text[-1].split(",")] == ["CORE", "", "0.500000"]
    assert "K=2" in core.format_table([one, two], (1, 2))


def test_cropped_prompts_are_counted_and_shown(tmp_path):
    folder, state = write_bundle(tmp_path / "b"), tmp_path / "state.jsonl"
    for max_len in (64, 11, 10, 4):
        for result, drawn in zip(
            run(folder, max_len=max_len), core.load_bundle(folder).tasks, strict=True
        ):
            drawn = core.draw(drawn, None)
            whole = [rows(drawn, index, encode, 256, 64) for index in range(len(drawn.items))]
            longest = [max(len(row.tokens) for row in example) for example in whole]
            assert result.cropped == sum(length > max_len for length in longest)
            assert result.cut == 0
    one, two = run(folder, max_len=4, state_file=state)
    lines = core.format_table([one, two], (1, 2)).splitlines()
    assert lines[0].split()[-1] == "cropped" and lines[1].endswith("6 of 6")
    table = list(csv.DictReader(core.format_all([one, two], (1, 2)).splitlines()))
    assert [(row["task"], row["loops"], row["cropped"]) for row in table] == [
        ("one", "1", "6"), ("one", "2", "6"), ("two", "1", "5"), ("two", "2", "5"),
        ("CORE", "1", "11"), ("CORE", "2", "11"),
    ]  # fmt: skip
    assert [r.cropped for r in run(folder, max_len=4, state_file=state)] == [6, 5]  # remembered
    state.write_text(state.read_text().replace('"cropped"', '"trimmed"'))
    with pytest.raises(ResumeError, match="written by an earlier version; delete the file"):
        run(folder, max_len=4, state_file=state)


@pytest.mark.parametrize(("choices", "chosen"), [(("a", "ab"), 0), (("ab", "a"), 0)])
def test_an_empty_span_wins_only_where_it_comes_first(tmp_path, choices, chosen):
    """As NaN fares in Python's min, which decides in the reference; any scores will do for it."""
    folder = write_bundle(tmp_path / "b")
    items = [{"query": "q", "choices": choices, "gold": i % 2} for i in range(6)]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "eval_data" / "one.jsonl").write_text(lines)
    bundle = core.load_bundle(folder)
    gold = [item.gold for item in core.draw(bundle.tasks[0], None).items]
    for filler in (-9.0, np.nan):

        def scores(rows, filler=filler):
            empty = np.array([[row.start == row.end] for row in rows])
            return np.where(empty, filler, 1.0), np.ones((len(rows), 1), bool)

        result = core.evaluate_tasks(bundle, encode, 256, scores, loop_counts=(1,), max_len=64)[0]
        assert result.correct[:, 0].tolist() == [each == chosen for each in gold]


def test_a_diverged_model_is_never_right():
    losses = np.full((2, 1), np.nan)
    assert not decide("multiple_choice", losses, 0).any()
    assert not decide("schema", losses, 1).any()


@pytest.mark.parametrize("content", ["[1]\n", "half a line", '{"bundle": 1}\n{"loss": 2}\n'])
def test_a_file_that_is_no_state_file_is_left_alone(tmp_path, content):
    folder, state = write_bundle(tmp_path / "b"), tmp_path / "metrics.jsonl"
    state.write_text(content)
    with pytest.raises(ResumeError, match="not an evaluation's state file"):
        run(folder, state_file=state)
    assert state.read_text() == content


def test_a_scorer_of_the_wrong_shape_is_named(tmp_path):
    bundle = core.load_bundle(write_bundle(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"mean losses have shape \(12,\).* \(12, 1\)"):
        core.evaluate_tasks(
            bundle, encode, 256, lambda r: (np.zeros(len(r)),) * 2, loop_counts=(1,), max_len=64
        )


def test_finished_tasks_are_remembered(tmp_path):
    folder, state = write_bundle(tmp_path / "b"), tmp_path / "state.jsonl"
    seen = []
    first = run(folder, state_file=state, on_progress=lambda name, *_: seen.append(name))
    lines = state.read_bytes().split(b"\n")
    state.write_bytes(b"\n".join(lines[:2]) + b"\n" + lines[2][:9])  # killed in the second task
    seen.clear()
    again = run(folder, state_file=state, on_progress=lambda name, *_: seen.append(name))
    assert set(seen) == {"two"}
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours.correct, theirs.correct)
    with pytest.raises(ResumeError, match="max_len is 64 there and 32 here"):
        run(folder, state_file=state, max_len=32)
    with pytest.raises(ResumeError, match="identity|step is None there and 3 here"):
        run(folder, state_file=state, identity={"step": 3})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("eval_data/one.jsonl", '{"query": "q"}\n', "one.jsonl, line 1: no field 'choices'"),
        ("eval_data/one.jsonl", "\n{\n", "one.jsonl, line 2: not JSON"),
        (
            "eval_data/one.jsonl",
            '{"query": "q", "choices": ["a"], "gold": 1}\n',
            "one.jsonl, line 1: gold=1 is not an index of its 1 options",
        ),
        ("eval_data/two.jsonl", None, "two.jsonl: cannot be read"),
        ("core.yaml", "icl_tasks: 3", "no list of tasks"),
        ("core.yaml", "a: [", "not YAML"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\none,50\n", "no row for the task 'two'"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\none,x\n", "line 2: Random baseline='x'"),
    ],
)
def test_bad_bundles_are_named_with_their_line(tmp_path, file, content, message):
    folder = write_bundle(tmp_path / "b")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(BundleError, match=message.replace("[", r"\[")):
        core.load_bundle(folder)


def test_too_few_items_for_the_shots_are_named():
    with pytest.raises(BundleError, match="cannot give each one 3 shots .* use at least 4"):
        core.draw(task("language_modeling", words(8), shots=3), 3)
    assert core_bundle.DEFAULT_DELIMITER == " "


def test_core_is_the_unweighted_mean():
    results = [TaskResult("a", 0.0, np.ones((9, 1), bool)), TaskResult("b", 0.0, np.zeros((2, 1)))]
    assert core.core_mean(results).tolist() == [0.5]
