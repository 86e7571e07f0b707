"""One MQTT 5 session, led by commands: what the broker answers is printed.

Standard input: a line of JSON, {"host", "port", "ca": path or null, "identity": [certificate, key] or null, "username",
"password"}; an empty user name is not sent; then commands, each a line of JSON:
{"publish": TOPIC, "payload": TEXT} at QoS 1, {"subscribe": FILTER}. When it ends, the session does.
Standard output: "connected CODE", "published CODE", "subscribed CODE", "message TOPIC PAYLOAD", "disconnected CODE"; a CODE is the
reason code of MQTT 5 (section 2.4) in decimal; 0 is success, from 128 on it is a refusal. -1: the connection broke without one.
"""

import json
import sys
import threading

import paho.mqtt.client as mqtt

printing = threading.Lock()


def say(line):
    with printing:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()




def main():
    settings = json.loads(sys.stdin.readline())
    # Without connecting again: a session that ends has ended.
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5, reconnect_on_failure=False)
    if settings["username"] or not settings["identity"]:
        client.username_pw_set(settings["username"], settings["password"])
    if settings["ca"]:
        certificate, key = settings["identity"] or (None, None)
        client.tls_set(ca_certs=settings["ca"], certfile=certificate, keyfile=key)
    client.on_connect = lambda c, u, flags, reason, properties: say(f"connected {reason.value}")
    client.on_publish = lambda c, u, mid, reason, properties: say(f"published {reason.value}")
    client.on_subscribe = lambda c, u, mid, reasons, properties: say(f"subscribed {reasons[0].value}")
    client.on_message = lambda c, u, message: say(f"message {message.topic} {message.payload.decode()}")
    client.on_disconnect = lambda c, u, flags, reason, properties: say(
        f"disconnected {reason.value if flags.is_disconnect_packet_from_server else -1}")
    client.connect(settings["host"], settings["port"], keepalive=60)
    client.loop_start()
    for line in sys.stdin:
        command = json.loads(line)
        if "publish" in command:
            client.publish(command["publish"], command["payload"], qos=1)
        else:
            client.subscribe(command["subscribe"], qos=1)
    client.disconnect()


main()
