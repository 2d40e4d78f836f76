"""Compiled programs on disk: whose."""

from adadfq_jax.runtime import compile_cache


def test_cpus_of_another_kind_have_a_folder_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = compile_cache.default_folder()
    assert ours.is_relative_to(tmp_path)
    monkeypatch.setattr(compile_cache, "_processor", lambda: "flags: avx10")
    assert compile_cache.default_folder() != ours
