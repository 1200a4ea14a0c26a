"""Build the embedded federated data set from the docstrings of Python's standard library.

Every documented function, class and method of a standard-library package becomes one example
(signature in, documentation entry out), and every package becomes one client.  The split is non-IID
by nature: each package has its own vocabulary, its own authors and its own size.

The sources are parsed with ``ast``; none of the modules is imported.  Run it as::

    python experiments/embedded/build_data.py
"""

import argparse
import ast
import copy
import hashlib
import inspect
import json
import platform
import re
import statistics
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

OUTPUT_DIR = Path(__file__).resolve().parents[2] / "corolla" / "embedded"

MIN_EXAMPLES = 34  # A package with fewer examples is not a client.
MAX_EXAMPLES = 400  # A package with more examples keeps this many of them.
MIN_TEXT_CHARS = 25
MAX_TEXT_CHARS = 400
MAX_PROMPT_CHARS = 200

# Directories that hold no part of the library proper.
EXCLUDED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
# Packages that are applications, generated data or deprecated build machinery, not libraries.
EXCLUDED_PACKAGES = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc", "pydoc_data", "turtledemo"}
)
# A private module that implements a public one counts as the public one.
PUBLIC_NAMES = {"_pydecimal": "decimal", "_pyio": "io"}

# Some files carry a licence notice of their own.  They are left out, so that the one licence
# in LICENSE-PSF.txt covers everything.
OTHER_LICENCE = re.compile(
    r"permission\s+(to\s+use|is\s+hereby)|redistribution\s+and\s+use|provided\s+'as-is'"
    r"|choose\s+between\s+two\s+licenses",
    re.IGNORECASE,
)
# Docstrings that only point elsewhere say nothing about the object.
BOILERPLATE = re.compile(
    r"^(see\b|internal\b|overrid|inherited\b|same as\b|like \w+\(|todo\b|initiali[sz]e self\b"
    r"|x\.__|deprecated\b|not implemented\b|abstract\b|stub\b)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

CARD_EXAMPLE = "smtplib.SMTP.login("  # Shown in the data card.

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Example(TypedDict):
    """One line of the data set."""

    client_id: str
    prompt: str
    response: str


def stdlib_files() -> Iterator[tuple[str, Path]]:
    """Yield (dotted module name, file) for the standard library's sources, sorted by file."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRS.intersection(relative.parts[:-1]):
            continue
        parts = list(relative.with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        parts[0] = PUBLIC_NAMES.get(parts[0], parts[0])
        yield ".".join(parts), path


def read_psf_source(path: Path) -> str | None:
    """Return the text of a source file, or None if it has a licence notice of its own."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    if OTHER_LICENCE.search(text):
        return None
    # "All rights reserved" is fine only where the rights were licensed to the PSF.
    reserved = re.search(r"all\s+rights\s+reserved", text, re.IGNORECASE)
    if reserved and not re.search(r"PSF|Python Software Foundation", text):
        return None
    return text


def decorator_names(node: FunctionNode) -> set[str]:
    """Return the names of a function's plain decorators."""
    return {d.id for d in node.decorator_list if isinstance(d, ast.Name)}


def is_property(node: FunctionNode) -> bool:
    """Tell whether a function is a property."""
    return bool(decorator_names(node) & {"property", "cached_property"})


def public_arguments(node: FunctionNode, *, is_method: bool) -> ast.arguments:
    """Return a function's arguments without annotations and without self or cls."""
    arguments = copy.deepcopy(node.args)
    for group in (arguments.posonlyargs, arguments.args, arguments.kwonlyargs):
        for argument in group:
            argument.annotation = None
    for extra in (arguments.vararg, arguments.kwarg):
        if extra is not None:
            extra.annotation = None
    if is_method and "staticmethod" not in decorator_names(node):
        first = arguments.posonlyargs or arguments.args
        # A default belongs to the last arguments, so dropping the first one leaves it in place.
        if first and len(arguments.posonlyargs + arguments.args) > len(arguments.defaults):
            first.pop(0)
    return arguments


def argument_names(arguments: ast.arguments) -> list[str]:
    """Return the names of all arguments in the order of the signature."""
    positional = [a.arg for a in arguments.posonlyargs + arguments.args]
    keyword = [a.arg for a in arguments.kwonlyargs]
    var = [arguments.vararg.arg] if arguments.vararg else []
    kwargs = [arguments.kwarg.arg] if arguments.kwarg else []
    return positional + var + keyword + kwargs


def constructor_arguments(node: ast.ClassDef) -> ast.arguments | None:
    """Return the arguments of the class's own ``__init__``, if it has one."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return public_arguments(child, is_method=True)
    return None


def make_entry(
    module: str, name: str, kind: str, arguments: ast.arguments | None, docstring: str
) -> tuple[str, str, str]:
    """Return the prompt, the head of the response and the docstring of an object."""
    signature = "" if arguments is None else f"({ast.unparse(arguments)})"
    names = [] if arguments is None else argument_names(arguments)
    prompt = f"{'class ' if kind == 'class' else ''}{module}.{name}{signature}"
    head = f"Module: {module}\nName: {name}\nKind: {kind}\nParameters: {', '.join(names) or 'none'}"
    return prompt, head, docstring


def is_private(name: str) -> bool:
    """Tell whether a name has a leading underscore and is not a special method's."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def documented_objects(
    body: Iterable[ast.stmt], module: str, owner: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yield prompt, head of the response and docstring for the public objects in a body.

    ``owner`` is the name of the class whose body it is, with a dot at its end.
    """
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            # Definitions that depend on the platform or on an optional import.
            yield from documented_objects(node.body, module, owner)
            yield from documented_objects(node.orelse, module, owner)
        elif isinstance(node, FunctionNode | ast.ClassDef) and not is_private(node.name):
            name = f"{owner}{node.name}"
            docstring = ast.get_docstring(node, clean=False)
            if isinstance(node, ast.ClassDef):
                if docstring:
                    yield make_entry(module, name, "class", constructor_arguments(node), docstring)
                yield from documented_objects(node.body, module, f"{name}.")
            elif docstring and is_property(node):
                yield make_entry(module, name, "property", None, docstring)
            elif docstring:
                kind = "method" if owner else "function"
                arguments = public_arguments(node, is_method=bool(owner))
                yield make_entry(module, name, kind, arguments, docstring)


def shorten(docstring: str) -> str:
    """Clean a docstring and cut it at a paragraph's or sentence's end; "" if that cannot be."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        paragraph = "\n".join(line.rstrip() for line in paragraph.splitlines())
        if paragraph.lstrip().startswith(">>>"):
            break  # Interactive examples end the prose.
        if len("\n\n".join([*kept, paragraph])) > MAX_TEXT_CHARS:
            if not kept:
                # One long paragraph: as many whole sentences as fit.
                ends = [m.end() for m in SENTENCE_END.finditer(paragraph[:MAX_TEXT_CHARS])]
                kept = [paragraph[: ends[-1]]] if ends else []
            break
        kept.append(paragraph)
    # A paragraph that announces something which was cut away goes as well.
    while len(kept) > 1 and kept[-1].endswith(":"):
        kept.pop()
    return "\n\n".join(kept).strip()


def is_useful(prompt: str, text: str) -> bool:
    """Tell whether an example has a prompt of moderate length and a telling text."""
    return (
        len(prompt) <= MAX_PROMPT_CHARS
        and len(text) >= MIN_TEXT_CHARS
        and not BOILERPLATE.match(text)
    )


def stable_order(example: Example) -> str:
    """Return a key that sorts examples in an arbitrary but reproducible order."""
    return hashlib.sha256(f"{example['prompt']}\n{example['response']}".encode()).hexdigest()


def collect_examples() -> list[Example]:
    """Return the examples of all clients, sorted by client, prompt and response."""
    by_client: dict[str, list[Example]] = {}
    seen: set[tuple[str, str]] = set()
    for module, path in stdlib_files():
        package = module.split(".")[0]
        private = any(part.startswith("_") for part in module.split("."))
        source = None if private or package in EXCLUDED_PACKAGES else read_psf_source(path)
        if source is None:
            continue
        for prompt, head, docstring in documented_objects(ast.parse(source).body, module):
            text = shorten(docstring)
            # Within a client the same text is kept once, however many classes repeat it.
            if is_useful(prompt, text) and (package, text) not in seen:
                seen.add((package, text))
                by_client.setdefault(package, []).append(
                    {"client_id": package, "prompt": prompt, "response": f"{head}\n\n{text}"}
                )
    kept = [
        example
        for examples in by_client.values()
        if len(examples) >= MIN_EXAMPLES
        for example in sorted(examples, key=stable_order)[:MAX_EXAMPLES]
    ]
    return sorted(kept, key=lambda e: (e["client_id"], e["prompt"], e["response"]))


def client_packages() -> frozenset[str]:
    """Return the names of the packages that are clients."""
    return frozenset(example["client_id"] for example in collect_examples())


def psf_licence() -> str:
    """Return the PSF licence section of the running Python's LICENSE.txt."""
    text = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(encoding="utf-8")
    start = text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n-")
    return text[start : text.index("BEOPEN.COM LICENSE AGREEMENT", start)].strip() + "\n"


def data_card(examples: list[Example], data: bytes) -> str:
    """Return the text of the data card."""
    counts: dict[str, list[int]] = {}
    for example in examples:
        counts.setdefault(example["client_id"], []).append(len(example["response"]))
    sizes = [len(lengths) for lengths in counts.values()]
    example = next(e for e in examples if e["prompt"].startswith(CARD_EXAMPLE))
    rows = "\n".join(
        f"| {client} | {len(lengths)} | {statistics.mean(lengths):.0f} |"
        for client, lengths in counts.items()
    )
    return f"""# Data card: the embedded federated data set

`data.jsonl` pairs the signatures of Python's standard library with their documentation, one
client per top-level package or module. It is small, needs no download, and is non-IID by
nature: each package has its own vocabulary, style and size.

## Format

One JSON object per line (UTF-8), sorted by client, prompt and response:

| Field | Meaning |
|---|---|
| `client_id` | the package, for example `asyncio` |
| `prompt` | qualified name and signature; classes start with `class` |
| `response` | the documentation entry |

An entry names the object's module, name, kind and parameters, all of which can be read off the
prompt, and then gives the first paragraphs of its docstring (at most {MAX_TEXT_CHARS}
characters):

```text
{example["prompt"]}

{example["response"]}
```

## How it was made

`python experiments/embedded/build_data.py` with Python {platform.python_version()}. Another
version of Python gives other docstrings, hence another file.

- The library's sources are parsed, not imported. Tests, applications (IDLE, pydoc, the turtle
  demonstrations) and deprecated build machinery (distutils, lib2to3) are left out.
- Only public names. Annotations, `self` and `cls` are left out of signatures.
- Docstrings are cleaned with `inspect.cleandoc` and cut at the end of a paragraph or sentence;
  interactive examples (`>>>`) are cut away.
- Left out: docstrings under {MIN_TEXT_CHARS} characters, docstrings that only refer
  elsewhere, prompts over {MAX_PROMPT_CHARS} characters, and texts that repeat within a client.
- Packages with fewer than {MIN_EXAMPLES} examples are left out; larger ones keep at most
  {MAX_EXAMPLES}, chosen by a hash of the example.
- Files that carry a licence notice of their own (for example `logging`, `tarfile`, `turtle`)
  are left out.

SHA-256 of `data.jsonl`: `{hashlib.sha256(data).hexdigest()}`

## Contents

{len(examples)} examples from {len(counts)} clients, {len(data):,} bytes; per client at least
{min(sizes)}, in the median {statistics.median(sizes):g}, at most {max(sizes)}.

| Client | Examples | Mean response length (characters) |
|---|---:|---:|
{rows}

## Limits

The text is English, technical and public. It is meant for demonstrations, tests and comparisons
of methods, not for training a useful assistant. Larger language models have most likely seen it.
The head of an entry has a fixed form and is soon learnt; much of the early fall of the loss is due
to it, and the rest to the manner of the docstrings.

## Licence

The docstrings are Copyright © Python Software Foundation; All Rights Reserved. They are used
under the Python Software Foundation License Version 2; `LICENSE-PSF.txt` has its text and the
full copyright notice. Changes made to them: extracted, shortened and paired with their
signatures as described above.
"""


def main() -> None:
    """Write the data set, its card and its licence."""
    parser = argparse.ArgumentParser(description="Build the embedded federated data set.")
    parser.add_argument("--output", type=Path, default=OUTPUT_DIR, help="output directory")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    examples = collect_examples()
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    data = "".join(lines).encode()
    (output / "data.jsonl").write_bytes(data)
    (output / "DATA_CARD.md").write_text(data_card(examples, data), encoding="utf-8")
    (output / "LICENSE-PSF.txt").write_text(psf_licence(), encoding="utf-8")
    clients = {example["client_id"] for example in examples}
    print(f"{len(examples)} examples, {len(clients)} clients, {len(data):,} bytes")


if __name__ == "__main__":
    main()
