"""The report as one HTML file that opens without a network: plots are inside it, and it runs no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import percentile_key
from .goals import METRICS
from .results import LoadResults, RunResults, write_whole
from .text_report import TITLES, report

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
img { width: 100% } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.met { color: #00714f } .missed { color: #b33c00; font-weight: bold }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if run.invalid %}<p class="missed">Invalid: {{ run.invalid }}. These figures describe the client, not the
service.</p>
{% endif %}{% if run.stationary == false %}<p class="missed">The queue was still growing when the run ended: latencies
say how long the run was, not what the service gives at this rate.</p>
{% endif %}{% if run.goals %}<h2>Goals</h2>
<table><tr><th>goal</th><th>measured</th><th>wanted at most</th><th></th></tr>
{% for goal in run.goals %}<tr><td>{{ goal.name }}</td><td>{{ goal.shown }}</td><td>{{ goal.wanted }}</td>
<td class="{{ 'met' if goal.met else 'missed' }}">{{ 'met' if goal.met else 'missed' }}</td></tr>
{% endfor %}</table>
{% endif %}{% if search %}<h2>Search for the highest rate</h2>
<p>{{ search.shown }}</p>
<table><tr><th>requests a second</th><th>verdict</th></tr>
{% for trial in search.trials %}<tr><td>{{ '%.4g' | format(trial.rate) }}</td>
<td class="{{ 'met' if trial.shown == 'met' else 'missed' }}">{{ trial.shown }}</td></tr>
{% endfor %}</table>
{% endif %}<h2>Latencies in ms</h2>
<table><tr><th></th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, values in latencies.items() %}<tr><td>{{ name }}</td>
{% for value in values %}<td>{{ '%.1f' | format(value) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for name, data in images.items() %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/svg+xml;base64,{{ data }}">
{% endfor %}<h2>All figures</h2>
<pre>{{ text }}</pre>
<h2>Settings</h2>
<table>{% for name, value in settings.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</body>
</html>
"""


def write_html(path: Path, results: LoadResults) -> None:
    """Write the report of the results' last run.

    Raises:
        InvalidRequest: the file cannot be written.
    """
    write_whole(path, page(results), "--html")


def page(results: LoadResults) -> str:
    """The report as text."""
    from jinja2 import Environment

    run = results.last
    percents = _percents(run)
    images = {}
    if run.requests:
        from .plots import plots

        images = {name: base64.b64encode(svg.encode()).decode() for name, svg in plots(run).items()}
    # whatever came from outside, such as a model's name, is text and never markup
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        title=f"Load test of {results.settings.get('service', {}).get('model', 'a service')}: {_rate(run.rate)}",
        run=run,
        search=results.search,
        columns=["mean", "median", *(f"P{percent:g}" for percent in percents)],
        latencies=_latencies(run, percents),
        images=images,
        text=report(run),
        settings=_flat(results.settings | {"environment": results.environment}),
    )


def _rate(text: str) -> str:
    """A rate as the results name it, with its unit where it is a number."""
    is_number = text.replace(".", "", 1).replace("e+", "", 1).isdigit()
    return f"{text} requests a second" if is_number else {"inf": "all requests at once"}.get(text, text)


def _percents(run: RunResults) -> list[float]:
    names = [key for key in run.figures if key.startswith("p") and key.endswith("_ttft_ms")]
    return [float(name[1:].split("_")[0]) for name in names]


def _latencies(run: RunResults, percents: list[float]) -> dict[str, list[float]]:
    return {
        TITLES[metric]: [
            run.figures[key]
            for key in (f"mean_{metric}_ms", f"median_{metric}_ms", *(percentile_key(p, metric) for p in percents))
        ]
        for metric in METRICS
        if f"mean_{metric}_ms" in run.figures
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dots between their names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value not in (None, "", [], ()):
            found[f"{prefix}{name}"] = value
    return found
