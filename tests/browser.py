"""A headless Chromium, spoken to over a pair of pipes (the DevTools protocol)."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile

from tests import programs

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")

# What there is to see of a page: figures, what sticks out, texts on top of each other.
LOOK = """
(() => {
  const box = (e) => { const r = e.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom].map(Math.round); };
  const meet = (a, b) => Math.min(a[2], b[2]) - Math.max(a[0], b[0]) > 3
    && Math.min(a[3], b[3]) - Math.max(a[1], b[1]) > 3;
  const figures = [...document.querySelectorAll("figure")].map((figure) => {
    const shown = [...figure.querySelectorAll("svg, img")];
    const texts = [...figure.querySelectorAll("svg text")]
      .map((t) => [t.textContent.trim(), box(t)]).filter((t) => t[0]);
    const whole = box(figure), clashes = [];
    texts.forEach(([t, b], i) => texts.slice(i + 1).forEach(([u, c]) => {
      if (meet(b, c)) clashes.push(t + " / " + u); }));
    return {
      id: figure.id, caption: figure.querySelector("figcaption").textContent,
      svg: !!figure.querySelector("svg"),
      sizes: shown.map((e) => { const b = box(e); return [b[2]-b[0], b[3]-b[1]]; }),
      loaded: [...figure.querySelectorAll("img")].every((e) => e.naturalWidth && e.alt),
      labelled: [...figure.querySelectorAll("svg")].every((e) => e.getAttribute(
        "aria-labelledby").split(" ").every((id) => document.getElementById(id))),
      texts: texts.map((t) => t[0]), clashes,
      outside: texts.filter(([, b]) => b[0] < whole[0] - 1 || b[2] > whole[2] + 1)
        .map((t) => t[0]),
    };
  });
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  return JSON.stringify({
    figures, width: document.scrollingElement.scrollWidth,
    text: document.body.innerText,
    twice: ids.filter((id, i) => ids.indexOf(id) < i),
    paper: getComputedStyle(document.body).backgroundColor,
  });
})()
"""


class _Pipe:
    """Commands to the browser and what comes back."""

    def __init__(self, out, back):
        self._out, self._back, self._count, self._rest = out, back, 0, b""
        self.events = []

    def _next(self):
        while b"\0" not in self._rest:
            more = os.read(self._back, 2**16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, **params):
        """The result of a command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self._count:
                assert "error" not in got, got
                return got["result"]
            self.events.append(got)

    def wait(self, method):
        """Reads up to an event."""
        while method not in (event.get("method") for event in self.events):
            self.events.append(self._next())


@contextlib.contextmanager
def _started():
    program = programs.find(*NAMES)
    to_read, out = os.pipe()
    back, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # The protocol's pipes are the descriptors 3 and 4.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        flags = [*FLAGS, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", program, *flags],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield _Pipe(out, back)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(out)
            os.close(back)


def look(path, width=1280, dark=False, media="screen"):
    """What a browser shows of a page on disk, with its complaints and requests."""
    with _started() as pipe:
        target = pipe.call("Target.createTarget", url="about:blank")["targetId"]
        session = pipe.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            pipe.call(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1}
        pipe.call(
            "Emulation.setDeviceMetricsOverride", session, mobile=width < 600, **size
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        pipe.call("Emulation.setEmulatedMedia", session, media=media, features=[scheme])
        pipe.call("Page.navigate", session, url=path.resolve().as_uri())
        pipe.wait("Page.loadEventFired")
        found = pipe.call(
            "Runtime.evaluate", session, expression=LOOK, returnByValue=True
        )
        seen = json.loads(found["result"]["value"])
        complaints = ("Log.entryAdded", "Runtime.exceptionThrown",
                      "Runtime.consoleAPICalled")  # fmt: skip
        seen["complaints"] = [e for e in pipe.events if e.get("method") in complaints]
        seen["requests"] = [
            event["params"]["request"]["url"]
            for event in pipe.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return seen
