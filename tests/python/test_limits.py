"""Limits of length: 400 lines a Python file, 500 a C++ or CUDA file, 60 a function.

A docstring does not count. A longer function gives its reason in its first line: the first line of its docstring, or a
comment in the first line of a C++ body, either of which begins with "Long: ".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = {".py": 400, ".pyi": 400, ".h": 500, ".cpp": 500, ".cu": 500, ".cuh": 500}
MOST_FUNCTION_LINES = 60
REASON = "Long: "
PYTHON_FOLDERS = ["python", "tests/python", "docs"]
CPP_FOLDERS = ["csrc", "tests/cpp"]


class Function(NamedTuple):
    """A function: its name, the line on which it begins, its lines without the docstring, whether it gives a reason."""

    name: str
    line: int
    lines: int
    has_reason: bool


def files(folders: list[str], suffixes: set[str]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def python_functions(text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            docstring = ast.get_docstring(node, clean=False)
            documented = 0
            if docstring is not None:
                assert node.body[0].end_lineno is not None
                documented = node.body[0].end_lineno - node.body[0].lineno + 1
            lines = node.end_lineno - node.lineno + 1 - documented
            yield Function(node.name, node.lineno, lines, (docstring or "").startswith(REASON))


def without_comments_and_text(code: str) -> str:
    """The code with comments, strings and characters blanked out; every line keeps its number."""
    pattern = r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\''
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), code, flags=re.DOTALL)


#: The text before the opening brace of a function's body: (…), qualifiers, a result type or initialisers.
HEAD = re.compile(
    r"(?P<name>~?\w+|operator\s*\S+)\s*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\s*"
    r"(?:const|noexcept|override|final|mutable|->[^{;]*|:(?!:)[^;]*|\s)*$"
)
STATEMENTS = {"if", "for", "while", "switch", "catch", "return", "sizeof", "alignas", "decltype", "defined"}


def cpp_functions(text: str) -> Iterator[Function]:
    """Find the functions of a C++ file by its braces: blocks outside any function's body whose head has parameters."""
    code = without_comments_and_text(text)
    lines = text.splitlines()
    outside: list[bool] = []  # for each open brace: whether functions may begin in it
    start, place = 0, 0
    for match in re.finditer(r"[{};]", code):
        place = match.start()
        if match[0] == "{":
            head = HEAD.search(code[start:place]) if all(outside) else None
            is_function = head is not None and head["name"] not in STATEMENTS
            outside.append(all(outside) and not is_function and "=" not in code[start:place].rpartition(")")[2])
            if is_function:
                assert head is not None
                begin = start + len(code[start:place]) - len(code[start:place].lstrip())
                first, last = code.count("\n", 0, begin), code.count("\n", 0, closing(code, place))
                body = code.count("\n", 0, place) + 1
                has_reason = body < len(lines) and f"// {REASON}" in lines[body]
                yield Function(head["name"], first + 1, last - first + 1, has_reason)
        elif match[0] == "}" and outside:
            outside.pop()
        start = match.end()


def closing(code: str, place: int) -> int:
    """Return the position of the brace that closes the brace at `place`."""
    depth = 0
    for match in re.finditer(r"[{}]", code[place:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return place + match.start()
    return len(code)


def test_files_are_not_too_long() -> None:
    long = []
    for path in files([*PYTHON_FOLDERS, *CPP_FOLDERS], set(MOST_LINES)):
        count = len(path.read_text("utf-8").splitlines())
        if count > MOST_LINES[path.suffix]:
            long.append(f"{path.relative_to(ROOT)}: {count} lines, at most {MOST_LINES[path.suffix]}")
    assert not long, "\n".join(long)


def test_functions_are_not_too_long() -> None:
    long = []
    for path in files(PYTHON_FOLDERS, {".py"}):
        long += [(path, one) for one in python_functions(path.read_text("utf-8"))]
    for path in files(CPP_FOLDERS, {".h", ".cpp", ".cu", ".cuh"}):
        long += [(path, one) for one in cpp_functions(path.read_text("utf-8"))]
    found = [
        f"{path.relative_to(ROOT)}:{one.line}: {one.name} has {one.lines} lines, at most {MOST_FUNCTION_LINES}"
        for path, one in long
        if one.lines > MOST_FUNCTION_LINES and not one.has_reason
    ]
    assert not found, "\n".join(found)


# The scan itself.


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("int f(int x) {\n  return x;\n}\n", [("f", 3, False)]),
        ("template <typename T>\nvoid f(T x) {\n  // Long: one pipeline.\n  if (x) {\n  }\n}\n", [("f", 6, True)]),
        ("struct S {\n  int x = 0;\n  S(int y) : x(y) {}\n  int get() const { return x; }\n};\n",
         [("S", 1, False), ("get", 1, False)]),
        ("namespace n {\nauto f() -> int {\n  const auto g = [](int x) { return x; };\n  return g(1);\n}\n}\n",
         [("f", 4, False)]),
        ("int table[] = {1, 2};\nint f() { return '{'; }\n", [("f", 1, False)]),
        ('const char* text = "f() {";\nvoid g() {}\n', [("g", 1, False)]),
        ("__global__ void __launch_bounds__(C::threads, 1)\n    attend(const Arguments a) {\n  a.x();\n}\n",
         [("attend", 4, False)]),
    ],
)  # fmt: skip
def test_the_scan_finds_functions_and_their_lengths(code: str, expected: list[tuple[str, int, bool]]) -> None:
    assert [(one.name, one.lines, one.has_reason) for one in cpp_functions(code)] == expected


def test_a_docstring_does_not_count_as_lines_of_a_function() -> None:
    text = 'def f():\n    """Long: a table.\n\n    More.\n    """\n    return 1\n'
    assert list(python_functions(text)) == [Function("f", 1, 2, True)]
