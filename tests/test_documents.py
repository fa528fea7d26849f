"""The documents: Python snippets run, every command exists with its flags, and every local link has a target."""

import functools
import pathlib
import re
import shlex
from typing import Any

import document_config
import forked
import pytest

from mnist_flax.cli import VERBS
from mnist_flax.config import default_config_dict
from mnist_flax.models import MODELS

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/**/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = r"```{}\n(.*?)```"


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """The code blocks of a language in a page."""
    return re.findall(BLOCK.format(language), page.read_text(), re.DOTALL)


def commands(page: pathlib.Path) -> list[list[str]]:
    """The commands of this project in a page's shell blocks, as words, without comments and redirections."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # such as XLA_FLAGS=...
                words.pop(0)
            if words[:2] == ["python", "-m"] and words[2].startswith("mnist_flax."):
                found.append([words[2].removeprefix("mnist_flax."), *words[3:]])
            elif words[:1] == ["mnist-flax"] or re.match(r"python scripts/", " ".join(words)):
                found.append(words[1:])
            elif words[:1] == ["scripts/train"]:
                found.append(["main", *words[1:]])
    return found


@functools.cache
def help_of(program: str) -> str:
    """The full help of a verb or a script."""
    script = [program] if program.startswith("scripts/") else ["-m", f"mnist_flax.{program}"]
    done = forked.run(*script, "--helpfull")
    return done.stdout + done.stderr


VERB_COMMANDS = sorted({(command[0], *command[1:]) for page in PAGES for command in map(tuple, commands(page))})


@pytest.mark.parametrize("command", VERB_COMMANDS, ids=" ".join)
def test_command_of_a_document_exists_with_its_flags(command: tuple[str, ...]) -> None:
    program, flags = command[0], [word for word in command[1:] if word.startswith("--")]
    text = help_of(program)
    for flag in flags:
        name = re.split(r"[=.]", flag.removeprefix("--"))[0]
        assert f"--{name}" in text or f"--[no]{name}" in text, f"{program} has no --{name}"
    for preset in re.findall(r"--config=(configs/\w+\.py)", " ".join(command)):
        assert (ROOT / preset).is_file()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_of_a_document_runs(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for i, block in enumerate(blocks(page, "python")):
        if "workdir" in block or "runs/" in block:
            continue  # needs a trained run: executed below, and in test_export.py
        first = re.match(r"# (\w+\.py)\n", block)
        name = first[1] if first else f"snippet_{i}.py"
        (tmp_path / name).write_text(block.replace("cli.main()", "pass"))
    for path in sorted(tmp_path.glob("*.py")):
        if path.stem == "my_preset":  # it uses a model that my_net.py registers
            path.write_text(f"import my_net\n{path.read_text()}\nget_config()\n")
        done = forked.run(str(path), cwd=tmp_path)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


def test_network_of_the_readme_trains(tmp_path: pathlib.Path) -> None:
    for block in blocks(ROOT / "README.md", "python"):
        if first := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / first[1]).write_text(block)
    shrunk = ["--config.data.name=digits", "--config.train.epochs=1", "--config.train.report=false"]
    done = forked.run("my_net.py", "main", "--config=my_preset.py", *shrunk, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "my_preset" / "summary.json").is_file()


def test_snippet_of_the_runs_page_trains_and_loads_a_network(tmp_path: pathlib.Path) -> None:
    snippet, _ = blocks(ROOT / "docs" / "runs.md", "python")
    space: dict[str, Any] = {}
    for old, new in (
        ("runs/seed-1", str(tmp_path / "run")),
        ('"default"', '"digits"'),
        ("seed=1", "seed=1, train__epochs=1, train__report=False, train__demo=False"),
    ):
        assert old in snippet
        snippet = snippet.replace(old, new)
    exec(snippet, space)
    assert int(space["state"].step) == space["config"].num_steps
    assert space["logits"].shape == (3, 10)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_local_links_of_a_document_have_a_target(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        if not target.startswith("http"):
            file = page.parent / name if name else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that a Markdown page gets from its headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_a_document_names_exist(page: pathlib.Path) -> None:
    for name in re.findall(r"`((?:tests|scripts|configs|docs|mnist_flax)/[\w./]+)`", page.read_text()):
        assert (ROOT / name).exists(), name
    assert "@@" not in page.read_text(), "a figure is missing"


def test_config_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == document_config.page(), "run scripts/document_config.py"


@pytest.mark.parametrize("family", MODELS)
def test_config_page_has_every_field(family: str) -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    others = [other for other in MODELS if other != family and not issubclass(MODELS[family], MODELS[other])]
    for other in others:  # a field must not be found only in the table of another family
        page = re.sub(rf"### {other}\n.*?(?=\n##|\Z)", "", page, flags=re.DOTALL)
    for section, fields in default_config_dict(family).to_dict().items():
        for name in fields if isinstance(fields, dict) else [""]:
            assert f"`{section}.{name}`".replace(".`", "`") in page


def test_readme_has_a_command_for_every_verb() -> None:
    assert {command[0] for command in commands(ROOT / "README.md")} >= set(VERBS)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 1_000


def test_readme_and_contributing_say_how_the_tests_run() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "scripts/test" in (ROOT / page).read_text()
