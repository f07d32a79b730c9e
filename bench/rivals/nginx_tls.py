"""nginx that ends TLS in front of a relay, both on the same core. Ends both with itself.

usage: python nginx_tls.py PORT METRICS_PORT CERT KEY
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 65535;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 32768; multi_accept on; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl backlog=4096;
        ssl_certificate {cert};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
        location / {{
            proxy_pass http://127.0.0.1:{relay_port};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
            proxy_read_timeout 1h;
        }}
    }}
}}
"""


def main() -> None:
    """Start both; wait for the signal that ends them."""
    port, metrics_port, cert, key = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "nginx.conf")
        with socket.create_server(("127.0.0.1", 0)) as free:
            relay_port = free.getsockname()[1]
        values = {"folder": folder, "port": port, "relay_port": relay_port}
        config.write_text(CONFIG.format(**values, cert=cert, key=key))
        config_file = Path(__file__).resolve().parent.parent / "relay.yaml"
        settings = {
            "RELAY__SERVER__PORT": str(relay_port),
            "RELAY__METRICS__PORT": metrics_port,
        }
        relay = subprocess.Popen(
            [sys.executable, "-m", "websocket_relay", "--config-file", str(config_file)],
            env=os.environ | settings,
        )
        nginx = subprocess.Popen(
            [shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(config), "-p", folder]
        )
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        nginx.terminate()
        relay.terminate()
        nginx.wait()
        relay.wait()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
