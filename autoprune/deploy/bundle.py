"""Source of classes and functions together with all that they need from autoprune.

What comes out runs without autoprune: definitions that others rest on stand before
them, and other packages are imported in front.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

OWN = "autoprune"
"""The package whose definitions are copied."""


class Bundle:
    """Definitions for one file, what they need from autoprune before them."""

    def __init__(self) -> None:
        self._imports: dict[str, str] = {}
        self._definitions: dict[str, str] = {}
        self._homes: dict[str, str] = {}

    def add(self, home: str, name: str) -> None:
        """Adds a definition and all that it needs.

        Args:
            home: Full name of the module that holds or imports it.
            name: Class, function or constant there.
        """
        statement, source = _statements(home)[name]
        if isinstance(statement, ast.ImportFrom):
            self._add_import(statement, name)
        elif isinstance(statement, ast.Import):
            self._imports[name] = source
        elif name not in self._homes:
            # First, since a class may name itself.
            self._homes[name] = home
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and node.id in _statements(home):
                    self.add(home, node.id)
            self._definitions[name] = source
        # Two modules may call different things alike; one file can't.
        elif self._homes[name] != home:
            raise ValueError(f"{name} is defined in {home} and {self._homes[name]}")

    def _add_import(self, statement: ast.ImportFrom, name: str) -> None:
        """Adds what a module imports under a name."""
        (alias,) = [a for a in statement.names if (a.asname or a.name) == name]
        module = statement.module or ""
        if module.partition(".")[0] == OWN:
            self.add(module, alias.name)
            return
        renamed = f" as {alias.asname}" if alias.asname else ""
        self._imports[name] = f"from {module} import {alias.name}{renamed}"

    def redefine(self, name: str, source: str) -> None:
        """Gives a definition that was added another source.

        It moves to the end, behind whatever it needs.

        Args:
            name: Its name.
            source: Python.
        """
        del self._definitions[name]
        self._definitions[name] = source

    def import_module(self, name: str) -> None:
        """Adds the import of a module.

        Args:
            name: Of a top-level module.
        """
        self._imports[name] = f"import {name}"

    def import_from(self, home: str, name: str) -> None:
        """Adds the import of a name.

        Args:
            home: Full name of the module that holds it.
            name: The name.
        """
        self._imports[name] = f"from {home} import {name}"

    def text(self) -> str:
        """Imports and definitions as Python; empty without any."""
        imports = "\n".join(sorted(set(self._imports.values())))
        return "\n\n\n".join(filter(None, [imports, *self._definitions.values()]))


@cache
def _statements(home: str) -> dict[str, tuple[ast.stmt, str]]:
    """Name to the statement that gives it its meaning in a module, and its source."""
    spec = importlib.util.find_spec(home)
    assert spec is not None, "a module of autoprune"
    assert spec.origin is not None, "a module of autoprune"
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for statement in ast.parse(text).body:
        first = statement.lineno
        # Decorators stand above the line that a definition begins with.
        for decorator in getattr(statement, "decorator_list", ()):
            first = min(first, decorator.lineno)
        source = "\n".join(lines[first - 1 : statement.end_lineno])
        for name in _names(statement):
            found[name] = (statement, source)
    return found


def _names(statement: ast.stmt) -> list[str]:
    """The names that a statement at a module's top gives a meaning to."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        # Of `import a.b` the code knows `a`.
        return [a.asname or a.name.partition(".")[0] for a in statement.names]
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]
