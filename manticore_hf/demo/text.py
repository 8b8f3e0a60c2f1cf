"""Real text that every machine has: the prose and the code of the running interpreter's standard library.

    python -m manticore_hf.demo.text            # sizes of every kind and split
    python -m manticore_hf.demo.text prose test # print the documents

The demo needs two kinds of text that suit different components, needs no download, and must be honest about what the
shipped components have seen. `prose` is what people read (docstrings, comment blocks, the language reference that
`help()` shows), `code` is what the machine reads (the same files without docstrings and comments). A split belongs
to a whole top-level module (`asyncio`, `email`), because files of one package repeat each other, and because a module
keeps its name between Python versions while its files are moved about. A block of text that repeats one of another
split is dropped from the larger split. The text differs a little between Python versions: losses do, too.

Nothing is imported or executed: files are parsed only. The text is under the PSF-2.0 licence of Python itself.
"""

import ast
import functools
import hashlib
import inspect
import io
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

KINDS = ("prose", "code")
# Held-out splits come first: where two splits hold the same text, the larger one loses it.
SPLITS = {"test": 5, "validation": 5, "train": 25, "pretrain": 65}  # percent of the modules

_SALT = "283"  # the first whose held-out splits hang neither on one large module nor on one that newer Pythons removed
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "turtledemo"}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_GENERATED = re.compile(r"_sysconfigdata|config-\d|__phello__")
_NOT_LETTERS = re.compile(r"[^ \w]|[\d_]")
_DOCUMENT_CHARS = 2000  # blocks are joined up to about this length
_SHORTEST_DOCUMENT = 200
_LONGEST_STATEMENT = 2000  # anything longer that is neither a function nor a class is a table
_COMMON_WORDS = frozenset(
    "a an and are as at be but by can for from has have if in is it its may must no not of on or should so that the "
    "their then there this to was we when which will with you".split()
)


def documents(kind: str, split: str) -> list[str]:
    """Return the documents of one kind and split, always in the same order.

    Args:
        kind: "prose" or "code".
        split: "pretrain" (seen by the shipped components), "train", "validation" or "test" (never seen by them).

    Returns:
        Documents of at least 200 characters. Every code document parses.

    Raises:
        ValueError: If the kind or the split does not exist.
        RuntimeError: If the interpreter ships without the source of its standard library.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    return list(_corpus()[kind][split])


def split_of(module: str) -> str:
    """Return the split that a module's text belongs to, by a hash that is the same on every machine."""
    key = module if module.startswith("pydoc_data.") else module.split(".")[0].lstrip("_").removeprefix("py")
    place = int(hashlib.sha256(f"{_SALT}{key}".encode()).hexdigest(), 16) % 100
    for split, percent in SPLITS.items():
        place -= percent
        if place < 0:
            return split
    raise AssertionError("the percentages of SPLITS do not add up to 100")


@functools.cache
def _corpus() -> dict[str, dict[str, list[str]]]:
    """Read everything once (about ten seconds) and drop what repeats."""
    blocks: dict[str, dict[str, list[list[str]]]] = {kind: {split: [] for split in SPLITS} for kind in KINDS}
    for module, source in _sources(Path(sysconfig.get_path("stdlib"))):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        if module == "pydoc_data.topics":
            for topic, text in _topics(tree):
                blocks["prose"][split_of(f"{module}.{topic}")].append(list(_prose_blocks(text)))
            continue
        documented, comments = _documented(tree), _comments(source)
        blocks["prose"][split_of(module)].append(
            [block for text in _human_texts(documented, comments) for block in _prose_blocks(text)]
        )
        blocks["code"][split_of(module)].append(list(_code_blocks(source, tree, documented, comments)))
    corpus: dict[str, dict[str, list[str]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        seen: set[str] = set()
        for split in SPLITS:
            corpus[kind][split] = []
            for module_blocks in blocks[kind][split]:
                for document in _joined([block for block in module_blocks if _is_new(block, seen)]):
                    if len(document) >= _SHORTEST_DOCUMENT and document not in seen:
                        seen.add(document)
                        corpus[kind][split].append(document)
    return corpus


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted module name, source) of the standard library in the order of the names."""
    files = {}
    for folder, folders, names in os.walk(root):
        # Pruned before they are entered: site-packages can be many times larger than the library.
        folders[:] = [name for name in folders if name not in _SKIPPED and not _GENERATED.match(name)]
        for name in names:
            if name.endswith(".py") and not _GENERATED.match(name):
                path = Path(folder, name)
                parts = path.relative_to(root).with_suffix("").parts
                files[".".join(parts).removesuffix(".__init__")] = path
    if not files:
        raise RuntimeError(
            f"no source files (*.py) of the standard library under {root}: {sys.executable or 'this interpreter'} "
            "looks frozen or stripped; use an ordinary CPython 3.10 or newer"
        )
    for module in sorted(files):
        try:
            with tokenize.open(files[module]) as file:  # honours the coding line
                yield module, file.read().expandtabs()
        except (SyntaxError, UnicodeDecodeError):
            continue


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the language reference that `help("topic")` shows; it is stored as one dict of strings."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())


def _documented(tree: ast.Module) -> list[ast.AST]:
    """Return the nodes that have a docstring; bodies of expressions hold none, so only statements are visited."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and ast.get_docstring(node, clean=False) is not None:
            found.append(node)
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting.extend(getattr(node, field, ()))
    return found


def _comments(source: str) -> list[tokenize.TokenInfo]:
    """Return the comments of a file, those at the end of a line of code included."""
    return [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT]


def _human_texts(documented: list[ast.AST], comments: list[tokenize.TokenInfo]) -> Iterator[str]:
    """Yield docstrings and blocks of whole-line comments in the order of the file."""
    texts = {node.body[0].lineno: ast.get_docstring(node) for node in documented}
    start, previous = 0, (-1, -1)
    for token in comments:
        if token.line[: token.start[1]].strip():
            continue
        if previous != (token.start[0] - 1, token.start[1]):
            start = token.start[0]
            texts[start] = ""
        texts[start] += token.string.lstrip("#!:").removeprefix(" ") + "\n"
        previous = token.start
    for line in sorted(texts):
        yield inspect.cleandoc(texts[line])


def _prose_blocks(text: str) -> Iterator[str]:
    """Yield the paragraphs that are sentences, each on one line: no doctests, tables, lists or commented-out code."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip().splitlines()
        if ">>>" in paragraph or "::=" in paragraph or any(re.match(r"\s*(\.\.|:\w|[|+=~*#-]{2})", x) for x in lines):
            continue
        if any(re.search(r"\S {3,}\S", line) for line in lines):  # columns
            continue
        if sum(bool(re.match(r"\s*([-*+o]|\(?\w[.)]|@\w+)\s", line)) for line in lines) > 1:  # a list; one item is fine
            continue
        block = " ".join(paragraph.split())
        words = re.findall(r"[a-z']+", block.lower())
        letters = len(block) - len(_NOT_LETTERS.findall(block))
        common = sum(word in _COMMON_WORDS for word in words)
        if len(block) >= 40 and letters >= 0.85 * len(block) and common >= 0.2 * len(words):
            yield block


def _code_blocks(
    source: str, tree: ast.Module, documented: list[ast.AST], comments: list[tokenize.TokenInfo]
) -> Iterator[str]:
    """Yield the top-level statements without docstrings and comments, in the author's own layout."""
    lines = source.split("\n")  # not splitlines(): the parser counts no form feeds
    for token in comments:
        row, column = token.start
        # A line that only held a comment leaves nothing behind; None is told apart from blank lines inside strings.
        lines[row - 1] = lines[row - 1][:column].rstrip() or None
    for node in documented:
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        lines[first:last] = [None] * (last - first)
        if len(node.body) == 1:
            lines[first] = " " * node.body[0].col_offset + "pass"
    for node in tree.body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        block = "\n".join(line for line in lines[first - 1 : node.end_lineno] if line is not None).strip("\n")
        if isinstance(node, _DEFINITIONS) or len(block) <= _LONGEST_STATEMENT:
            if block and _parses(block):  # not so where several statements share a line
                yield block


def _parses(block: str) -> bool:
    """Tell whether a block is a program of its own."""
    try:
        ast.parse(block)
    except SyntaxError:
        return False
    return True


def _is_new(block: str, seen: set[str]) -> bool:
    """Tell whether at most a fifth of a block's longer lines or sentences were seen before; remember a new block."""
    units = {unit for unit in (unit.strip() for unit in re.split(r"\n|(?<=[.;:?!]) ", block)) if len(unit) >= 40}
    if len(units & seen) > 0.2 * len(units):
        return False
    seen |= units
    return True


def _joined(blocks: list[str]) -> Iterator[str]:
    """Join neighbouring blocks of one module to documents of about `_DOCUMENT_CHARS`; a longer block stays whole."""
    document = previous = ""
    for block in blocks:
        if document and len(document) + len(block) > _DOCUMENT_CHARS:
            yield document
            document = ""
        one_line_each = "\n" not in previous + block  # paragraphs of prose, imports and constants of code
        document += ("" if not document else "\n" if one_line_each else "\n\n\n") + block
        previous = block
    yield document


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print("\n\n----\n\n".join(documents(*sys.argv[1:])))
    else:
        for kind in KINDS:
            for split in SPLITS:
                found = documents(kind, split)
                print(f"{kind:6} {split:10} {len(found):5} documents {sum(map(len, found)) / 1000:8.1f} KB")
