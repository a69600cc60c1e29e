"""Numbers as a person reads them: a true minus sign, three decimals, ± half of the 95 % interval."""

from loralab.evals.stats import Score
from loralab.report.measures import half_width

NOTHING = "–"


def number(value: float | None, decimals: int = 3, *, signed: bool = False) -> str:
    """Write a number; what rounds to zero has no sign."""
    if value is None:
        return NOTHING
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def measured(score: Score | None, *, signed: bool = False) -> str:
    """Write a score with ± half of its 95 % interval, where it has one."""
    if score is None:
        return NOTHING
    half = half_width(score)
    return number(score.value, signed=signed) + (
        "" if half is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(half)}"
    )


def share(value: float | None) -> str:
    """Write a share as a percentage with two significant digits below one percent."""
    if value is None:
        return NOTHING
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 99.95 else f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %"


def whole(value: float | None) -> str:
    """Write a count with thin spaces between thousands."""
    return NOTHING if value is None else f"{value:,.0f}".replace(",", "\u202f")


def duration(seconds: float | None) -> str:
    """Write a time in seconds; minutes are added from two on."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def joined(words: list[str], last: str = "and") -> str:
    """Join words as a sentence does; from the fifth on they are counted."""
    if len(words) > 4:
        words = [*words[:3], f"{len(words) - 3} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
