"""How many tokens an image becomes, by family: what each one's processor does, in arithmetic."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageRule:
    """How many tokens an image becomes, and how many patches the vision tower sees of it."""

    family: str
    patch: int
    side: int = 0
    merge: int = 1
    grids: tuple[tuple[int, int], ...] = ()
    least: int = 0
    most: int = 0
    edge: int = 0

    def tokens(self, width: int, height: int) -> int:
        """Tokens of the prompt that stand for an image of so many pixels."""
        match self.family:
            case "llava_next":
                return self._next(width, height)
            case "idefics3" | "smolvlm":
                return self._tiled(width, height)
            case "llava":
                return (self.side // self.patch) ** 2
            case _:
                return self._grid(width, height) // self.merge**2

    def patches(self, width: int, height: int) -> int:
        """Tokens that the vision tower computes."""
        a_tile = (self.side // self.patch) ** 2 if self.side else 0
        match self.family:
            case "llava_next":
                grid_height, grid_width = self._best_grid(width, height)
                tiles = (grid_height // self.side) * (grid_width // self.side)
                return (1 + tiles) * (a_tile + 1)
            case "idefics3" | "smolvlm":
                rows, columns = self._tiles(width, height)
                return (rows * columns + 1) * a_tile
            case "llava":
                return a_tile + 1
            case _:
                return self._grid(width, height)

    def _best_grid(self, width: int, height: int) -> tuple[int, int]:
        """The grid that keeps most of the image's pixels, of these the one that wastes least."""

        def keeps(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - grid[0] * grid[1]

        return max(self.grids, key=keeps)

    def _next(self, width: int, height: int) -> int:
        """The whole image, and its tiles without their padding, a token after each row of them."""
        side = self.side // self.patch
        grid_height, grid_width = self._best_grid(width, height)
        rows, columns = grid_height // self.patch, grid_width // self.patch
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        return side**2 + rows * columns + rows

    def _tiles(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles: the longer edge is scaled to `edge`, both up to a multiple of `side`."""
        if width >= height:
            width, height = self.edge, _even(int(self.edge / (width / height)))
        else:
            width, height = _even(int(self.edge * (width / height))), self.edge
        return math.ceil(height / self.side), math.ceil(width / self.side)

    def _tiled(self, width: int, height: int) -> int:
        """Every tile after two marks, a line break after each row of them; then the whole image."""
        rows, columns = self._tiles(width, height)
        each = (self.side // self.patch) ** 2 // self.merge**2
        return rows * (columns * (each + 2) + 1) + (each + 3)

    def _grid(self, width: int, height: int) -> int:
        """Patches: both edges a multiple of merged patches, the whole between `least` and `most` pixels."""
        unit = self.patch * self.merge
        high, wide = (max(unit, round(edge / unit) * unit) for edge in (height, width))
        if self.most and high * wide > self.most:
            scale = math.sqrt(height * width / self.most)
            high, wide = (max(unit, int(e / scale / unit) * unit) for e in (height, width))
        elif high * wide < self.least:
            scale = math.sqrt(self.least / (height * width))
            high, wide = (math.ceil(e * scale / unit) * unit for e in (height, width))
        return (high // self.patch) * (wide // self.patch)


def _even(edge: int) -> int:
    """As Idefics3's processor: an odd edge is one pixel longer."""
    return edge + edge % 2
