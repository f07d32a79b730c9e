"""The EventSource of a browser, without relay.js: it resumes without a gap on another relay."""

from signal import SIGKILL, SIGTERM

import pytest
from playwright.async_api import Page

from tests.support import browser
from tests.support.relay_js_page import serve_relay_js_page
from tests.support.relay_process import RelayProcess, StartRelay, eventually, path_of, receive
from tests.support.relay_v1 import number_texts
from tests.support.tcp_proxy import TcpProxy

pytestmark = browser.SHARED

SUBSCRIBE = """url => {
    Object.assign(window, {
        received: [], isWelcomed: false, isRefused: false, source: new EventSource(url),
    });
    source.addEventListener("welcome", () => { isWelcomed = true; });
    source.onmessage = ({data}) => received.push(data);
    source.onerror = () => { isRefused = source.readyState === EventSource.CLOSED; };
}"""


async def wait_until(page: Page, condition: str) -> None:
    """Wait until an expression of JavaScript is true."""

    async def check() -> tuple[bool, object]:
        return bool(await page.evaluate(condition)), await page.evaluate("received.length")

    await eventually(check, condition)


async def subscribe(page: Page, origin: str, channel: str) -> None:
    """Open an EventSource on the page, and wait for the event `welcome`."""
    await page.evaluate(SUBSCRIBE, f"{origin}{path_of(channel)}/events")
    # The response head opens the source. Only the first event sets the position to resume from.
    await wait_until(page, "isWelcomed")


@pytest.mark.parametrize(
    ("how", "after", "is_other_origin"),
    [("stopped", 50, True), ("killed", 50, False), ("cut off", 0, True)],
)
async def test_an_event_source_resumes_without_a_gap_and_without_a_duplicate(
    redis_replicas: tuple[RelayProcess, RelayProcess],
    channel: str,
    how: str,
    after: int,
    is_other_origin: bool,
) -> None:
    one, two = redis_replicas
    async with (
        TcpProxy(one.port) as proxy,
        serve_relay_js_page() as site,
        browser.open_page() as page,
        two.client(channel) as publisher,
    ):
        origin = proxy.url("").replace("ws:", "http:")
        await page.goto(site.origin if is_other_origin else f"{origin}/")
        await subscribe(page, origin, channel)
        for number in number_texts(0, 150):
            if number == str(after):
                proxy.target = two.port
                if how == "cut off":
                    proxy.cut()
                else:
                    one.signal(SIGTERM if how == "stopped" else SIGKILL)
            await publisher.send(number)
            await receive(publisher)
        await wait_until(page, "received.length >= 150")
        assert await page.evaluate("received") == number_texts(0, 150)


async def test_only_pages_of_allowed_origins_receive_events(
    relay_with: StartRelay, channel: str
) -> None:
    async with (
        serve_relay_js_page() as allowed,
        serve_relay_js_page() as other,
        browser.open_page() as page,
    ):
        relay = relay_with(server={"allowed_origins": [allowed.origin]})
        await page.goto(allowed.origin)
        await subscribe(page, relay.http_url(""), channel)
        await page.goto(other.origin)
        await page.evaluate(SUBSCRIBE, relay.http_url(f"{path_of(channel)}/events"))
        await wait_until(page, "isRefused")
