"""What the pages point at is there: files, programs, and settings by the names that they have."""

import importlib.util
import re
from pathlib import Path

import pytest

from looped_jax.config.settings import all_settings
from looped_jax.experiments.grid import Grid
from looped_jax.resolve import resolve

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(p for d in ("docs", "launch", "benchmarks", "examples")
                                      for p in (*(ROOT / d).glob("*.md"),
                                                *(ROOT / d).glob("*.ipynb")))])  # fmt: skip
EXAMPLE = "group."  # of a setting, in prose


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
    known = all_settings()
    groups = {key[:at] for key in known for at, letter in enumerate(key) if letter == "."}
    own = set(re.findall(r'\.register\("(\w+)"\)', text))  # what the page itself adds
    for name in re.findall(r"--config\.([a-z][\w.]*\w)", text):
        if own & set(name.split(".")):
            continue
        assert name.startswith(EXAMPLE) or name in known or name in groups, name
    for module in re.findall(r"python -m ((?:looped_jax|torch_ref|benchmarks)[\w.]*\w)", text):
        assert importlib.util.find_spec(module), module


def test_the_settings_and_the_grid_of_blagpts_page_are_taken(tmp_path):
    page = (ROOT / "docs/from_blagpt.md").read_text("utf-8")
    base, grid = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "blagpt.yaml").write_text(base)
    (tmp_path / "grid.yaml").write_text(grid.replace("blagpt.yaml", f"{tmp_path}/blagpt.yaml"))
    runs = Grid.read(tmp_path / "grid.yaml").runs(tmp_path)
    assert len({run.row.label for run in runs}) == 3 and len(runs) == 9
    config = resolve(runs[0].settings, vocab_size=50_257)
    assert (config.model.heads, config.model.kv_heads, config.train.steps) == (12, 4, 5_100)


def test_every_setting_in_the_tables_of_coming_from_exists():
    known = all_settings()
    found = 0
    for page in ROOT.glob("docs/from_*.md"):
        for name in re.findall(
            r"`((?:model|optim|data|train)\.[\w.]+)[=`]", page.read_text("utf-8")
        ):
            assert name in known, f"{page.name}: {name}"
            found += 1
    assert found > 20
