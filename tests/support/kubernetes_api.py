"""Serve objects as the API of a Kubernetes cluster does, for the `lookup` of Helm.

Knows discovery and GET, and nothing of what a cluster makes of its objects.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from tests.support.helm import NEWEST, KubernetesObject

IRREGULAR = {"NetworkPolicy": "networkpolicies"}


@contextmanager
def cluster_with(
    documents: Iterable[KubernetesObject], known: Iterable[KubernetesObject]
) -> Iterator[str]:
    """Serve a cluster; yield the URL of its API.

    Args:
        documents: what is in the cluster.
        known: objects whose kinds the cluster knows.
    """
    answers = _discovery({(each["apiVersion"], each["kind"]) for each in known})
    answers |= {_path(each): each for each in documents}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            missing = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            self.wfile.write(json.dumps(answer or missing).encode())

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _plural(kind: str) -> str:
    return IRREGULAR.get(kind, f"{kind.lower()}s")


def _root(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def _path(document: KubernetesObject) -> str:
    metadata = document["metadata"]
    place = f"namespaces/{metadata['namespace']}/{_plural(document['kind'])}/{metadata['name']}"
    return f"{_root(document['apiVersion'])}/{place}"


def _discovery(kinds: set[tuple[str, str]]) -> dict[str, Any]:
    """Return the answers that name the kinds of a cluster, by path."""
    resources = defaultdict(list)
    for api_version, kind in kinds:
        resource = {"name": _plural(kind), "kind": kind, "namespaced": True, "verbs": ["get"]}
        resources[api_version].append(resource)
    groups = []
    for group, _, version in (each.partition("/") for each in resources if "/" in each):
        named = {"groupVersion": f"{group}/{version}", "version": version}
        groups.append({"name": group, "versions": [named], "preferredVersion": named})
    answers: dict[str, Any] = {
        "/version": {"major": "1", "minor": NEWEST.partition(".")[2], "gitVersion": f"v{NEWEST}.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "groups": groups},
    }
    for api_version, found in resources.items():
        listed = {"kind": "APIResourceList", "groupVersion": api_version, "resources": found}
        answers[_root(api_version)] = listed
    return answers
