"""The documentation: its code blocks run, its links lead somewhere, the files that it names exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documentation
import pytest
import zerotuning as zt
from documentation import ROOT, Block, BrokenBlock, Session, blocks, run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
#: A path of the repository in backticks, braces and stars as in a shell.
NAMED_PATH = re.compile(r"`((?:csrc|docs|notebooks|python|tests)/[^`\s]*)`")


def needs_model(page: Path) -> bool:
    return any("load_model(" in block.text for block in blocks(page) if block.language == "python")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def page_parameters() -> list[Any]:
    found = []
    for page in PAGES:
        if any(blocks(page)):
            marks = [pytest.mark.model] if needs_model(page) else []
            found.append(pytest.param(page, id=name_of(page), marks=marks))
    return found


def smaller(function: Any, **most: int) -> Any:
    """Limit numbers of steps, examples and so on: pages show realistic numbers, tests run with small ones."""

    def call(*args: Any, **kwargs: Any) -> Any:
        limits = {**most, "steps": 20} if kwargs.get("method") == "cma-es" else most  # at least CMA-ES's population
        kwargs.update({name: min(kwargs[name], limit) for name, limit in limits.items() if name in kwargs})
        return function(*args, **kwargs)

    return call


@pytest.fixture
def session(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Any,
    tiny_tokenizer: Any,
) -> Iterator[Session]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zt, "calibrate", smaller(zt.calibrate, examples=16, steps=2, batch_size=8))
    monkeypatch.setattr(zt, "evaluate", smaller(zt.evaluate, limit=8))
    names: dict[str, Any] = {"__name__": "__main__"}
    page = request.node.callspec.params.get("page") if hasattr(request.node, "callspec") else None
    if page is not None and needs_model(page):
        loaded = request.getfixturevalue("demo_model")
        monkeypatch.setattr(zt, "load_model", lambda name, **_: loaded)
        yield Session(tmp_path, names)
        zt.unpatch(loaded[0])
    else:
        yield Session(tmp_path, names | {"model": tiny_model, "tokenizer": tiny_tokenizer})


@pytest.mark.parametrize("page", page_parameters())
def test_every_code_block_of_a_page_works(page: Path, session: Session) -> None:
    for block in blocks(page):
        run(block, session)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_named_paths_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    broken = []
    for match in LINK.finditer(text):
        target = match["target"].partition("#")[0]
        if target and "://" not in target and not (page.parent / target).exists():
            broken.append(match["target"])
    for match in NAMED_PATH.finditer(text):
        if "NAME" not in match[1] and not any(ROOT.glob(match[1].rstrip("/"))):
            broken.append(match[1])
    assert not broken, f"{name_of(page)} names what does not exist: {broken}"


def test_sources_cite_sections_that_exist() -> None:
    headings = {
        f"docs/{page.name}": set(re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE))
        for page in (ROOT / "docs").glob("*.md")
    }
    broken = []
    for folder in ("csrc", "python/zerotuning", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}:
                continue
            text = re.sub(r"\s*\n\s*(?://|#)?\s*", " ", path.read_text("utf-8"))
            for cited in re.finditer(r'(docs/[\w-]+\.md)((?:,| and) "[^"\n]+")*', text):
                titles = re.findall(r'"([^"]+)"', cited[0])
                if cited[1] not in headings or not headings[cited[1]].issuperset(titles):
                    broken.append(f"{path.relative_to(ROOT)}: {cited[0]}")
    assert not broken, "\n".join(broken)


def test_readme_has_at_most_150_lines() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150


def test_readme_has_the_two_commands() -> None:
    commands = [block.text for block in blocks(ROOT / "README.md") if block.language == "bash"]
    lines = [line.partition("#")[0].strip() for text in commands for line in text.splitlines()]
    assert 'pip install ".[demo]" && zerotuning demo' in lines
    assert "bash tests/run" in lines


# The checks themselves: a broken block fails.


def block(language: str, text: str, not_run: str | None = None) -> Block:
    return Block(Path("page.md"), 7, language, text, not_run)


@pytest.mark.parametrize(
    ("language", "text", "complaint"),
    [
        ("python", "import zerotuning as zt\nzt.no_such_name", "no_such_name"),
        ("python", "x = (", "SyntaxError"),
        ("bash", "zerotuning inspect scales --no-such-option", "no-such-option"),
        ("bash", "zerotuning evaluate --model demo", "--task"),
        ("bash", "torchrun --nproc-per-node 2 -m zerotuning evaluate --model demo", "--task"),
        ("bash", "make", "no test for the command make"),
        ("bash", 'pip install ".[no-such-extra]"', "no-such-extra"),
        ("bash", "bash tests/no_such_file", "no_such_file"),
        ("yaml", "name: films\nprompt: no field\nlabels: [a, b]", "field"),
        ("yaml", "name: [", "not YAML"),
        ("jsonl", '{"text": "a"', "page.md:7"),
        ("json", "{", "JSONDecodeError"),
        ("rust", "fn main() {}", "no test for the language 'rust'"),
        ("", "no language", "no test for the language ''"),
    ],
)
def test_a_broken_block_fails_with_page_and_line(language: str, text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenBlock, match=re.escape(complaint)) as caught:
        run(block(language, text), Session(tmp_path))
    assert str(caught.value).startswith("page.md:7: ")


def test_json_lines_must_fit_the_task_before_them(tmp_path: Path) -> None:
    session = Session(tmp_path)
    run(block("yaml", 'name: films\nprompt: "{text}"\nlabels: [" a", " b"]'), session)
    run(block("jsonl", '{"text": "x", "label": 1}'), session)
    with pytest.raises(BrokenBlock, match="label"):
        run(block("jsonl", '{"text": "x", "label": 2}'), session)


def test_blocks_of_one_page_share_their_names(tmp_path: Path) -> None:
    session = Session(tmp_path)
    run(block("python", "x = 1"), session)
    run(block("python", "assert x == 1"), session)


def test_a_block_that_is_marked_with_a_reason_does_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: it needs a network -->\n```python\n1 / 0\n```\n```python\n1 / 0\n```\n")
    marked, plain = blocks(page)
    run(marked, Session(tmp_path))
    with pytest.raises(BrokenBlock, match="ZeroDivisionError"):
        run(plain, Session(tmp_path))


def test_at_most_a_few_blocks_are_marked_as_not_run() -> None:
    marked = [str(one) for page in PAGES for one in blocks(page) if one.not_run is not None]
    assert len(marked) <= 3, f"blocks that no test runs: {marked}"


def test_a_block_without_an_end_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n")
    with pytest.raises(BrokenBlock, match="has no end"):
        list(documentation.blocks(page))
