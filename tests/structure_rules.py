"""The rules of the house as functions from sources to complaints; test_structure.py applies them and shows each bite.

They read syntax trees, so a word in a comment, a docstring or an error message is never mistaken for code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_LAUNCH_LINES = 40

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "errors"),
    (
        "algorithms",
        "lora",
        "console",
        "device",
        "distributed",
        "kernels",
        "metrics",
        "models",
        "storage",
        "timing",
        "typed",
        "watchdog",
    ),
    ("trainer", "engine", "environments", "data", "batching", "tracking"),
    ("rollout", "evaluation", "weight_sync", "shared_weights", "probe", "memory", "checkpoint", "config"),
    ("overrides", "parity", "pair"),
    ("runtime",),
    ("progress",),
    ("service", "client", "doctor"),
)
"""Modules and packages of framework/, lowest layer first. A module imports from its own layer and from those below."""

BACKENDS = ("framework.trainer.megatron", "framework.trainer.hf", "framework.engine.vllm")
"""Leaves: only pair.py imports them, inside functions, so that an unused backend is never loaded."""

HOMES: Mapping[str, tuple[str, ...]] = {
    "megatron": ("framework/trainer/megatron/",),
    "vllm": ("framework/engine/vllm/",),
    "wandb": ("framework/tracking.py",),
    "fastapi": ("framework/service/",),
    "starlette": ("framework/service/",),
    "uvicorn": ("framework/service/",),
    "omegaconf": ("framework/config.py", "launch/"),
    "hydra": ("launch/",),
}
"""Who may import a library that one room of the house owns."""

WITHOUT_TORCH = ("framework.types", "framework.errors", "framework.lora.spec", "framework.client")
"""Modules that a process without torch can import."""

DEVICE_WORDS = frozenset({"cuda", "cpu", "nccl", "gloo"})
DEVICE_FILES = (
    "framework/device.py",
    # These answer for libraries that ask torch for a device themselves, or whose code differs by device.
    "framework/trainer/megatron/compat.py",
    "framework/engine/vllm/internals.py",
    "framework/engine/vllm/cpu_lora.py",
)

HOSTS = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs\.org|deb\.debian\.org|download\.pytorch\.org")
MACHINE_PATHS = re.compile(r"(?<![\w.~}/-])/(?:work|root|opt/wheels|opt/pypi[\w-]*|home/\w+)(?=/|\b)(?![\w-])")

OF_THE_REPOSITORY = (
    "tests/test_structure.py",
    "tests/test_makefile.py",
    "tests/test_docs.py",
    "tests/faults/test_faults.py",
)
MIRRORED = ("benchmarks", "conf", "examples", "launch", "recipes")
"""Folders beside framework/ whose tests lie in tests/<folder>/; framework's own lie in tests/ itself."""


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file."""

    path: str
    """From the root of the repository, with slashes."""
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def says(self, line: int, complaint: str) -> str:
        return f"{self.path}:{line}: {complaint}"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module."""

    module: str
    line: int
    eager: bool
    """True when importing the file imports it: outside functions and ``if TYPE_CHECKING``."""


def imports(source: Source, modules: frozenset[str]) -> Iterator[Import]:
    """Every import of a file; ``from a import b`` is ``a.b`` where that is one of ``modules``, else ``a``."""

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield Import(whole if whole in modules else child.module, child.lineno, eager)
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from walk(child, eager and not lazy)

    yield from walk(source.tree, eager=True)


def _under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _backend(module: str) -> str | None:
    return next((backend for backend in BACKENDS if _under(module, backend)), None)


def _layer(module: str) -> int | None:
    parts = module.split(".")
    if len(parts) == 1:
        return 0
    return next((index for index, names in enumerate(LAYERS) if parts[1] in names), None)


def _modules(sources: Sequence[Source]) -> frozenset[str]:
    return frozenset(source.module for source in sources)


def _product(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.path.startswith(("framework/", "recipes/", "launch/"))]


def check_libraries(sources: Sequence[Source]) -> list[str]:
    """A library with a home is imported there only."""
    return [
        source.says(found.line, f"{found.module} may be imported only by {', '.join(HOMES[root])}")
        for source in _product(sources)
        for found in imports(source, frozenset())
        if (root := found.module.split(".")[0]) in HOMES and not source.path.startswith(HOMES[root])
    ]


def check_layers(sources: Sequence[Source]) -> list[str]:
    """framework imports downwards; recipes import framework; nothing but launch imports recipes or launch."""
    complaints: list[str] = []
    for source in _product(sources):
        room = source.module.split(".")[0]
        own = _layer(source.module) if room == "framework" else len(LAYERS)
        if own is None:
            complaints.append(source.says(1, f"{source.module} has no layer; give it one in tests/structure_rules.py"))
            continue
        for found in imports(source, _modules(sources)):
            target = found.module.split(".")[0]
            if target == "launch" or (target == "recipes" and room == "framework"):
                complaints.append(source.says(found.line, f"nothing in {room}/ may import {target}"))
            if target == "framework" and (_layer(found.module) or 0) > own:
                complaints.append(source.says(found.line, f"{found.module} is in a layer above {source.module}"))
    return complaints


def check_backends(sources: Sequence[Source]) -> list[str]:
    """Only pair.py imports a backend, lazily; a backend imports no other backend."""
    complaints: list[str] = []
    for source in _product(sources):
        for found in imports(source, _modules(sources)):
            backend = _backend(found.module)
            if backend is None or backend == _backend(source.module):
                continue
            if source.path != "framework/pair.py":
                complaints.append(source.says(found.line, f"{backend} may be imported only by framework/pair.py"))
            elif found.eager:
                complaints.append(source.says(found.line, f"{backend} must be imported inside a function"))
    return complaints


def check_cycles(sources: Sequence[Source]) -> list[str]:
    """No module imports itself through others, as far as importing it goes."""
    graph = {source.module: _eager_targets(source, _modules(sources)) for source in _product(sources)}
    complaints = []
    for start in graph:
        if start in _reachable(graph, graph[start]):
            complaints.append(f"{start.replace('.', '/')}: is part of an import cycle")
    return complaints


def check_torch_free(sources: Sequence[Source]) -> list[str]:
    """Importing the light modules does not import torch, not by way of others either."""
    graph = {source.module: _eager_targets(source, _modules(sources)) for source in _product(sources)}
    return [
        f"{light.replace('.', '/')}: importing it imports torch"
        for light in WITHOUT_TORCH
        if any(_under(module, "torch") for module in _reachable(graph, {light}))
    ]


def _eager_targets(source: Source, modules: frozenset[str]) -> set[str]:
    return {found.module for found in imports(source, modules) if found.eager}


def _reachable(graph: Mapping[str, set[str]], start: set[str]) -> set[str]:
    seen: set[str] = set()
    todo = set(start)
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= graph.get(module, set()) - seen
    return seen


def check_device_words(sources: Sequence[Source]) -> list[str]:
    """Kinds of device and their backends are named in device.py; elsewhere a Device carries them."""
    complaints = []
    for source in _product(sources):
        if source.path in DEVICE_FILES:
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if words := DEVICE_WORDS & set(re.split(r"[:,]", node.value)):
                    complaints.append(source.says(node.lineno, f"names {sorted(words)}; ask framework/device.py"))
            elif isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda"):
                complaints.append(source.says(node.lineno, f"uses .{node.attr}; ask framework/device.py"))
            elif isinstance(node, ast.Import | ast.ImportFrom) and re.search(r"\btorch\.cuda\b", ast.unparse(node)):
                complaints.append(source.says(node.lineno, "imports torch.cuda; ask framework/device.py"))
    return complaints


def check_sizes(sources: Sequence[Source]) -> list[str]:
    """Functions, files and launchers stay small."""
    complaints = []
    for source in sources:
        num_lines = source.text.count("\n")
        limit = MAX_LAUNCH_LINES if re.fullmatch(r"launch/\w+\.py", source.path) else MAX_FILE_LINES
        if num_lines > limit:
            complaints.append(source.says(num_lines, f"the file has {num_lines} lines, at most {limit} are allowed"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    complaints.append(
                        source.says(node.lineno, f"{node.name} has {size} lines, at most {MAX_FUNCTION_LINES}")
                    )
    return complaints


def check_docstrings(sources: Sequence[Source]) -> list[str]:
    """Every module says what it is; so does every public class and function of the product.

    HTTP handlers and request bodies (``service/routes_*.py``) are said by their route and their schema.
    """
    complaints = []
    for source in sources:
        if source.text.strip() and ast.get_docstring(source.tree) is None:
            complaints.append(source.says(1, "the module has no docstring"))
    for source in _product(sources):
        if source.path.startswith("framework/service/routes_"):
            continue
        for node in source.tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not node.name.startswith("_") and ast.get_docstring(node) is None:
                complaints.append(source.says(node.lineno, f"{node.name} has no docstring"))
    return complaints


def _tests(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.path.startswith("tests/")]


def check_assertions(sources: Sequence[Source]) -> list[str]:
    """Every test can fail: it asserts something, itself or through a function named assert_*."""
    return [
        source.says(node.lineno, f"{node.name} asserts nothing")
        for source in _tests(sources)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not any(_asserts(part) for part in ast.walk(node))
    ]


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return name in ("pytest.raises", "pytest.warns") or name.split(".")[-1].startswith("assert_")
    return False


def check_no_patching(sources: Sequence[Source]) -> list[str]:
    """Fakes have names and behaviour; nothing replaces the inside of a module under test."""
    complaints = []
    for source in _tests(sources):
        for found in imports(source, frozenset({"unittest.mock"})):
            if any(_under(found.module, name) for name in ("mock", "unittest.mock", "pytest_mock")):
                complaints.append(source.says(found.line, f"imports {found.module}; write a fake"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.arg) and node.arg == "mocker":
                complaints.append(source.says(node.lineno, "takes mocker; write a fake"))
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("mock.patch", "monkeypatch.setattr"):
                complaints.append(source.says(node.lineno, f"uses {ast.unparse(node)}; pass a fake"))
    return complaints


def check_mirror(sources: Sequence[Source]) -> list[str]:
    """tests/a/test_b.py and tests/a/test_b_aspect.py test framework/a/b.py (or recipes/b.py from tests/recipes/)."""
    known = {source.path.removesuffix(".py").removesuffix("/__init__") for source in sources}
    known |= {path.rsplit("/", depth)[0] for path in known for depth in range(1, path.count("/") + 1)}
    complaints = []
    for source in _tests(sources):
        folder, _, name = source.path.removeprefix("tests/").removesuffix(".py").rpartition("/")
        if not name.startswith("test_") or source.path in OF_THE_REPOSITORY:
            continue
        room = folder if folder.split("/")[0] in MIRRORED else f"framework/{folder}".rstrip("/")
        words = name.removeprefix("test_").split("_")
        if not any(f"{room}/{'_'.join(words[:count])}" in known for count in range(1, len(words) + 1)):
            complaints.append(source.says(1, f"there is no {room}/{'_'.join(words)}.py that it could be the test of"))
    return complaints


def check_places(texts: Mapping[str, str]) -> list[str]:
    """No tracked file names a package registry's host or a path of somebody's machine.

    Args:
        texts: every tracked text file, by path.
    """
    return [
        f"{path}:{number}: names {found.group()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        for pattern in (HOSTS, MACHINE_PATHS)
        if (found := pattern.search(line))
    ]


RULES: tuple[Callable[[Sequence[Source]], list[str]], ...] = (
    check_libraries,
    check_layers,
    check_backends,
    check_cycles,
    check_torch_free,
    check_device_words,
    check_sizes,
    check_docstrings,
    check_assertions,
    check_no_patching,
    check_mirror,
)
