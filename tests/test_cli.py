"""The command line: what help shows, where settings come from, and one line for what is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from looped_jax import cli, errors, lr_find
from looped_jax.config import sources
from looped_jax.config.nearest import nearest
from looped_jax.config.registry import TASKS
from looped_jax.config.settings import RENAMED, Settings, all_settings
from looped_jax.evaluation.evaluator import Evaluator
from looped_jax.model.kv_cache import CACHE_TYPES
from looped_jax.resolve import resolve
from looped_jax.training.run_folder import write_config

ROOT = Path(__file__).parents[1]
TINY = ["train", "--config=flt:tiny"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "999")  # so that no line of help is broken
    monkeypatch.delenv("LOOPED_JAX_TRACEBACK", raising=False)


def refusal(capsys, *arguments):
    """Exit code and the one line that is said."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert "step compiled" not in said.out
    return stopped.value.code, said.err.removeprefix("error: ").strip()


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def settings(*arguments):
    return cli.parse("train", arguments).settings


# ---- what help shows -----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_programs_are_listed_with_a_line_each_and_the_exit_codes(capsys, arguments):
    cli.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    for name in cli.PROGRAMS:
        assert [line for line in lines if re.match(rf"  {name} +[A-Z].*\.$", line)], name
    assert "exit codes: 0 done; 1 " in lines[-1] and "; 2 " in lines[-1]
    assert "; 75 " in lines[-1]


@pytest.mark.parametrize("program", ["train", "plan", "lr-find"])
def test_help_lists_every_setting_with_type_default_choices_and_meaning(capsys, program):
    text = shown(capsys, program, "--help")
    for key, one in all_settings().items():
        numbers = str(one.kind) in ("tuple[int, ...]", "tuple[float, ...]")
        default = ",".join(map(str, one.default)) or None if numbers else one.default
        told = "" if default is None else f" [{default}]"
        assert re.search(rf"--config\.{re.escape(key)} \[?[A-Z,]+\]? .*?{re.escape(told)}", text)
        assert one.meaning in text
    assert "the loop rule; FLT, FLT_res, LT_ia, LT_i, LT, diagonal, gate or linear [FLT]" in text
    assert "--config.model.loops INT K, times the blocks are run [12]" in text


def test_every_setting_says_what_it_means():
    silent = {key for key, one in all_settings().items() if not one.meaning}
    assert not silent


def test_a_setting_given_by_its_new_name_wins_over_a_file_that_has_the_old_one(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("train: {inside_every: 10}")
    found = cli.parse("train", ["--config", str(path), "--config.train.diagnostics_every=5"])
    assert found.settings.train.diagnostics_every == 5
    alone = cli.parse("train", ["--config", f"{path}:tiny"])
    assert alone.settings.train.diagnostics_every == 10


def test_help_shows_the_values_of_a_config(capsys):
    assert "K, times the blocks are run [4]" in shown(capsys, *TINY, "--help")


def test_examples_in_help_stand_on_lines_of_their_own(capsys):
    for name in cli.PROGRAMS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert re.search(rf"^ *looped-jax {name} ", capsys.readouterr().out, re.MULTILINE), name


def test_flags_name_what_there_is():
    for cache in CACHE_TYPES:
        assert cli.parse("generate", ["--checkpoint=x", f"--cache={cache}"]).cache == cache
    for task in TASKS.values():
        assert all(callable(getattr(Evaluator, mode)) for mode in task.modes)


# ---- where settings come from --------------------------------------------------------------------


def test_a_preset_needs_no_file():
    from configs import flt, lt_ia

    assert settings("--config", "flt:tiny") == Settings.from_dict(flt.get_config("tiny"))
    assert settings("--config=LT_ia") == Settings.from_dict(lt_ia.get_config())
    assert settings("--config", "configs/flt.py:tiny") == settings("--config=flt:tiny")


def test_yaml_stands_on_the_defaults_or_on_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {variant: LT, loops: 3, parts: {kv_shift: {on: true}}}\n"  # YAML reads `on` as true
        "train.eval_loops: [1, 3]\noptim:\n  eps: 1e-7\n"
    )
    alone, tiny = settings(f"--config={file}"), settings(f"--config={file}:tiny")
    for found in (alone, tiny):
        assert (found.model.variant, found.model.loops) == ("LT", 3)
        assert found.train.eval_loops == (1, 3) and found.optim.eps == 1e-7
        assert found.model.parts.on() == ("kv_shift",)
    assert (alone.model.seq_len, tiny.model.seq_len) == (1024, 128)


@pytest.mark.parametrize("name", ["run", "run/config.json"])
def test_a_run_gives_its_settings_but_not_its_folder(tmp_path, name):
    first = settings(*TINY[1:], "--config.model.loops=3", f"--config.train.run_dir={tmp_path}/run")
    write_config(tmp_path / "run", resolve(first, vocab_size=4096))
    again = settings(f"--config={tmp_path / name}")
    assert again.model.loops == 3 and again.model.vocab_size == 4096
    assert again.train.run_dir is None
    given = settings(f"--config={tmp_path / name}", "--config.train.run_dir=runs/mine")
    assert given.train.run_dir == "runs/mine"


def test_what_a_file_registers_is_a_flag(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n"
        "from looped_jax.config import presets\n"
        "from looped_jax.config.registry import LOOP_RULES\n"
        "from looped_jax.config.options import setting\n"
        "from looped_jax.model.loop_rules import LoopRule\n"
        "@dataclass(frozen=True)\n"
        "class OwnSettings:\n"
        "    share: float = setting(0.5, 'of the state')\n"
        "@LOOP_RULES.register('own')\n"
        "class Own(LoopRule):\n"
        "    '''A rule of one file.'''\n"
        "    Settings = OwnSettings\n"
        "def get_config(preset=None):\n"
        "    return presets.make('own', preset)\n"
    )
    from looped_jax.config.registry import LOOP_RULES

    try:
        file = f"--config={tmp_path / 'own.py'}:tiny"
        found = settings(file, "--config.model.rules.own.share=0.25")
        assert found.model.variant == "own" and found.model.rules["own"].share == 0.25
        text = shown(capsys, "train", file, "--help")
        assert "A rule of one file. --config.model.rules.own.share FLOAT of the state [0.5]" in text
    finally:
        del LOOP_RULES._found["own"]


def test_values_in_every_form():
    found = settings(
        "--config", "flt:tiny", "--config.model.loops", "3", "--config.mesh.data", "-1",
        "--config.train.eval_loops=1,3", "--config.model.parts.kv_shift.on",
        "--config.train.init_optimizer=False", "--config.model.width=None",
        "--config.train.sample_prompts=def (x, y):",
    )  # fmt: skip
    assert found.model.loops == 3 and found.mesh.data == -1 and found.train.eval_loops == (1, 3)
    assert found.model.parts.on() == ("kv_shift",) and found.train.init_optimizer is False
    assert found.model.width is None and found.train.sample_prompts == ("def (x, y):",)
    several = settings("--config=flt:tiny", "--config.train.sample_prompts=('a', 'b')")
    assert several.train.sample_prompts == ("a", "b")
    assert settings("--config=flt:tiny", "--config.train.eval_loops=2").train.eval_loops == (2,)


# ---- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian is no program; nearest: train"),
        (["train"], "--config is missing; give one, as --config flt:tiny"),
        (["train", "--config=configs/missing.py"], "there is no file configs/missing.py"),
        (["train", "--config=configs/flt.py:huge"], "preset 'huge' is unknown; choose paper, tiny"),
        (["train", "--config=flt:huge"], "preset 'huge' is unknown; choose paper, tiny, "),
        (["train", "--config=fltt:tiny"], "fltt is no run, file, loop rule or family of models"),
        (["train", "--config=tests"], "tests is no run folder, config.json is missing"),
        (["train", "--config=tests:tiny"], "a run has no presets; leave :tiny out"),
        (["train", "--config=README.md"], "give a .py, .yaml or .json file, or as flt:tiny"),
        ([*TINY, "--steps=5"], "--steps is no flag; nearest: --config.train.steps"),
        ([*TINY, "--learning_rate", "5"], "nearest: --config.optim.matrix_learning_rate, "),
        ([*TINY, "--config.train.learning_rate=1"], "nearest: optim.matrix_learning_rate, "),
        ([*TINY, "--config.optim.lr=1"], "optim.lr is no setting; nearest: optim.matrix_learning"),
        ([*TINY, "--config.model.K=1"], "model.K is no setting; nearest: model.loops"),
        ([*TINY, "--config.model.lops=2"], "model.lops is no setting; nearest: model.loops"),
        ([*TINY, "--config.modl.loops=2"], "modl.loops is no setting; nearest: model.loops"),
        ([*TINY, "--config.loops=2"], "loops is no setting; nearest: model.loops"),
        ([*TINY, "--config.model.loop=2"], "model.loop is no setting; nearest: model.loops"),
        ([*TINY, "--config.model.loops=two"], "model.loops='two' is not of type int"),
        ([*TINY, "--config.model.loops", "two"], "model.loops='two' is not of type int"),
        ([*TINY, "--config.model.loops=0"], "model.loops=0 is out of range; give 1 or more"),
        ([*TINY, "--config.train.eval_loops=1,x"], "train.eval_loops='1,x' is not of type tuple"),
        ([*TINY, "--config.train.eval_loops=0"], "must be whole numbers from 1; as 1,3,6"),
        ([*TINY, "--config.model.variant=flt"], "model.variant='flt' is unknown; choose FLT"),
        ([*TINY, "--config.model.parts.kvshift.on"], "nearest: model.parts.kv_shift.on"),
        ([*TINY, "--import=absent"], "--import=absent: No module named 'absent'"),
        (["compare", "x", "--out=y", "--import=absent"], "--import=absent: No module named"),
        ([*TINY, "--x"], "--x is no flag; nearest: --help"),
        (["generate"], "--checkpoint is missing"),
        (["generate", "--chekpoint=x"], "--chekpoint is no flag; nearest: --checkpoint"),
        (["generate", "--checkpoint=x", "--loops=0"], "--loops: 0 is no whole number from 1"),
        (["generate", "--checkpoint=x", "--loops", "-1"], "--loops: -1 is no whole number from 1"),
        (["generate", "--checkpoint=x", "--tokens", "-5"], "--tokens: -5 is no whole number"),
        (["generate", "--checkpoint=x", "--samples=0"], "--samples: 0 is no whole number from 1"),
        (["evaluate", "--checkpoint=x", "--loops=0"], "--loops: 0 are no whole numbers from 1"),
        (["evaluate", "--checkpoint=x", "--batch_size=0"], "--batch_size: 0 is no whole number"),
        (["evaluate", "--checkpoint=x", "--modes=bpb,cor"], "'cor': choose from bpb, sample, core"),
        (["lr-find", "--config=flt:tiny", "--loops=1,a"], "--loops: 1,a are no whole numbers"),
        (["lr_find", "--config=flt:tiny", "--low=5", "--high=4"], "give 0 < low < high"),
        (["lr-find", "--config=flt:tiny", "--steps=5"], "--steps: 5 is no whole number from 16"),
        (["plan", "--config=flt:tiny"], "--hardware is missing; name it: h100, "),
        (["plan", "--config=flt:tiny", "--hardware=h100", "--efficiency=2"], "=2.0 is no share"),
        ([*TINY, "--config.train.run_dir=gs://b/run"], "train.run_dir=gs://b/run is an address"),
        ([*TINY, "--config.data.path=s3://b/text"], "data.path=s3://b/text is an address"),
        (["train", "gs://b/notes.txt"], "data.path=gs://b/notes.txt is an address"),
        (["evaluate", "--checkpoint=gs://b/run"], "--checkpoint: gs://b/run is an address; files"),
        (["diagnose", "--checkpoint=x", "--out=gs://b/page"], "--out: gs://b/page is an address"),
        (["compare", "gs://b/run", "--out=x"], "RUN: gs://b/run is an address"),
        (["download"], "nothing to download; give a name, fineweb-edu, shakespeare"),
        (["download", "--shards=3", "--start_after=2"], "a command after -- belong together"),
        (["download", "--shards=3", "--endpoint=hub"], "--endpoint='hub' is no URL"),
        (["convert", "from-reference", "--stepp=3"], "--stepp is no flag; nearest: --step"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_answered_with_its_mend(capsys, arguments, message):
    code, said = refusal(capsys, *arguments)
    assert message in said and code == 2


@pytest.mark.parametrize("old", RENAMED)
def test_a_setting_that_was_renamed_is_answered_with_its_new_name(capsys, old):
    code, said = refusal(capsys, *TINY, f"--config.{old}=1")
    assert code == 2 and said == f"{old} is now {RENAMED[old]}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "--config.model.heads=3"], "model.heads=3 does not cut model.width=128"),
        ([*TINY, "--config.mesh.data=3"], "does not fill"),
        ([*TINY, "--config.data.path=nowhere"], "nowhere"),
        (["compare", "x", "--out=/proc/x"], "--out: /proc/x cannot be written"),
        (["generate", "--checkpoint=nowhere"], "nowhere is no run folder"),
    ],
)
def test_what_a_program_finds_is_one_line_too(capsys, tmp_path, arguments, message):
    more = [f"--config.train.run_dir={tmp_path}"] if "train" in arguments else []
    code, said = refusal(capsys, *arguments, *more)
    assert message in said and code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1", "cannot be read"),
        ("- model", "holds no settings by group"),
        ("model: 3", "model=3 is no group of settings"),
        ("model: {lops: 3}", "model.lops is no setting; nearest: model.loops"),
        ("model: {loops: three}", "model.loops='three' is not of type int"),
    ],
)
def test_a_wrong_yaml_is_answered_with_its_mend(capsys, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    code, said = refusal(capsys, "train", f"--config={tmp_path / 'mine.yaml'}")
    assert message in said and code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import absent", "wrong.py, line 1: ModuleNotFoundError: No module named 'absent'"),
        ("def get_config():\n    return\n 3", "wrong.py, line 3: IndentationError: unindent"),
        ("def get_config():\n    import json\n    return json.loads('')", "wrong.py, line 3: JSON"),
        ("x = 3", "wrong.py: AttributeError: module 'config_wrong' has no attribute 'get_config'"),
        ("def get_config(): return 3", "has no attribute 'to_dict'"),
    ],
)
def test_a_wrong_python_file_is_named_with_what_it_raised(capsys, tmp_path, text, message):
    (tmp_path / "wrong.py").write_text(text)
    code, said = refusal(capsys, "train", f"--config={tmp_path / 'wrong.py'}")
    assert message in said and str(tmp_path) in said and code == 2


def test_without_torch_convert_says_what_to_install(capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    code, said = refusal(capsys, "convert", "tokenizer", "a", "b")
    assert code == 1 and said == "convert needs PyTorch; pip install 'looped_jax[torch]'"


def test_a_wrong_flag_is_answered_before_anything_large_is_imported():
    program = (
        "import sys\nfrom looped_jax import cli\n"
        "for argv in (['train', '--config=flt:tiny', '--config.model.lops=2'], ['train', '--x'],"
        " ['generate', '--checkpoint=x', '--loops=0'], ['train', '--config=flt:huge']):\n"
        "    try:\n        cli.main(argv)\n"
        "    except SystemExit as stopped:\n        assert stopped.code == 2\n"
        "large = {'jax', 'flax', 'torch', 'matplotlib', 'tensorboardX', 'grain', 'pyarrow'}\n"
        "print(sorted(large & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n" and done.stderr.count("\n") == 4, done.stderr


def test_what_draws_and_logs_is_imported_when_something_is_drawn_or_logged():
    program = (
        "import sys\nimport looped_jax, looped_jax.train\n"
        "assert looped_jax.TrainedModel and 'jax' in sys.modules\n"
        "print(sorted({'matplotlib', 'tensorboardX', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ---- from arguments to a program -----------------------------------------------------------------


def test_a_program_is_run_with_its_flags_by_either_name(monkeypatch):
    seen = []
    monkeypatch.setattr(lr_find, "run", seen.append)
    cli.main(["lr-find", "--config=flt:tiny", "--loops=4,1", "--out", "x"])
    lr_find.main(["--config", "flt:tiny", "--loops", "1,4", "--out=x"])
    one, other = seen
    assert vars(one) == vars(other)
    assert one.loops == (1, 4) and one.out == Path("x") and one.settings.model.loops == 4


@pytest.mark.parametrize(
    ("folder", "python", "script"),
    [
        ("bin", "python3", "looped-jax"),  # on PATH
        (".venv/bin", ".venv/bin/python3", ".venv/bin/looped-jax"),
        ("../elsewhere", "{}/elsewhere/python3", "{}/elsewhere/looped-jax"),
    ],
)
def test_commands_to_copy_start_as_this_process_did(tmp_path, monkeypatch, folder, python, script):
    here = tmp_path / "here"
    started = Path(os.path.abspath(here / folder))
    for one in (here, started):
        one.mkdir(parents=True, exist_ok=True)
    for program in ("python3", "looped-jax"):
        (started / program).touch(mode=0o755)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", str(here / "bin"))
    monkeypatch.setattr(sys, "executable", str(started / "python3"))
    monkeypatch.setattr(sys, "argv", [str(started / "looped-jax"), "train", "--config=flt"])
    script, python = script.format(tmp_path), python.format(tmp_path)
    assert cli.command() == [script, "train", "--config=flt"]
    assert cli.command_of("lr-find", "--steps=20") == [script, "lr-find", "--steps=20"]
    monkeypatch.setattr(sys, "argv", ["/lib/looped_jax/train.py", "--config=flt"])
    assert cli.command() == [python, "-m", "looped_jax.train", "--config=flt"]
    assert cli.command_of("lr-find") == [python, "-m", "looped_jax.lr_find"]


def test_what_follows_two_dashes_is_a_command():
    args = cli.parse("download", ["--shards=9", "--start_after=2", "--", "python", "x.py", "--y"])
    assert args.command == ["python", "x.py", "--y"] and args.start_after == 2


def test_the_nearest_are_of_the_same_group_first():
    known = {"a.steps": "", "b.steps": "", "b.matrix_rate": "", "a.max_reward": "S, of a game"}
    assert nearest("b.steps_", known) == ["b.steps"]
    assert nearest("b.mr", known) == ["b.matrix_rate", "a.max_reward"]
    assert nearest("b.s", known) == ["a.max_reward"]
    assert nearest("b.reward", known) == ["a.max_reward"]
    assert nearest("zzz", known) == []


def test_settings_are_put_where_their_name_says():
    values = {}
    sources.put(values, "model.parts.one.on", True)
    sources.put(values, "model.loops", 3)
    assert json.dumps(values) == '{"model": {"parts": {"one": {"on": true}}, "loops": 3}}'


def test_train_takes_a_text_by_itself(tmp_path):
    found = cli.parse("train", ["notes.txt"]).settings
    assert (found.data.path, found.model.layers, found.data.task) == ("notes.txt", 2, "text")
    other = cli.parse("train", ["notes.txt", "--config", "lt", "--config.model.loops=3"]).settings
    assert (other.data.path, other.model.variant, other.model.loops) == ("notes.txt", "LT", 3)


def test_train_takes_one_text_only(capsys):
    code, said = refusal(capsys, "train", "notes.txt", "--config.data.path=other.txt")
    assert code == 2 and "notes.txt and --config.data.path=other.txt" in said


def test_what_went_wrong_besides_is_said_too(capsys):
    error = errors.DataError("no rows")
    error.add_note("and the checkpoint of step 5 could not be written")
    with pytest.raises(SystemExit), errors.printed():
        raise error
    told = "error: no rows; and the checkpoint of step 5 could not be written\n"
    assert capsys.readouterr().err == told
