"""Publishing with the HTTP client of the JDK, which offers an upgrade to HTTP/2 with each POST."""

import asyncio
import subprocess
from pathlib import Path

from tests.support.example_nginx import ExampleNginx
from tests.support.programs import JDK, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import RelayProcess, path_of, receive_many

PUBLISH = """
import java.net.URI;
import java.net.http.*;

class Publish {
    public static void main(String[] urls) throws Exception {
        var http = HttpClient.newHttpClient();
        for (String url : urls) {
            var body = HttpRequest.BodyPublishers.ofString("hello");
            var post = HttpRequest.newBuilder(URI.create(url))
                .header("Content-Type", "text/plain").POST(body).build();
            System.out.println(http.send(post, HttpResponse.BodyHandlers.ofString()).statusCode());
        }
    }
}
"""


async def test_the_jdks_client_publishes_to_a_relay_and_through_nginx(
    relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    java = needed(JDK).with_name("java")
    source = tmp_path / "Publish.java"
    source.write_text(PUBLISH)
    ports = dict.fromkeys(("relay-1", "relay-2"), relay.port)
    with ExampleNginx(tmp_path, ports) as nginx:
        await nginx.await_up()
        urls = [each.http_url(path_of(channel)) for each in (relay, nginx) for _ in range(2)]
        async with relay.client(channel) as subscriber:
            run = await asyncio.to_thread(
                subprocess.run,
                [str(java), str(source), *urls],
                capture_output=True,
                text=True,
                timeout=2 * PATIENCE_S,
            )
            assert run.stdout.split() == ["202"] * 4, run.stderr
            assert await receive_many(subscriber, 4) == ["hello"] * 4
