"""The guides name files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("cluster/*.md")])
NAME = re.compile(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+)\.([A-Za-z_]+)(?:\.([a-z_]+))?`")


def defined(path):
    """The functions and classes of a module, and `Class.method`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))


def test_every_function_on_the_path_of_a_tile_exists():
    names = NAME.findall((ROOT / "docs/architecture.md").read_text())
    assert len(names) > 30
    for module, *parts in names:
        if parts[0] not in {"json", "parquet", "py"}:  # names of files
            name = ".".join(filter(None, parts))
            assert name in set(defined(ROOT / "rayseg" / f"{module}.py")), f"{module}.{name}"


def test_the_first_line_of_every_configuration_is_a_sentence_for_config_list():
    for file in ROOT.glob("configs/*/*.yaml"):
        if file.parent.name == "classes":
            continue
        first = file.read_text().partition("\n")[0]
        assert first.startswith("# "), file
        assert first.endswith("."), file
        assert len(first) <= 110, file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    named = set(
        re.findall(r"\b(?:docs|rayseg|configs|cluster|tests|benchmarks|jobs)/[\w/.-]+\.(?:md|py|yaml|svg|png)\b", text)
    )
    named |= {f"docs/{name}" for name in re.findall(r"\bdocs/(decisions/\d{4})\b", text)}
    for name in named:
        found = list(ROOT.glob(f"{name}*")) if re.fullmatch(r"docs/decisions/\d{4}", name) else [ROOT / name]
        assert found, name
        assert found[0].exists(), name
