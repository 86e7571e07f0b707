"""Devices that publish readings at QoS 1, until standard input ends; each reading that the broker acknowledges is printed.

Standard input: a line of JSON, {"host", "port", "ca": path or null, "topic": with {device}, "rate": readings a second and device,
"devices": {name: password}}.
Standard output: "connected DEVICE", "acknowledged DEVICE MILLISECONDS"; at the end "outstanding COUNT".

A reading is {"ts": MILLISECONDS, "value": MILLISECONDS}, so that a table without a column for the device's time also contains it.
Paho connects again by itself, and sends again what was not acknowledged.
"""

import json
import sys
import threading
import time

import paho.mqtt.client as mqtt

# What a device holds back when its broker is away; beyond it, it takes no more readings.
MOST_OUTSTANDING = 200

# How long the last acknowledgements may take once standard input has ended.
LAST_ACKNOWLEDGEMENTS = 60

printing = threading.Lock()


def say(line):
    with printing:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class Device:
    def __init__(self, name, password, settings):
        self.name, self.topic = name, settings["topic"].replace("{device}", name)
        self.last, self.lock = 0, threading.Lock()
        # Time of each reading by its packet identifier; and identifiers acknowledged before publish gave them to us.
        self.outstanding, self.early = {}, set()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name, clean_session=False, protocol=mqtt.MQTTv311)
        self.client.username_pw_set(name, password)
        self.client.reconnect_delay_set(min_delay=1, max_delay=1)
        if settings["ca"]:
            self.client.tls_set(ca_certs=settings["ca"])
        self.client.on_connect = self.on_connect
        self.client.on_publish = self.on_publish
        self.client.connect_async(settings["host"], settings["port"], keepalive=10)
        self.client.loop_start()

    def on_connect(self, client, userdata, flags, reason, properties):
        say(f"{'refused' if reason.is_failure else 'connected'} {self.name} {reason}")

    def on_publish(self, client, userdata, mid, reason, properties):
        with self.lock:
            milliseconds = self.outstanding.pop(mid, None)
            if milliseconds is None:
                self.early.add(mid)
                return
        say(f"acknowledged {self.name} {milliseconds}")

    def publish(self):
        with self.lock:
            if len(self.outstanding) >= MOST_OUTSTANDING:
                return
        self.last = max(self.last + 1, int(time.time() * 1000))
        payload = json.dumps({"ts": self.last, "value": self.last})
        # Not with the lock held: Paho calls on_publish with a lock of its own that publish takes as well.
        mid = self.client.publish(self.topic, payload, qos=1).mid
        with self.lock:
            if mid not in self.early:
                self.outstanding[mid] = self.last
                return
            self.early.remove(mid)
        say(f"acknowledged {self.name} {self.last}")


def main():
    settings = json.loads(sys.stdin.readline())
    devices = [Device(name, password, settings) for name, password in settings["devices"].items()]
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    while not ended.wait(1 / settings["rate"]):
        for device in devices:
            device.publish()
    deadline = time.monotonic() + LAST_ACKNOWLEDGEMENTS
    while any(device.outstanding for device in devices) and time.monotonic() < deadline:
        time.sleep(0.05)
    say(f"outstanding {sum(len(device.outstanding) for device in devices)}")
    for device in devices:
        device.client.disconnect()


main()
