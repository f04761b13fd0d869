"""`ldae report`: one page that says how a run is, with its curves, pictures, failures, recipe and machines.

The page asks nobody for anything: styles, script and pictures are in it, and its security policy forbids the rest. All
that comes out of the run's folder is escaped; the folder is only read.
"""

import base64
import io
from hashlib import sha256
from pathlib import Path
from string import Template

from PIL import Image

from .curves import curve_svg
from .html_text import duration, figure, moment, text
from .report_records import checkpoints_section, ended, failures, recipe_section, sessions_section
from .run_record import RunRecord, number, read_run


TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("report.html", "report.js"))
FIRST = ("loss", "gradient_norm", "learning_rate")
LAST = ("images_per_second", "data_wait", "tflops_per_second", "mfu", "bad_images")
FROM_ZERO = {"learning_rate", *LAST}
MAX_CURVES = 40
MAX_PICTURES = 6
MAX_PICTURE_BYTES, MAX_PICTURE_WIDTH = 400_000, 1600  # a larger one is put into the page as a JPEG


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run, finished or not.

    Args:
        folder: the `--output-dir` of a pre-training or of a tokenizer's training.
        output: the page's file; default `report.html` in the folder.

    Returns:
        The file.

    Raises:
        ValueError: the folder holds no run, or one that has reported nothing yet.
    """
    record = read_run(folder)
    output = Path(folder) / "report.html" if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.writing")
    aside.write_text(report_html(record), encoding="utf-8")
    aside.replace(output)
    return output


def report_html(record: RunRecord) -> str:
    """The page."""
    sections = [
        ("figures", "Key figures", key_figures),
        ("curves", "Curves", curves),
        ("pictures", "Pictures", pictures),
        ("failures", "Failures", failures),
        ("recipe", "Recipe", recipe_section),
        ("sessions", "Sessions and machines", sessions_section),
        ("checkpoints", "Checkpoints on disk", checkpoints_section),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    script = SCRIPT.read_text(encoding="utf-8")
    script_hash = base64.b64encode(sha256(script.encode()).digest()).decode()
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'",
        title=f"{text(name_of(record))} · {text(record.folder.resolve().name)}",
        header=header(record) + f"<nav>{links}</nav>",
        sections="\n".join(
            f'<section id="{anchor}">\n<h2>{title}</h2>\n{write(record)}\n</section>'
            for anchor, title, write in sections
        ),
        script=script,
    )


def name_of(record: RunRecord) -> str:
    recipe = record.recipe
    tier = [f"(tier {recipe['tier']})"] if recipe.get("tier") else []
    overrides = recipe.get("overrides")
    parts = [str(recipe.get("name", "a run")), *tier, *map(str, overrides if isinstance(overrides, list) else [])]
    return " ".join(parts) + (", its tokenizer" if record.trains_tokenizer else "")


# ---- what the page shows, in the order in which somebody asks who comes back after a weekend


def header(record: RunRecord) -> str:
    status, total, pace = record.status(), record.total_steps, record.seconds_per_step
    facts = []
    if total:
        facts.append(f"step {record.step:,} of {total:,} ({record.step / total:.1%})")
    if record.last_sign is not None:
        age = duration(record.now - record.last_sign)
        facts.append(f"last line {moment(record.last_sign)}, {age} before this page")
    if total and pace and record.step < total:
        left = duration((total - record.step) * pace)
        at = f", about {moment(record.now + (total - record.step) * pace)}" if status.word == "running" else ""
        facts.append(f"{left} of training left at the last pace{at}")
    bar = f'<progress max="{total}" value="{min(record.step, total)}"></progress>' if total else ""
    word, _, rest = status.sentence.partition(" ")
    torn = [f"{count} line{'s' * (count > 1)} of {name} could not be read" for name, count in record.torn.items()]
    return (
        f"<h1>{text(name_of(record))}</h1>\n"
        f'<p class="soft">{text(record.recipe.get("why", ""))} <code>{text(record.folder.resolve())}</code></p>\n'
        f'<div class="status {status.word}"><p><b>{text(word)}</b> {text(rest)}</p>{bar}'
        f"<p>{text(' · '.join(facts))}</p></div>\n"
        f'<p class="soft">This page was written {moment(record.now)}. {text("; ".join(torn))}</p>\n'
    )


def key_figures(record: RunRecord) -> str:
    cards = []

    def card(title: str, value: str, note: str = "") -> None:
        cards.append(f"<div><span>{text(title)}</span><strong>{text(value)}</strong><span>{text(note)}</span></div>")

    def series(name: str) -> list[tuple[float, float]]:
        return [(line["step"], value) for line in record.metrics if (value := number(line.get(name))) is not None]

    if losses := series("loss"):
        step, lowest = min(losses, key=lambda point: point[1])
        card("loss now", f"{losses[-1][1]:.4g}", f"lowest {lowest:.4g} at step {step:,}")
    names = {name for line in record.metrics if "learning_rate" not in line for name in line if "top1" in name}
    for name in sorted(names):
        if values := series(name):
            step, best = max(values, key=lambda point: point[1])
            card(f"best {name.replace('_', ' ')}", f"{best:.1f} %", f"at step {step:,}; last {values[-1][1]:.1f} %")
    rate, wait = record.recent("images_per_second"), record.recent("data_wait")
    if rate is not None:
        card("images/s", figure(rate), "median of the last lines")
    flops, mfu = record.recent("tflops_per_second"), record.recent("mfu")
    if mfu is not None:
        card("MFU", f"{mfu:.1%}", "of the device's peak" + (f", {figure(flops)} TFLOP/s" if flops is not None else ""))
    elif flops is not None:
        card("TFLOP/s", figure(flops), "in the model's matrix products")
    if wait is not None:
        card("waiting for data", f"{wait:.1%}", "of the time, median of the last lines")
    bad = max([len(record.bad_images), *(int(value) for _, value in series("bad_images")[-1:])])
    card("bad images", f"{bad:,}", "replaced by others" if bad else "")
    if seconds := record.trained_seconds():
        starts = len(record.sessions)
        card("time trained", duration(seconds), f"in {starts} session{'s' * (starts > 1)}" if starts else "")
    return f'<div class="figures">{"".join(cards)}</div>'


def curves(record: RunRecord) -> str:
    names = dict.fromkeys(name for line in record.metrics for name in line if name not in ("step", "epoch", "time"))
    middle = [name for name in names if name not in FIRST + LAST]
    figures, per_epoch = [], record.steps_per_epoch
    last_step = max((line["step"] for line in record.metrics), default=0)
    marks = []
    for before, session in zip(record.sessions, record.sessions[1:], strict=False):
        step, how = number(session.start.get("step")), ended(before, False, "")
        if step is not None:
            kind = "failed" if how in ("killed", "error") else ""
            marks.append((step, kind, f"the session before ended by: {how}; this one went on from step {step:,.0f}"))
    for name in [*FIRST, *middle, *LAST]:
        points = [(line["step"], number(line[name])) for line in record.metrics if name in line]
        if not any(value for _, value in points):  # words and zeros are no curve
            continue
        gaps = sum(value is None for _, value in points)
        title = text(name.replace("_", " ") + (f" ({gaps} not finite)" if gaps else ""))
        svg = curve_svg(name, points, last_step, per_epoch, marks, name in FROM_ZERO)
        figures.append(f"<figure><figcaption><b>{title}</b><output></output></figcaption>{svg}</figure>")
    if not figures:
        return "<p>No step has been reported yet.</p>"
    legend = "Dashed lines: a new session began, red where the one before was killed or failed. " if marks else ""
    legend += f"The first {MAX_CURVES} of {len(figures)} numbers." if len(figures) > MAX_CURVES else ""
    return f'<p class="soft">{legend}</p><div class="curves">{"".join(figures[:MAX_CURVES])}</div>'


def data_uri(file: Path) -> str:
    """A picture as part of the page.

    Raises:
        OSError: it is no picture, or not all of it is there yet.
    """
    data = file.read_bytes()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        if len(data) > MAX_PICTURE_BYTES:
            image = image.convert("RGB")
            image.thumbnail((MAX_PICTURE_WIDTH, 4 * MAX_PICTURE_WIDTH))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=85)
            return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def pictures(record: RunRecord) -> str:
    steps = list(record.pictures)
    if not steps:
        return "<p>There are none.</p>"
    last = len(steps) - 1
    chosen = sorted({round(place * last / (MAX_PICTURES - 1)) for place in range(MAX_PICTURES)})
    figures = []
    for step in (steps[place] for place in chosen):
        epoch = f"epoch {step / record.steps_per_epoch:.3g}" if record.steps_per_epoch else ""
        try:
            shown = f'<img alt="pictures of step {step}" src="{data_uri(record.pictures[step])}">'
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            shown = f"<p>{text(record.pictures[step].name)} cannot be read: {text(error)}</p>"
        figures.append(f"<figure><figcaption><b>step {step:,}</b>{epoch}</figcaption>{shown}</figure>")
    legend = (
        "Above the same images of the data set, below what the tokenizer makes of them."
        if record.trains_tokenizer
        else "The same images of the data set, with the same noise: as they are, then for each level of noise "
        "(σ / γ in the latents) what the model is shown and what it restores."
    )
    return f'<p class="soft">{legend}</p><div class="pictures">{"".join(figures)}</div>'
