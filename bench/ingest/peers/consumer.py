"""A consumer as a careful engineer would write it: it acknowledges messages after the commit of their rows, and writes the rows by
binary COPY. A batch with an existing key goes through a temporary table."""

import json
import os
import queue
import struct
import sys
import threading
import time

import paho.mqtt.client as mqtt
import psycopg
from paho.mqtt.enums import CallbackAPIVersion

MAX_ROWS = 10_000      # per transaction
MAX_WAIT = 0.02        # seconds between the first message of a transaction and its insert
EPOCH = 946_684_800_000_000
COLUMNS = "time, device_id, rms, temperature, state, count"
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
FIXED = struct.Struct(">hiqii")
DOUBLE = struct.Struct(">id").pack
LENGTH = struct.Struct(">i").pack
LONG = struct.Struct(">iq").pack
NULL = LENGTH(-1)

arrived = queue.SimpleQueue()


def double(reading, name):
    value = reading.get(name)
    return NULL if value is None else DOUBLE(8, value)


def encode(reading, device):
    row = FIXED.pack(6, 8, reading["ts"] - EPOCH, 4, device) + DOUBLE(8, reading["rms"]) + double(reading, "temperature")
    state, count = reading.get("state"), reading.get("count")
    text = NULL if state is None else LENGTH(len(state.encode())) + state.encode()
    return row + text + (NULL if count is None else LONG(8, count))


class Database:
    def __init__(self, uri):
        self.uri = uri
        self.connection = None
        self.connect()
        self.devices = dict(self.connection.execute("SELECT name, id FROM fleetwright.device").fetchall())
        self.connection.commit()

    def connect(self):
        while True:
            try:
                self.connection = psycopg.connect(self.uri)
                self.connection.execute(f"CREATE TEMPORARY TABLE staging AS SELECT {COLUMNS} FROM load WITH NO DATA")
                self.connection.commit()
                return
            except psycopg.OperationalError:
                time.sleep(0.2)

    def write(self, rows):
        data = HEADER + b"".join(rows) + b"\xff\xff"
        while True:
            try:
                try:
                    self.copy("load", data)
                except psycopg.errors.UniqueViolation:
                    self.connection.rollback()
                    self.connection.execute("TRUNCATE staging")
                    self.copy("staging", data)
                    self.connection.execute(f"INSERT INTO load ({COLUMNS}) SELECT {COLUMNS} FROM staging ON CONFLICT DO NOTHING")
                self.connection.commit()
                return
            except psycopg.OperationalError:
                self.connect()

    def copy(self, table, data):
        with self.connection.cursor() as cursor, cursor.copy(f"COPY {table} ({COLUMNS}) FROM STDIN (FORMAT binary)") as copy:
            copy.write(data)


def decode(database, message):
    readings = json.loads(message.payload)
    device = database.devices[message.topic.split("/")[1]]
    if isinstance(readings, dict):
        readings = [readings]
    return [encode(reading, device) for reading in readings]


def write(client, database):
    while True:
        messages, rows = [arrived.get()], []
        until = time.monotonic() + MAX_WAIT
        while True:
            message = messages[-1]
            try:
                rows += decode(database, message)
            except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
                print("refused:", message.topic, error, file=sys.stderr)
            if len(rows) >= MAX_ROWS:
                break
            try:
                messages.append(arrived.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        if rows:
            database.write(rows)
        for message in messages:
            client.ack(message.mid, message.qos)


def main():
    database = Database(os.environ["DATABASE_URI"])
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="python", clean_session=False, manual_ack=True)
    client.on_connect = lambda client, *_: client.subscribe("devices/+/telemetry", qos=1)
    client.on_message = lambda _client, _data, message: arrived.put(message)
    client.reconnect_delay_set(1, 1)
    client.connect("127.0.0.1", int(os.environ["BROKER_PORT"]))
    threading.Thread(target=write, args=(client, database), daemon=True).start()
    client.loop_forever()


main()
