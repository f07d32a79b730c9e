"""Write docs/explanation/connection-states.md anew from the table in the code: `make config`."""

from pathlib import Path

from websocket_relay.wire.close_states import (
    TRANSITIONS,
    CloseAction,
    ConnectionEvent,
    ConnectionState,
)

PAGE = Path(__file__).with_name("explanation") / "connection-states.md"

TEXT = """\
# States of a connection

A connection is accepted, closes and ends by one table, `wire/close_states`. WebSockets and event
streams share it: they differ in what a close looks like on the wire, and in that a client of an
event stream does not answer it. This page is written from that table by `make config`. An event
that a state does not list changes nothing.

```mermaid
stateDiagram-v2
    [*] --> HANDSHAKE
{arrows}
    CLOSED --> [*]
```

| state | meaning |
| --- | --- |
{states}

| event | meaning |
| --- | --- |
{events}

| action | meaning |
| --- | --- |
{actions}

| in the state | at the event | next state | actions, in this order |
| --- | --- | --- | --- |
{transitions}

## See also

- [Architecture](architecture.md#close-and-shutdown): how the relay closes all connections
- [Close codes and refusals](../reference/close-codes.md): what a client receives
"""


def page() -> str:
    """Return the page."""
    changes = {key: what for key, what in TRANSITIONS.items() if what != (key[0], ())}
    events_by_arrow: dict[tuple[str, str], list[str]] = {}
    for (state, event), (following, _) in changes.items():
        if state is not following:
            events_by_arrow.setdefault((state.name, following.name), []).append(event.name)
    return TEXT.format(
        arrows="\n".join(
            f"    {state} --> {following}: {', '.join(events)}"
            for (state, following), events in events_by_arrow.items()
        ),
        states=_meanings(ConnectionState),
        events=_meanings(ConnectionEvent),
        actions=_meanings(CloseAction),
        transitions="\n".join(
            f"| {state.name} | {event.name} | {following.name} |"
            f" {', '.join(each.name for each in actions)} |".replace("|  |", "| |")
            for (state, event), (following, actions) in changes.items()
        ),
    )


def _meanings(members: type[ConnectionState | ConnectionEvent | CloseAction]) -> str:
    return "\n".join(f"| {each.name} | {each.value} |" for each in members)


if __name__ == "__main__":
    PAGE.write_text(page())
