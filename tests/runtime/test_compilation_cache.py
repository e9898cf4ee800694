"""Compiled programs on disk: bounded, and apart for each kind of processor."""

import os

from looped_jax.runtime import compilation_cache


def test_what_was_not_used_for_longest_goes_when_there_is_too_much(tmp_path):
    for age, name in enumerate(("x/new", "used", "y/old", "oldest")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - 60 * age, 1e9 - 60 * age))
    os.utime(tmp_path / "used", (2e9, 0))  # read today, written long ago
    compilation_cache.drop_oldest(tmp_path, 400)
    assert (tmp_path / "oldest").is_file()
    compilation_cache.drop_oldest(tmp_path, 250)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"new", "used"}
    compilation_cache.drop_oldest(tmp_path / "none", 0)


def test_processors_with_other_instructions_share_no_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_PROCESSOR", tmp_path / "cpuinfo")

    def name_of(text):
        (tmp_path / "cpuinfo").write_text(text)
        return compilation_cache.processor()

    one = name_of("model name : A\ncpu MHz : 2100\nflags : sse2 avx2\n")
    assert one == name_of("model name : A\ncpu MHz : 900\nflags : sse2 avx2\n")
    assert one != name_of("model name : A\ncpu MHz : 900\nflags : sse2 avx2 avx512f\n")
    assert one != name_of("CPU implementer : 0x41\nFeatures : fp asimd\n")
    (tmp_path / "cpuinfo").unlink()
    assert compilation_cache.processor()
