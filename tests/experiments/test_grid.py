"""Grids: what a file becomes, and what is wrong with it."""

import dataclasses

import pytest

from looped_jax.errors import ConfigError
from looped_jax.experiments.grid import Grid

TINY = {
    "config": "flt:tiny",
    "settings": {"model.layers": 1, "model.width": 32, "model.seq_len": 32},
    "rows": [
        {"settings": {"model.variant": ["FLT", "LT"], "model.loops": [2, 12]}},
        {"label": "one loop", "settings": {"model.loops": 1}, "equal": "flops"},
    ],
    "seeds": [3, 5],
}


def grid(**changed):
    return Grid.from_dict(TINY | changed)


def test_lists_are_every_combination_and_seeds_are_runs(tmp_path):
    found = grid()
    labels = ["FLT K=2", "FLT K=12", "LT K=2", "LT K=12", "one loop"]
    assert [row.label for row in found.rows] == labels and found.reference == "FLT K=2"
    runs = found.runs(tmp_path)
    assert [(run.row.label, run.seed) for run in runs] == [(at, s) for at in labels for s in (3, 5)]
    for run in runs:
        assert run.settings.train.seed == run.seed and run.settings.model.width == 32
        assert run.folder.parent == tmp_path
    assert len({run.folder for run in runs}) == len(runs)
    last = runs[-1].settings.model
    assert (last.variant, last.loops) == ("FLT", 1)


def test_labels_name_what_a_row_sets(tmp_path):
    rows = [
        {"settings": {"optim.matrix_learning_rate": [0.01, 0.02], "train.eval_loops": [[1, 4]]}}
    ]
    first, second = grid(rows=rows).rows
    assert first.label == "FLT K=4, optim.matrix_learning_rate=0.01, train.eval_loops=[1, 4]"
    assert second.settings["optim.matrix_learning_rate"] == 0.02
    assert grid(rows=rows).runs(tmp_path)[0].settings.train.eval_loops == (1, 4)


def test_equal_flops_are_those_of_the_reference(tmp_path, home):
    text = {"data.path": str(home / "text"), "data.tokenizer_vocab_size": 300}
    found = grid(reference="FLT K=12", settings=TINY["settings"] | text)
    steps = found.equal_flops(tmp_path)
    assert list(steps) == ["one loop"] and steps["one loop"] > 400
    runs = {run.row.label: run for run in found.runs(tmp_path, steps) if run.seed == 3}
    assert runs["one loop"].flops == pytest.approx(runs["FLT K=12"].flops, rel=1e-3)
    assert runs["FLT K=12"].config.train.steps == 400  # the preset's


def test_a_file_is_yaml_or_python(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "config: lt:tiny\nrows: [{settings: {model.loops: [1, 2]}}]\nseeds: [0]\n"
    )
    (tmp_path / "b.py").write_text(
        "def get_grid():\n    return {'config': 'lt:tiny', 'seeds': [0],\n"
        "            'rows': [{'settings': {'model.loops': [1, 2]}}]}\n"
    )
    yaml, python = (Grid.read(tmp_path / name) for name in ("a.yaml", "b.py"))
    assert python.imports == (str(tmp_path / "b.py"),)  # workers import it, too
    assert yaml == dataclasses.replace(python, imports=())
    assert [row.label for row in Grid.read(tmp_path / "a.yaml").rows] == ["LT K=1", "LT K=2"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        ({"seeds": 3}, "seeds=3"),
        ({"rows": []}, r"rows=\[\]"),
        ({"rows": [{"setings": {}}]}, "rows: setings is unknown; nearest: settings"),
        ({"rows": [{"settings": {"model.K": 1}}]}, "model.K is no setting; nearest: model.loops"),
        ({"rows": [{"settings": {}}, {"settings": {}}]}, "two rows are 'FLT K=4'"),
        ({"rows": [{"settings": {}, "equal": "money"}]}, "equal='money'; choose steps"),
        ({"rows": [{"label": "a", "settings": {"model.loops": [1, 2]}}]}, "leave out its label"),
        ({"rows": [{"label": "a b"}, {"label": "a_b"}]}, "another row's folder"),
        ({"rows": [{"settings": {"model.loops": 0}}]}, "FLT K=0: model.loops=0 is out of range"),
        ({"reference": "LT K=3"}, "reference='LT K=3' is no row; nearest: 'LT K=2'"),
        ({"sedes": [1]}, "sedes is unknown; nearest: seeds"),
        ({"settings": [1]}, r"settings=\[1\] are none by name"),
        ({"imports": "mine"}, "imports='mine' is no list"),
        ({"config": "fltt:tiny"}, "nearest: FLT|nearest: flt"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changed, named):
    with pytest.raises(ConfigError, match=named):
        grid(**changed).runs(tmp_path)


@pytest.mark.parametrize("text", ["config: [", "- 1", "config: flt:tiny"])
def test_files_that_are_no_grids(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        Grid.read(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="there is no grid"):
        Grid.read(tmp_path / "b.yaml")
