"""Check that a file keeps to the size budget that ruff has no rule for: lengths of functions, share of comments.

usage: python -m tests.size_budget FILE ...
"""

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

MEDIAN_LINES = 10
MOST_LINES_OF_NINE_IN_TEN = 25
MOST_LINES = 50
COMMENTS_PER_100_LINES = (10, 18)


def function_lengths(source: str) -> list[tuple[int, str]]:
    """The length in lines and the name of every function, sorted."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return sorted(((node.end_lineno or node.lineno) - node.lineno + 1, node.name) for node in functions)


def docstring_lines(source: str) -> set[int]:
    """The numbers of the lines that docstrings take."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            found.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


def comments_per_100_lines(source: str) -> float:
    """Lines with a comment for each 100 lines of code; docstrings are neither."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comment_lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    blank = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code_lines = {token.start[0] for token in tokens if token.type not in blank} - docstring_lines(source)
    return 100 * len(comment_lines) / max(1, len(code_lines))


def problems_of(path: Path) -> list[str]:
    """What exceeds the budget, a sentence each."""
    source = path.read_text(encoding="utf-8")
    lengths = function_lengths(source)
    counts = [length for length, _ in lengths]
    found = [
        f"{path}: {name} has {length} lines, more than {MOST_LINES}" for length, name in lengths if length > MOST_LINES
    ]
    if statistics.median(counts) > MEDIAN_LINES:
        found.append(f"{path}: the median function has {statistics.median(counts)} lines, more than {MEDIAN_LINES}")
    if counts[int(len(counts) * 0.9)] > MOST_LINES_OF_NINE_IN_TEN:
        found.append(f"{path}: one function in ten has more than {MOST_LINES_OF_NINE_IN_TEN} lines")
    comments = comments_per_100_lines(source)
    least, most = COMMENTS_PER_100_LINES
    if not least <= comments <= most:
        found.append(f"{path}: {comments:.1f} comments per 100 lines of code, expected {least} to {most}")
    return found


def main() -> int:
    """Print every problem; exit 1 if there is one."""
    found = [problem for name in sys.argv[1:] for problem in problems_of(Path(name))]
    print("\n".join(found) or "size budget: kept")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
