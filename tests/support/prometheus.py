"""Run a real Prometheus that scrapes relays, check rules, and parse expressions.

Knows Prometheus, its configuration and its language; of a relay only its metrics page.
"""

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from tests.support.brokers import free_port
from tests.support.programs import PROMETHEUS, PROMTOOL, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, NO_CA, MetricsPage, RelayProcess, eventually

NAMESPACE = "test"
JOB = "websocket-relay"
OUTSIDE_JOB = "outside"
"""Scrapes the same relays as a Prometheus outside of Kubernetes: without namespace and pod."""

TARGET_LABELS = {"namespace", "job", "pod", "instance"}
"""Labels that Prometheus itself adds to the samples that it scrapes."""

BUILT_IN_METRICS = {"up", "ALERTS"}
"""Metrics of Prometheus itself, which are on no metrics page."""


def promtool(*arguments: str | Path) -> str:
    """Run promtool; return its output.

    Raises:
        AssertionError: it reports an error. The text is its output.
    """
    done = subprocess.run(
        [needed(PROMTOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shorten_waits(rules: Path, directory: Path) -> Path:
    """Write a copy of alert rules that fire after one second; return its path."""
    path = directory / rules.name
    path.write_text(re.sub(r"\bfor: \w+", "for: 1s", rules.read_text()))
    return path


@dataclass(frozen=True, slots=True)
class Selector:
    """A selector of an expression: a metric, and the values that its labels must have."""

    metric: str
    labels: Mapping[str, str]

    def missing_from(self, page: MetricsPage) -> Iterator[str]:
        """Yield the metric and the label values that are not on the metrics page."""
        if self.metric in BUILT_IN_METRICS:
            return
        series = [sample.labels for sample in page.samples if sample.name == self.metric]
        if not series:
            yield self.metric
        for label, values in self.labels.items():
            for value in values.split("|") if label not in TARGET_LABELS else ():
                if all(labels.get(label) != value for labels in series):
                    yield f"{self.metric}{{{label}={value}}}"


SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)\s*=~?\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
RELAY_METRIC = re.compile(r"\b(?:websocket|process|python|http)_\w+")


def selectors(expression: str) -> Sequence[Selector]:
    """Return the selectors of an expression."""
    found = SELECTOR.findall(expression)
    assert not RELAY_METRIC.findall(SELECTOR.sub("", expression)), f"selects all jobs: {expression}"
    return [Selector(metric, dict(MATCHER.findall(labels))) for metric, labels in found]


def groupings(expression: str) -> set[str]:
    """Return the labels by which an expression groups, except those of the target."""
    names = {name.strip() for group in GROUPING.findall(expression) for name in group.split(",")}
    return names - TARGET_LABELS


def missing_series(expressions: Sequence[str], page: MetricsPage) -> set[str]:
    """Return the metrics, labels and label values that are not on the metrics page."""
    missing = set()
    for expression in expressions:
        found = selectors(expression)
        for selector in found:
            missing |= set(selector.missing_from(page))
        names = {selector.metric for selector in found}
        labels = {label for each in page.samples if each.name in names for label in each.labels}
        if not names & BUILT_IN_METRICS:
            missing |= {f"{label} in {expression}" for label in groupings(expression) - labels}
    return missing


class Prometheus:
    """A Prometheus that scrapes relays and evaluates rules, both once a second.

    Args:
        directory: for its files.
        relays: its targets, by the name of their pod.
        rules: a file with rules.
    """

    def __init__(self, directory: Path, relays: Mapping[str, RelayProcess], rules: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._port = free_port()
        self._log = directory / "prometheus.log"
        self._process: subprocess.Popen[bytes] | None = None
        targets = [
            {
                "targets": [f"{HOST}:{relay.metrics_port}"],
                "labels": {"namespace": NAMESPACE, "pod": pod},
            }
            for pod, relay in relays.items()
        ]
        config = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(rules)],
            "scrape_configs": [
                {"job_name": JOB, "static_configs": targets},
                {
                    "job_name": OUTSIDE_JOB,
                    "static_configs": [{"targets": each["targets"]} for each in targets],
                },
            ],
        }
        self._config = directory / "prometheus.yml"
        self._config.write_text(json.dumps(config))

    async def __aenter__(self) -> Self:
        self._launch()
        try:
            await eventually(self._is_ready, "Prometheus is ready")
        except BaseException:
            self._end()
            raise
        return self

    def _launch(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    needed(PROMETHEUS),
                    f"--config.file={self._config}",
                    f"--storage.tsdb.path={self._directory / 'data'}",
                    f"--web.listen-address={HOST}:{self._port}",
                    "--log.level=warn",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()  # its data is not needed
        self._process.wait(PATIENCE_S)

    async def _is_ready(self) -> tuple[bool, object]:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            answer = await self._get("/-/ready")
        except httpx2.TransportError as error:
            return False, error
        return answer.status_code == 200, answer.text

    async def _get(self, path: str, **query: str) -> httpx2.Response:
        async with httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=PATIENCE_S) as http:
            return await http.get(f"http://{HOST}:{self._port}{path}", params=query)

    async def query(self, expression: str) -> Sequence[Mapping[str, Any]]:
        """Return the current result of an expression; a result that is no vector is empty."""
        answer = (await self._get("/api/v1/query", query=expression)).json()
        assert answer["status"] == "success", f"{answer['error']}: {expression}"
        result = answer["data"]["result"]
        return [] if answer["data"]["resultType"] != "vector" else result

    async def await_result(self, expression: str) -> Sequence[Mapping[str, Any]]:
        """Query until the result is not empty, and return it."""
        result: Sequence[Mapping[str, Any]] = []

        async def query_again() -> tuple[bool, object]:
            nonlocal result
            result = await self.query(expression)
            return bool(result), result

        await eventually(query_again, f"a result of {expression}")
        return result

    async def firing_alerts(self) -> Sequence[Mapping[str, Any]]:
        """Return the alerts that fire now."""
        alerts = (await self._get("/api/v1/alerts")).json()["data"]["alerts"]
        return [alert for alert in alerts if alert["state"] == "firing"]
