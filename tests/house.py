"""Measure the package in a reader's units, and print the figures beside their limits: ``make house``.

Sizes are counted in tokens, since lines can be packed and a reader's head can't. Docstrings count for none of them.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "pyro_hybrid"

LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
PRONOUNS = "I it its itself they their theirs them this that these those mine ours his her who whoever which"
PREPOSITIONS = (
    "about above after against along among around as at before behind below beneath beside between beyond by "
    "during except for from in inside into like near of off on onto out outside over per since through till to "
    "toward under until up upon with within without"
)
QUANTIFIERS = "all any both each either enough every everything few half less many more most much neither no none nothing several some"
QUESTIONS = "how so what when where whether why"
ODD_OPENING = re.compile(
    rf"(?:{'|'.join(f'{PRONOUNS} {PREPOSITIONS} {QUANTIFIERS} {QUESTIONS}'.split())})\b",
    re.IGNORECASE,
)
HIDDEN_STATE = (
    "ContextVar(",
    "persistent=False",
    "am_i_wrapped(",
    "is_grad_enabled(",
    "__dict__[",
    "object.__setattr__",
)

ALLOWED: dict[tuple[str, str], str] = {
    ("diagnostics/case.py", "is_grad_enabled("): "compares settings that a program must not change",
    ("dynamics/modes.py", "ContextVar("): "the one place that tells a solver how to run",
    (
        "dynamics/rk4.py",
        "is_grad_enabled(",
    ): "recomputing saves memory only where there are gradients",
    ("training/meta_train.py", "is_grad_enabled("): "checks the caller",
}
"""Places that need such state, ``{(file, pattern): reason}``."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


class Figure(NamedTuple):
    """One measure of the package.

    Attributes:
        name: what is measured.
        value: its value.
        limit: the largest value allowed.
        where: the place with the largest value, or examples.
    """

    name: str
    value: float
    limit: float
    where: str = ""

    @property
    def is_met(self) -> bool:
        """Tell whether the value is within the limit."""
        return self.value <= self.limit

    def __str__(self) -> str:
        mark = "ok " if self.is_met else "NO "
        place = f"  {self.where}" if self.where else ""
        return f"{mark} {self.name:<44}{self.value:>8.3g}  (at most {self.limit:g}){place}"


@dataclass
class Source:
    """The text of one file and what its parser says."""

    name: str
    text: str
    tree: ast.Module = field(init=False)
    tokens: list[int] = field(init=False)  # the line of every token outside docstrings

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        lines = set(self.docstring_lines())
        self.tokens = [
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type not in LAYOUT and token.start[0] not in lines
        ]

    def docstring_lines(self) -> Iterator[int]:
        """Yield the numbers of all lines that belong to a docstring."""
        for node in ast.walk(self.tree):
            if isinstance(node, Documented) and ast.get_docstring(node) is not None:
                first = node.body[0]
                yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)

    def functions(self) -> list[Function]:
        """List all functions, nested ones and methods included."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def num_tokens(self, function: Function) -> int:
        """Count the tokens of a function, from its ``def`` to its end."""
        last = function.end_lineno or function.lineno
        return sum(function.lineno <= line <= last for line in self.tokens)


def sources(folder: Path) -> list[Source]:
    """Read every Python file below a folder."""
    paths = sorted(folder.rglob("*.py"))
    return [Source(path.relative_to(folder).as_posix(), path.read_text("utf-8")) for path in paths]


def num_lines(function: Function) -> int:
    """Count the lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def odd_docstrings(source: Source) -> tuple[int, list[str]]:
    """Count a file's docstrings, and list those that begin with a pronoun, a preposition or a quantifier."""
    number = 0
    odd = []
    for node in ast.walk(source.tree):
        text = ast.get_docstring(node) if isinstance(node, Documented) else None
        if text is None:
            continue
        number += 1
        if ODD_OPENING.match(text):
            odd.append(f"{source.name}: {text.splitlines()[0]}")
    return number, odd


def hidden_state(source: Source) -> list[str]:
    """List the places of a file that hold state out of sight, as ``file:line: pattern``."""
    return [
        f"{source.name}:{number}: {pattern}"
        for number, line in enumerate(source.text.splitlines(), 1)
        for pattern in HIDDEN_STATE
        if pattern in line and (source.name, pattern) not in ALLOWED
    ]


def measure(folder: Path = PACKAGE) -> list[Figure]:
    """Measure all files below a folder."""
    files = sources(folder)
    if not files:
        raise SystemExit(f"expected Python files; got none in {folder}. Name another folder.")
    return [*size_figures(files), *word_figures(files)]


def size_figures(files: list[Source]) -> list[Figure]:
    """Measure how long lines, functions and files are."""
    num_tokens = sum(len(source.tokens) for source in files)
    code_lines = sum(len(set(source.tokens)) for source in files)
    functions = [(source, function) for source in files for function in source.functions()]
    sizes = sorted(source.num_tokens(function) for source, function in functions)
    longest, where = max(
        (num_lines(function), f"{source.name}:{function.name}") for source, function in functions
    )
    file_length, file_name = max((len(source.text.splitlines()), source.name) for source in files)
    return [
        Figure("tokens per code line", num_tokens / code_lines, 9.0),
        Figure("tokens per function, median", statistics.median(sizes), 65),
        Figure("tokens per function, 90%", sizes[int(0.9 * (len(sizes) - 1))], 200),
        Figure("lines of the longest function", longest, 60, where),
        Figure("lines of the longest file", file_length, 350, file_name),
    ]


def word_figures(files: list[Source]) -> list[Figure]:
    """Measure docstrings that begin oddly, and state out of sight."""
    counts = [odd_docstrings(source) for source in files]
    number = sum(count for count, _ in counts)
    odd = [text for _, texts in counts for text in texts]
    places = [place for source in files for place in hidden_state(source)]
    return [
        Figure(
            "docstrings that begin oddly, share",
            len(odd) / max(number, 1),
            0.03,
            "; ".join(odd[:1]),
        ),
        Figure("hidden state, places", len(places), 0, "; ".join(places)),
    ]


def main(arguments: list[str]) -> int:
    """Print the figures, and with ``--odd`` every docstring that begins oddly; return 1 if a limit isn't met."""
    folder = Path(next((one for one in arguments if not one.startswith("--")), PACKAGE))
    figures = measure(folder)
    print(*figures, sep="\n")
    if "--odd" in arguments:
        print(*(text for source in sources(folder) for text in odd_docstrings(source)[1]), sep="\n")
    return 0 if all(figure.is_met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
