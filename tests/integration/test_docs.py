"""The documents: the site is built, its links lead somewhere, its blocks run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adadfq_jax import settings
from adadfq_jax.jobs import ablate
from tests import compiling, documents, runs
from tests.documents import ROOT

MOST_MARKED = 10
# What a page loads by itself.
LOADED = re.compile(
    r'<(?:script|img|iframe|link rel="stylesheet")[^>]*?(?:src|href)="(.*?)"'
)
PAGES = documents.pages()
WITH_BLOCKS = [
    page
    for page in PAGES
    if any(b.language in documents.RUN and not b.reason for b in documents.blocks(page))
]


def environment(**others):
    """One device, programs compiled quickly, and the command `adadfq` in the path."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.flags(devices=1),
        "MPLBACKEND": "agg",
        **others,
    }


def call(command, folder, seconds, **others):
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment(**others),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # Nothing may be fetched: there is nobody at that address.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    call(
        [*command, "--site-dir", folder], ROOT, 120, **nowhere, NO_MKDOCS_2_WARNING="1"
    )
    return folder


@pytest.fixture(scope="module")
def desk(reported, tmp_path_factory):
    """A folder with what a reader has: configurations, a checkpoint, two runs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "configs").symlink_to(ROOT / "configs")
    checkpoint = ROOT / "tests/golden/resnet20_cifar10_zip.pth"
    shutil.copy(checkpoint, folder / "resnet20_cifar10.pth")
    for seed, name in enumerate(("w4a4", "w4a4-seed1")):
        run = folder / "runs" / name
        shutil.copytree(reported, run)
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "seed": seed}))
    return folder


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    made = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    written = {
        path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")
    }
    assert written <= made
    for path in site.rglob("*.html"):
        loaded = LOADED.findall(path.read_text())
        assert not [target for target in loaded if "//" in target], path


def test_the_site_has_every_configuration_key(site):
    page = (site / "reference/configuration.html").read_text()
    assert [key for key in settings.ROWS if f"<code>{key}</code>" not in page] == []


def test_formulas_and_the_notebook_are_in_the_site(site):
    assert "<math" in (site / "method/game.html").read_text()
    assert "$$" not in (site / "method/reconstruction.html").read_text()
    notebook = (site / "notebooks/quantize.html").read_text()
    assert "load_quantized" in notebook or "quantize" in notebook
    assert (site / "guides/pods.html").read_text().count("launch/tpu.sh") > 5


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page):
    folder = (ROOT / page).parent
    missing = [to for to in documents.links(page) if not (folder / to).exists()]
    assert missing == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_few_blocks_are_not_run_and_each_has_its_reason():
    marked = [b for page in PAGES for b in documents.blocks(page) if b.reason]
    assert len(marked) <= MOST_MARKED


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_name_configurations_scripts_and_keys_that_there_are(page):
    """Of all commands, those that are not run too."""
    shells = ("bash", "console", "text")
    for block in documents.blocks(page):
        if block.language in shells:
            for words in documents.commands(block.text):
                check_words(words)


def check_words(words):
    for flag, value in re.findall(r"^--?([\w.]+)=(.*)$", "\n".join(words), re.M):
        if flag == "config":
            name = value.partition(":")[0]
            files = ROOT / name, ROOT / "configs" / f"{name}.py"
            if name in ("...", "mine.py"):  # a reader's own
                continue
            assert "/" in name or files[1].is_file(), words
            assert any(file.is_file() for file in files), words
        elif flag.startswith("config."):
            assert flag.removeprefix("config.") in settings.ROWS, words
        elif flag == "arm" and "ablate" in " ".join(words[:3]):
            ablate.parse_arm(value)
    for word in words:
        if re.fullmatch(r"(\./)?(launch|tests|\.ci)/[\w/.]+", word):
            assert (ROOT / word).exists(), word


def test_requirements_of_the_site_are_among_those_of_the_tests():
    lines = [
        {line for line in (ROOT / name).read_text().splitlines() if "==" in line}
        for name in ("docs/requirements.txt", "tests/requirements.txt")
    ]
    assert lines[0] <= lines[1]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=str)
def test_the_blocks_of_a_page_run(page, desk, monkeypatch):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, value in environment(PATH=path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(desk)
    # In this process, but for the commands: importing takes seconds.
    with runs.first_devices():
        documents.run(page)


def test_the_notebook_runs(tmp_path):
    notebook = json.loads((ROOT / "docs/notebooks/quantize.ipynb").read_text())
    cells = [
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"
    ]
    (tmp_path / "notebook.py").write_text("\n\n".join(cells))
    shortened = {"ADADFQ_NOTEBOOK_STEPS": "2", "TMPDIR": str(tmp_path)}
    said = call([sys.executable, "notebook.py"], tmp_path, 300, **shortened)
    assert "ONNX Runtime: " in said
    size = len((ROOT / "docs/notebooks/quantize.ipynb").read_bytes())
    assert size < 200_000, "outputs in the repository are small"
