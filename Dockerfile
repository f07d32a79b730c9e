# The relay in a container: no compiler, no pip, no root. It writes nothing, so the root file system
# may be read-only, and it can do without every capability. Settings come from the environment
# (RELAY__SERVER__PORT is server.port), or from a file mounted as /etc/websocket-relay/config.yaml.

ARG BASE=python:3.13-slim

FROM ${BASE} AS build
ENV PIP_QUIET=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# What builds the package stays behind in this stage; so does pip.
COPY requirements/build.lock requirements/run.lock requirements/
RUN python -m pip install --require-hashes -r requirements/build.lock \
    && python -m venv --without-pip /opt/websocket-relay \
    && python -m pip --python /opt/websocket-relay install --only-binary=:all: \
        --require-hashes -r requirements/run.lock
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY service service
RUN python -m pip wheel --no-build-isolation --no-deps --no-index --wheel-dir . . \
    && python -m pip --python /opt/websocket-relay install --no-deps --no-index ./*.whl

FROM ${BASE}
COPY --from=build /opt/websocket-relay /opt/websocket-relay
ENV PATH=/opt/websocket-relay/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /etc/websocket-relay
USER 10001:10001
EXPOSE 8443 9090
# Whether the event loop turns, and no more: a relay that drains, or that waits for its broker, is
# not to be restarted for that. /readyz says whether clients are welcome.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["python", "-c", "import http.client, os; relay = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('RELAY__METRICS__PORT', '9090')), timeout=4); relay.request('GET', '/healthz'); raise SystemExit(relay.getresponse().status != 200)"]
ENTRYPOINT ["websocket-relay"]
