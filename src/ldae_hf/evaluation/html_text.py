"""What every part of a page is made of: text that is no markup, times, tables."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from .run_record import number


def text(value) -> str:
    """Anything as text of a page: nothing in it is markup, and what no file can hold becomes a question mark."""
    return escape("–" if value is None else str(value).encode("utf-8", "replace").decode())


def figure(value: float) -> str:
    """A number for people: 0.0488, 405.9, 6,412."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """45 s, 3 min, 29 h 5 min, 3 d 4 h."""
    if seconds < 90:
        return f"{max(0, seconds):.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24:,} d {hours % 24} h"


def moment(value) -> str:
    """A time of a line, in UTC."""
    try:
        return datetime.fromtimestamp(number(value), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; each carries its column's title, for screens that are too narrow for a table."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    lines = (
        "".join(f'<td data-title="{title}">{cell}</td>' for title, cell in zip(head, row, strict=True)) for row in rows
    )
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="table"><table><thead><tr>{titles}</tr></thead><tbody>\n{body}</tbody></table></div>'
