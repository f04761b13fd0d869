"""The parts of a run's page that list what was noted: failures, recipe, sessions, checkpoints."""

import json

from ..recipes.display import show_text
from ..recipes.recipe import Recipe
from .html_text import moment, table, text
from .run_record import RunRecord, Session


MAX_BAD_IMAGES = 50


def ended(session: Session, is_last: bool, status: str) -> str:
    """How a session ended, in a few words."""
    if session.end is not None:
        return str(session.end.get("reason"))
    return {"running": "running", "finished": "–"}.get(status, "silent") if is_last else "killed"


def failures(record: RunRecord) -> str:
    parts = []
    for failure in record.failures:
        facts = [f"{name} {failure[name]}" for name in ("loss", "gradient_norm", "seed") if name in failure]
        samples = failure.get("sample_ids")
        facts += [f"{len(samples)} samples"] if isinstance(samples, list) else []
        parts.append(
            f"<p><b>Step {text(failure.get('step'))}: {text(failure.get('reason'))}</b> "
            f'<span class="soft">{text(" · ".join(facts))}</span></p>'
            f"<p>To see it again: <code>{text(failure.get('command'))}</code></p>"
        )
    status, killed = record.status().word, []
    for place, session in enumerate(record.sessions, start=1):
        how, end = ended(session, place == len(record.sessions), status), session.end or {}
        if how == "error":
            detail = text(end.get("detail"))
            parts.append(f"<p><b>Session {place} ended at step {text(end.get('step'))} by an error.</b> {detail}</p>")
        elif how in ("killed", "silent"):
            killed.append(f"{place} (from step {text(session.start.get('step'))})")
    if killed:
        parts.append(f"<p><b>Ended without a word, killed most likely:</b> session {', '.join(killed)}.</p>")
    for name, _, _ in record.checkpoints:
        if name.endswith(".damaged"):
            parts.append(f"<p><b>{text(name)}</b> was found damaged when the run went on, and set aside.</p>")
    if record.bad_images:
        rows = [[text(row.get(key)) for key in ("index", "path", "reason")] for row in record.bad_images]
        shown = table(("index", "path", "reason"), rows[:MAX_BAD_IMAGES])
        more = f", the first {MAX_BAD_IMAGES}" if len(rows) > MAX_BAD_IMAGES else ""
        parts.append(f"<details><summary>{len(rows):,} images could not be read{more}</summary>{shown}</details>")
    return "\n".join(parts) or "<p>None: no failure, no killed session, no damaged checkpoint, no bad image.</p>"


def recipe_section(record: RunRecord) -> str:
    if not record.recipe:
        return "<p>run.json is not there or cannot be read.</p>"
    try:
        recipe = Recipe(**record.recipe)
        resolved, title = show_text(recipe), recipe.title
        changes = {origin: [] for origin in [*recipe.steps, *recipe.origins.values()]}
        for key, origin in recipe.origins.items():
            section, _, short = key.partition(".")
            changes[origin].append(f"<code>{text(f'{key}={getattr(recipe, section)[short]}')}</code>")
    except (AttributeError, LookupError, TypeError, ValueError):  # another version's recipe, or none at all
        pretty = json.dumps(record.recipe, indent=2, ensure_ascii=False)
        return f"<p>This version does not know all of it; as it stands in run.json:</p><pre>{text(pretty)}</pre>"
    rows = [(text(origin), " · ".join(values)) for origin, values in changes.items() if values]
    return (
        f"<p>The path: {text(' › '.join(recipe.steps))}.</p>"
        '<p class="soft">What differs from the first recipe, with who set it last:</p>'
        f"{table(('set by', 'values'), rows)}"
        f"<details><summary>Every value of {text(title)}</summary><pre>{text(resolved)}</pre></details>"
    )


def when(event: dict) -> str:
    return f"{moment(event.get('time'))}, step {text(event.get('step'))}" if event else "–"


def sessions_section(record: RunRecord) -> str:
    if not record.sessions:
        return "<p>This run was made before sessions were noted.</p>"
    own, rows, status = ("event", "time", "step", "command", "commit", "total_steps"), [], record.status().word
    for place, session in enumerate(record.sessions, start=1):
        start, end = session.start, session.end or {}
        facts = []
        for name, value in start.items():
            if isinstance(value, dict):
                facts += [f"{key} {item}" for key, item in value.items() if item is not None]
            elif name not in own and value is not None:
                facts.append(f"{name.replace('_', ' ')} {value}")
        commit = f"commit {text(start['commit'])} · " if start.get("commit") else ""
        rows.append(
            (
                str(place),
                when(start),
                when(end),
                text(ended(session, place == len(record.sessions), status)),
                f"<code>{text(start.get('command'))}</code><br>"
                f'<span class="soft">{commit}{text(" · ".join(facts))}</span>',
            )
        )
    return table(("session", "began", "ended", "by", "command and machine"), rows)


def checkpoints_section(record: RunRecord) -> str:
    if not record.checkpoints:
        return "<p>There are none.</p>"
    rows = [
        (f"<code>{text(name)}</code>", f"{size / 1e6:,.1f} MB", moment(changed))
        for name, size, changed in record.checkpoints
    ]
    return table(("checkpoint", "size", "written"), rows)
