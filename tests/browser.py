"""Chromium for tests of pages, controlled by the DevTools protocol over a pair of pipes."""
import itertools
import json
import os
import shutil
import subprocess
import threading
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 120       # after which a test has failed


class Browser:
    """A running Chromium. profile: an empty folder."""

    def __init__(self, profile):
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()

        def connect():      # Chromium reads commands from file descriptor 3 and writes answers to 4
            source = os.dup(read_commands)      # neither is 3 or 4: these are in use
            target = os.dup(write_answers)
            os.dup2(source, 3)
            os.dup2(target, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            preexec_fn=connect, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        os.close(read_commands)
        os.close(write_answers)
        self.numbers, self.received = itertools.count(1), b""

    def call(self, method, session=None, **params):
        """The result of a command of the DevTools protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := json.loads(self.read())).get("id") != number:
            pass            # an event
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def read(self):
        """The next message; a zero byte ends each."""
        alarm = threading.Timer(SECONDS, self.process.kill)
        alarm.start()
        while b"\0" not in self.received:
            part = os.read(self.answers, 2 ** 20)
            assert part, "Chromium has ended"
            self.received += part
        alarm.cancel()
        message, _, self.received = self.received.partition(b"\0")
        return message

    def result(self, address, expression, *, width=900, dark=False):
        """Opens a page and waits until the JavaScript `expression` is not empty -> its value."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", session,
                  width=width, height=800, deviceScaleFactor=1, mobile=False)
        # of several pages, only one would receive focus events
        self.call("Emulation.setFocusEmulationEnabled", session, enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.call("Page.navigate", session, url=address)
        started, value = time.monotonic(), None
        while not value:
            assert time.monotonic() < started + SECONDS, f"{address} does not show {expression}"
            time.sleep(0.05)
            answer = self.call("Runtime.evaluate", session, expression=expression)
            value = answer["result"].get("value")
        self.call("Target.closeTarget", targetId=target)
        return value

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
