"""A load tester of others' against the HTTP API, as a check that it works unmodified.

    sh scripts/setup_peers.sh
    python -P -m kvsluice.benchmarks.peer_guidellm --json benchmarks/results/peer_guidellm.json

guidellm has pins of its own, and so an environment of its own. It sends texts of a file, streams the answers and counts
their tokens as they come.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evals.report import ROOT, write_results
from ..evals.service_process import running_service

GUIDELLM = ROOT / ".venv-peers" / "bin" / "guidellm"
WORDS = "The lighthouse keeper wrote down every ship that passed, its flag, its course and the hour of day."
ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
LIMIT_S = 540


def run_guidellm(url: str, endpoint: str, num_requests: int, streams: int, folder: Path) -> dict[str, Any]:
    """Run it once.

    Args:
        url: of the service, without `/v1`.
        endpoint: a key of `ENDPOINTS`.

    Returns:
        its command and what its report says.

    Raises:
        CalledProcessError: it failed. TimeoutExpired: it did not end.
    """
    data, report = folder / "prompts.jsonl", folder / f"{endpoint}.json"
    prompts = [{"prompt": f"{WORDS} Entry {i} begins:", "output_tokens_count": 24} for i in range(num_requests)]
    data.write_text("".join(json.dumps(one) + "\n" for one in prompts))
    command = [str(GUIDELLM), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url},request_format={ENDPOINTS[endpoint]}"]
    command += ["--profile", f"kind=concurrent,streams={streams}"]
    command += ["--constraint", f"kind=max_requests,count={num_requests}"]
    command += ["--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={report}"]
    subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True, text=True)  # noqa: S603 - fixed above
    shown = [part.replace(str(folder), "FOLDER").replace(str(ROOT), ".").replace(url, "URL") for part in command]
    return {"command": " ".join(shown), "endpoint": ENDPOINTS[endpoint], **summary(json.loads(report.read_text()))}


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """What became of the requests, and guidellm's own figures of those that were served."""
    metrics = report["benchmarks"][0]["metrics"]

    def of_served(name: str) -> dict[str, float]:
        served = metrics[name]["successful"]
        return {"mean": served["mean"], "median": served["median"], "p95": served["percentiles"]["p95"]}

    names = (
        "prompt_token_count",
        "output_token_count",
        "request_latency",
        "time_to_first_token_ms",
        "inter_token_latency_ms",
        "output_tokens_per_second",
    )
    return {"requests": metrics["request_totals"], **{name: of_served(name) for name in names}}


def main() -> int:
    """The command. Returns 1 where a request was not served."""
    parser = argparse.ArgumentParser(prog="peer_guidellm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="at each endpoint")
    parser.add_argument("--streams", type=int, default=4, metavar="N", help="at once")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if not GUIDELLM.exists():
        print("peer_guidellm: there is no .venv-peers; run sh scripts/setup_peers.sh", file=sys.stderr)
        return 1
    named = subprocess.run([str(GUIDELLM), "--version"], capture_output=True, text=True, check=True)  # noqa: S603
    runs = []
    with tempfile.TemporaryDirectory() as folder, running_service() as service:
        for endpoint in ENDPOINTS:
            url = service.http_url.removesuffix("/v1")
            runs.append(run_guidellm(url, endpoint, given.requests, given.streams, Path(folder)))
            print(f"{endpoint}: {runs[-1]['requests']}", flush=True)
    if given.json is not None:
        write_results(given.json, {"peer": named.stdout.strip(), "runs": runs})
    return 1 if any(run["requests"]["successful"] != given.requests for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
