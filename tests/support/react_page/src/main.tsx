import {StrictMode, useEffect, useState, useSyncExternalStore} from "react";
import {createRoot} from "react-dom/client";
import {Relay, RelayError, type ChannelGapEvent, type RelayState} from "websocket-relay";

const relay = new Relay(new URLSearchParams(location.search).get("relay") ?? "./");

function subscribeToState(onChange: () => void): () => void {
  relay.addEventListener("state", onChange);
  return () => relay.removeEventListener("state", onChange);
}

function useRelayState(): RelayState {
  return useSyncExternalStore(subscribeToState, () => relay.state);
}

function useMessages(name: string, history: number): string[] {
  const [messages, setMessages] = useState<string[]>([]);
  useEffect(() => {
    const channel = relay.channel(name, {history});
    setMessages([]);
    channel.addEventListener("message", ({data, position}) => {
      if (typeof data === "string") setMessages((earlier) => [...earlier, `${data} ${position}`]);
    });
    channel.addEventListener("gap", (gap: ChannelGapEvent) => console.warn(gap.since, gap.position));
    return () => channel.leave();
  }, [name, history]);
  return messages;
}

async function publish(text: string): Promise<void> {
  try {
    const position: string = await relay.publish("news", text);
    console.log("published at", position);
  } catch (error) {
    if (error instanceof RelayError && error.code === "unconfirmed") console.warn(error.message);
    else throw error;
  }
}

function List() {
  const messages = useMessages("news", 20);
  return <ul>{messages.map((message) => <li key={message}>{message.split(" ")[0]}</li>)}</ul>;
}

function Count() {
  return <output>{useMessages("news", 0).length}</output>;
}

function Page() {
  const [isShown, setIsShown] = useState(true);
  return (
    <>
      <p>{useRelayState()}</p>
      <Count />
      {isShown && <List />}
      <button onClick={() => void publish("published")}>Publish</button>
      <button onClick={() => setIsShown(!isShown)}>Toggle</button>
    </>
  );
}

createRoot(document.querySelector("main")!).render(<StrictMode><Page /></StrictMode>);
