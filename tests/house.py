"""The house as its imports show it: modules, rooms, floors, circles. `python tests/house.py` counts them.

A room is a folder or a file directly in `mspc/`, or the package `exporters`. An arrow is an import from one room in
another. A floor is the length of the longest chain of arrows below a room. Arrows between rooms of one circle run up,
as the rooms of a circle cannot stand in an order; a circle counts as one for the floors.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

ROOMS = (
    "mspc.version", "mspc.errors", "mspc.encoding", "mspc.sizes", "mspc.types", "mspc.cgroups", "mspc.ranks",
    "mspc.memory", "mspc.threads",
    "mspc.progress", "mspc.goals", "mspc.settings", "mspc.recipe", "mspc.text", "mspc.numerics", "mspc.formats",
    "mspc.storage", "mspc.model", "mspc.passes",
    "mspc.published", "mspc.solvers", "mspc.planning", "mspc.pipeline",
    "mspc.kernels", "mspc.runtime", "mspc.hf", "mspc.serving", "mspc.vllm",
    "exporters", "mspc.api", "mspc.pages", "mspc.publish", "mspc.bench",
    "mspc", "mspc.cli", "mspc.__main__",
)  # fmt: skip
"""From the lowest to the highest: a room imports only from itself and from rooms before it."""


class House:
    """The modules of `mspc/` and `exporters/` in a checkout, by dotted name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = sorted([*root.glob("mspc/**/*.py"), *root.glob("exporters/**/*.py")])
        self.files = {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
        self.rooms = sorted({self.room_of(module) for module in self.files})

    @cache  # noqa: B019  a house lives as long as the process
    def tree(self, module: str) -> ast.Module:
        return ast.parse(self.files[module].read_text(encoding="utf-8"))

    def imported(self, module: str) -> Iterator[str]:
        """Dotted names that a module imports anywhere: `from a import b` is a.b when that is a module, else a."""
        for part in ast.walk(self.tree(module)):
            if isinstance(part, ast.Import):
                yield from (alias.name for alias in part.names)
            elif isinstance(part, ast.ImportFrom):
                assert part.level == 0, f"{module}: imports are absolute"
                for alias in part.names:
                    full = f"{part.module}.{alias.name}"
                    yield full if full in self.files else str(part.module)

    def ours(self, module: str) -> set[str]:
        return {name for name in self.imported(module) if name in self.files} - {module}

    def room_of(self, module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[: 2 if parts[0] == "mspc" else 1])

    def arrows(self) -> dict[str, set[str]]:
        """The other rooms that each room imports from."""
        found: dict[str, set[str]] = {room: set() for room in self.rooms}
        for module in self.files:
            found[self.room_of(module)] |= {self.room_of(name) for name in self.ours(module)}
        return {room: others - {room} for room, others in found.items()}

    def floors(self) -> dict[str, int]:
        arrows, circle_of = self.arrows(), {}
        for circle in circles(arrows):
            circle_of |= dict.fromkeys(circle, circle)

        @cache
        def floor(circle: frozenset[str]) -> int:
            below = {circle_of[other] for room in circle for other in arrows[room]} - {circle}
            return 1 + max(map(floor, below), default=0)

        return {room: floor(circle_of[room]) for room in self.rooms}

    def up(self) -> list[tuple[str, str]]:
        """The arrows that run up."""
        circle_of = {room: circle for circle in circles(self.arrows()) for room in circle}
        return [(a, b) for a, others in self.arrows().items() for b in sorted(others) if circle_of[a] == circle_of[b]]


def circles(arrows: dict[str, set[str]]) -> list[frozenset[str]]:
    """The strongly connected components: each name in a set leads to all the others."""

    def reached(start: str) -> set[str]:
        seen, left = {start}, [start]
        while left:
            for other in arrows[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        return seen

    to = {name: reached(name) for name in arrows}
    return sorted({frozenset(other for other in to[name] if name in to[other]) for name in arrows}, key=sorted)


def main() -> None:
    house = House(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in house.files.values())
    arrows, floors = house.arrows(), house.floors()
    modules = {module: house.ours(module) for module in house.files}
    in_circles = [circle for circle in circles(modules) if len(circle) > 1]
    print(f"{len(house.files)} modules, {lines} lines, {len(house.rooms)} rooms, {max(floors.values())} floors")
    print(f"{sum(map(len, arrows.values()))} arrows between rooms, {len(house.up())} of them up")
    print(f"{len(in_circles)} circles of modules, {sum(len(c) > 1 for c in circles(arrows))} of rooms")
    for room in sorted(house.rooms, key=lambda room: (-floors[room], room)):
        print(f"  floor {floors[room]:2}  {room}")
    for circle in in_circles:
        print("  circle:", ", ".join(sorted(circle)))


if __name__ == "__main__":
    main()
