# The relay in a container: no compiler, no pip, no root, and nothing that it would have to write. So
# the root file system may be read-only, and every capability dropped. Settings come from the
# environment (RELAY__SERVER__PORT is server.port) or from /etc/websocket-relay/config.yaml, where
# cert.pem and key.pem are looked for, too.

ARG BASE=python:3.13-slim

# The dependencies: made anew when their versions change, not with each change of the service.
FROM ${BASE} AS dependencies
ENV PIP_QUIET=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# otel.lock is run.lock and what traces need, which is loaded only where a collector is named.
COPY requirements/otel.lock requirements/
RUN python -m venv --without-pip /opt/websocket-relay \
    && python -m pip --python /opt/websocket-relay install --only-binary=:all: \
        --require-hashes -r requirements/otel.lock

# The service, in a directory of its own, and so in a layer of its own.
FROM dependencies AS service
COPY requirements/build.lock requirements/
RUN python -m pip install --require-hashes -r requirements/build.lock
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY service service
RUN python -m pip wheel --no-build-isolation --no-deps --no-index --wheel-dir . . \
    && python -m pip --python /opt/websocket-relay install --no-deps --no-index \
        --prefix /service ./*.whl

FROM ${BASE}
# Nobody installs anything here. What brings pip back (ensurepip) goes, too.
RUN python -m pip uninstall --yes --quiet --root-user-action=ignore pip \
    && rm -rf "$(python -c 'import ensurepip; print(*ensurepip.__path__)')"
WORKDIR /etc/websocket-relay
COPY --from=dependencies /opt/websocket-relay /opt/websocket-relay
# The last layer, and the only one that a change of the service makes anew.
COPY --from=service /service /opt/websocket-relay
ENV PATH=/opt/websocket-relay/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8443 9090
# Whether the event loop turns, and no more: a relay that drains, or that waits for its broker, is
# not to be restarted for that. /readyz says whether clients are welcome.
HEALTHCHECK --interval=30s --timeout=10s --start-period=15s CMD ["websocket-relay", "healthcheck"]
# The relay is process 1, and has no children. The kernel discards a signal that process 1 has no handler
# for, but keeps one that is blocked: the relay takes it as soon as its interpreter runs.
ENTRYPOINT ["env", "--block-signal=TERM,INT,QUIT,HUP,USR1,USR2", "websocket-relay"]
LABEL org.opencontainers.image.title="websocket-relay" \
      org.opencontainers.image.description="What one client sends, every client of its channel receives" \
      org.opencontainers.image.licenses="Apache-2.0"
