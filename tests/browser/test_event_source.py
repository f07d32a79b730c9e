"""A browser's own EventSource, without relay.js, through whatever happens to a relay."""

from signal import SIGKILL, SIGTERM

import pytest
from playwright.async_api import Page

from tests.support import browser
from tests.support.relay_process import RelayProcess, StartRelay, eventually, path_of, receive
from tests.support.relay_v1 import number_texts
from tests.support.site import serve_site
from tests.support.tcp_proxy import TcpProxy

pytestmark = browser.SHARED

LISTEN = """url => {
    Object.assign(window, {
        heard: [], welcomed: false, refused: false, source: new EventSource(url),
    });
    source.addEventListener("welcome", () => { welcomed = true; });
    source.onmessage = ({data}) => heard.push(data);
    source.onerror = () => { refused = source.readyState === EventSource.CLOSED; };
}"""


async def until(page: Page, condition: str) -> None:
    async def look() -> tuple[bool, object]:
        return bool(await page.evaluate(condition)), await page.evaluate("heard.length")

    await eventually(look, condition)


async def listen(page: Page, origin: str, channel: str) -> None:
    await page.evaluate(LISTEN, f"{origin}{path_of(channel)}/events")
    # The response head opens the source; the position to resume from comes with the first event.
    await until(page, "welcomed")


@pytest.mark.parametrize(
    ("how", "after", "is_elsewhere"),
    [("stopped", 50, True), ("killed", 50, False), ("cut off", 0, True)],
)
async def test_it_comes_back_by_itself_without_a_gap_and_without_a_duplicate(
    redis_replicas: tuple[RelayProcess, RelayProcess],
    channel: str,
    how: str,
    after: int,
    is_elsewhere: bool,
) -> None:
    one, two = redis_replicas
    async with (
        TcpProxy(one.port) as proxy,
        serve_site() as elsewhere,
        browser.open_page() as page,
        two.client(channel) as publisher,
    ):
        origin = proxy.url("").replace("ws:", "http:")
        await page.goto(elsewhere.origin if is_elsewhere else f"{origin}/")
        await listen(page, origin, channel)
        for number in number_texts(0, 150):
            if number == str(after):
                proxy.target = two.port
                if how == "cut off":
                    proxy.cut()
                else:
                    one.signal(SIGTERM if how == "stopped" else SIGKILL)
            await publisher.send(number)
            await receive(publisher)
        await until(page, "heard.length >= 150")
        assert await page.evaluate("heard") == number_texts(0, 150)


async def test_only_pages_of_the_origins_that_are_allowed_hear(
    relay_with: StartRelay, channel: str
) -> None:
    async with serve_site() as allowed, serve_site() as other, browser.open_page() as page:
        relay = relay_with(server={"allowed_origins": [allowed.origin]})
        await page.goto(allowed.origin)
        await listen(page, relay.http_url(""), channel)
        await page.goto(other.origin)
        await page.evaluate(LISTEN, relay.http_url(f"{path_of(channel)}/events"))
        await until(page, "refused")
