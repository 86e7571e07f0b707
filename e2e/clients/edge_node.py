"""An edge node of Sparkplug B with one device, led by commands: a birth names its metrics, data give them by alias alone.

Arguments: HOST PORT PASSWORD GROUP NODE DEVICE; the node logs in by its name.
Standard input: commands, each a line: "birth"; "data VALUE", which sends the metric `level` by its alias; "lose", which gives
a number to a message that is never sent.
Standard output: "connected"; "born" for each birth; "sent" for each message of data; "lost"; "rebirth" when a host has asked for a birth, which follows.
"""

import sys
import threading

import pysparkplug as sparkplug

host, port, password, group, node, device = sys.argv[1:]
printing, numbers = threading.Lock(), threading.Lock()
sequence = 0
# Time of the last message, in milliseconds: with the device it is the key of a row, so that no two messages may share it.
last = 0
PRESSURE, LEVEL = 1, 2


def say(line):
    with printing:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def metric(datatype, value, name=None, alias=None):
    # Without a time of its own: that of the message holds.
    return sparkplug.Metric(timestamp=None, name=name, datatype=datatype, value=value, alias=alias)


def publish(kind, payload, device_id=None, include_dtypes=False, **content):
    global sequence, last
    last = max(last + 1, sparkplug.get_current_timestamp())
    topic = sparkplug.Topic(message_type=kind, group_id=group, edge_node_id=node, device_id=device_id)
    message = payload(timestamp=last, seq=sequence, **content)
    client.publish(sparkplug.Message(topic, message, sparkplug.QoS.AT_MOST_ONCE, False), include_dtypes=include_dtypes)
    sequence = (sequence + 1) % 256


def birth():
    global sequence
    with numbers:
        sequence = 0
        count = metric(sparkplug.DataType.INT64, 0, name="bdSeq")
        publish(sparkplug.MessageType.NBIRTH, sparkplug.NBirth, include_dtypes=True, metrics=(count,))
        metrics = (
            metric(sparkplug.DataType.DOUBLE, 1.5, name="Inputs/Pressure", alias=PRESSURE),
            metric(sparkplug.DataType.INT8, -7, name="level", alias=LEVEL),
        )
        publish(sparkplug.MessageType.DBIRTH, sparkplug.DBirth, device, include_dtypes=True, metrics=metrics)
    say("born")


def on_command(_client, message):
    for command in message.payload.metrics:
        if command.name == "Node Control/Rebirth" and command.value is True:
            say("rebirth")
            birth()


client = sparkplug.Client(client_id=node, username=node, password=password)
commands = sparkplug.Topic(message_type=sparkplug.MessageType.NCMD, group_id=group, edge_node_id=node)
client.subscribe(commands, sparkplug.QoS.AT_LEAST_ONCE, on_command)
client.connect(host, port=int(port), callback=lambda _: say("connected"))
for line in sys.stdin:
    command, *values = line.split()
    if command == "birth":
        birth()
    elif command == "lose":
        with numbers:
            sequence = (sequence + 1) % 256
        say("lost")
    else:
        with numbers:
            data = metric(sparkplug.DataType.INT8, int(values[0]), alias=LEVEL)
            publish(sparkplug.MessageType.DDATA, sparkplug.DData, device, metrics=(data,))
        say("sent")
client.disconnect()
