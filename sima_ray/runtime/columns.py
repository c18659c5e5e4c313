"""Plain columns, as `kubectl` and `gh` write them: read by people, cut and grepped by scripts."""

from collections.abc import Sequence

GAP = "  "


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Rows below a header, each column as wide as its widest cell.

    Args:
        header: A name for each column.
        rows: As many cells each.
        right: Names, separated by blanks, of the columns whose cells are flush right (numbers).
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    flush = [str.rjust if name in right.split() else str.ljust for name in header]
    return "\n".join(
        GAP.join(
            put(cell, width) for put, cell, width in zip(flush, row, widths, strict=True)
        ).rstrip()
        for row in (header, *rows)
    )
