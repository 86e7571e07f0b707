/* A plugin of Mosquitto: refuses publishers while the broker is full.
 *
 * Mosquitto drops what it cannot queue, and acknowledges it to the publisher all the same. This plugin sees each message before Mosquitto
 * does, and refuses it where it could not be kept. Three resources can be full:
 *
 *   queue    of a session whose client identifier begins with `session_prefix`: the payloads that wait for it have reached
 *            `session_bytes`. Messages in flight to it count, and those of QoS 2 that their publishers may still release. Only messages
 *            that this session would receive are refused. The queues of other sessions never refuse publishers: otherwise a device that
 *            is away could stop a whole plant.
 *   memory   the broker's own count of its memory has reached `memory_bytes`. Beyond its `memory_limit` it would lose what it has just
 *            accepted.
 *   disk     no more is free on the volume than a reserve for the database's journal: an eighth of the volume, at least 64 MiB and at
 *            most 1 GiB. What SQLite has freed inside its file counts as free, and the journal as a part of the reserve: it returns
 *            neither to the file system. One transaction deletes all that a worker acknowledges in an iteration of the main loop, or a
 *            whole queue whose session ends (see `volume_keep_deleted`).
 *
 *   global_plugin /usr/lib/mosquitto/bounds.so
 *   plugin_opt_when_full refuse            or disconnect
 *   plugin_opt_trusted_port 1884           publishers on this port are never refused
 *   plugin_opt_memory_bytes 301989888      left out: not bounded
 *   plugin_opt_session_prefix _ingest_
 *   plugin_opt_session_bytes 268435456     left out: not bounded, and no SQLite persistence is expected
 *
 * `refuse`: a client of MQTT 5 receives a reason code with each message (0x97, Quota exceeded). One of MQTT 3.1.1, whose protocol has no
 * such code, is disconnected without an acknowledgement. `disconnect`: both are. QoS 0 has no acknowledgement: such messages are never
 * queued, and are dropped only where memory is full.
 *
 * Always accepted is a message that deletes a retained one (QoS 0 or 1, an empty payload), so that a full broker can be emptied.
 *
 * The plugin publishes retained messages, once a second where they change: `$SYS/broker/fleetwright/full` (`none`, `queue SESSION`,
 * `memory`, `disk`, or, where nothing is full but clients exceed limits of their own, `clients CLIENT: LIMIT, ...`), and how many messages
 * were refused since the start in `$SYS/broker/fleetwright/refused/queue`, `/memory`, `/disk`.
 *
 * Where it cannot count or read (memory, volume, database), it refuses. A database that it cannot read at the start ends the broker.
 *
 * With the classic persistence (`persistence true`) Mosquitto reports no queues to plugins, and writes each snapshot beside the last one:
 * then memory alone bounds the queues, and the volume has to have room for one more snapshot.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mosquitto.h>
#include <mosquitto/libcommon_memory.h>

#include "events.h"
#include "limit_report.h"
#include "options.h"
#include "unreleased.h"
#include "version.h"
#include "volume.h"

#define NAME "bounds"
#define SYS_PREFIX "$SYS/broker/fleetwright/"
#define TICK_MILLISECONDS 100

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

enum resource { QUEUE, MEMORY, DISK, RESOURCES };
static const char *const NAMES[RESOURCES] = {"queue", "memory", "disk"};

struct state {
	struct volume volume;
	/* Options. */
	bool disconnects;
	int trusted_port;
	uint64_t memory_bytes;
	struct queues queues;
	bool memory_full;
	uint64_t refused[RESOURCES];
	struct limit_report limits;
	/* As published last. */
	uint64_t published_refused[RESOURCES];
	char *published_full;
	time_t published_at;
};

static void check_memory(struct state *state)
{
	state->memory_full = state->queues.incomplete
		|| (state->memory_bytes > 0 && is_full(state->memory_full, mosquitto_memory_used(), state->memory_bytes));
}

/* Deletes a retained message, and so needs no room. Of those that delete nothing there may be any number. */
static bool frees_room(const struct mosquitto_evt_message *message)
{
	return message->retain && message->payloadlen == 0 && message->qos < 2 && mosquitto_topic_is_retained(message->topic);
}

/* The resource that a message lacks; RESOURCES where it lacks none. */
static enum resource missing_resource(struct state *state, const struct mosquitto_evt_message *message)
{
	check_memory(state);
	if(frees_room(message)){
		return RESOURCES;
	}
	if(state->memory_full){
		return MEMORY;
	}
	/* Neither queued nor stored. */
	if(message->qos == 0 && !message->retain){
		return RESOURCES;
	}
	if(volume_is_full_for(&state->volume, message->payloadlen)){
		return DISK;
	}
	if(message->qos > 0 && queues_block(&state->queues, message->topic)){
		return QUEUE;
	}
	return RESOURCES;
}

static int refuse(struct state *state, const struct mosquitto_evt_message *message, enum resource resource)
{
	state->refused[resource]++;
	/* To a client of MQTT 3.1.1 a refusal would be an acknowledgement like any other. */
	if(message->qos == 0 || (!state->disconnects && mosquitto_client_protocol_version(message->client) == 5)){
		return MOSQ_ERR_QUOTA_EXCEEDED;
	}
	return MOSQ_ERR_SERVER_BUSY;
}

static int on_message(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_message *message = event_data;
	struct state *state = userdata;
	uint64_t fingerprint = 0;
	enum resource missing;

	(void)event;
	if(mosquitto_client_port(message->client) == state->trusted_port){
		return MOSQ_ERR_SUCCESS;
	}
	if(message->qos == 2 && state->queues.count > 0){
		fingerprint = fingerprint_message(mosquitto_client_id(message->client), message->topic, message->payload, message->payloadlen);
		if(table_has(&state->queues.known, fingerprint)){
			return MOSQ_ERR_SUCCESS;
		}
	}
	missing = missing_resource(state, message);
	if(missing != RESOURCES){
		return refuse(state, message, missing);
	}
	if(fingerprint != 0){
		struct slot slot = {.id = fingerprint, .bytes = message->payloadlen, .owner = owner_connection(message->client)};

		unreleased_reserve(&state->queues, message->topic, slot);
	}
	return MOSQ_ERR_SUCCESS;
}

static void restore_message(void *userdata, sqlite3_stmt *row)
{
	struct queues *queues = userdata;
	const char *client = (const char *)sqlite3_column_text(row, 0);
	struct slot slot = {.id = (uint64_t)sqlite3_column_int64(row, 2), .bytes = (uint32_t)sqlite3_column_int64(row, 3)};
	struct queue *queue;

	if(sqlite3_column_int(row, 1) == DIRECTION_IN){
		const char *topic = (const char *)sqlite3_column_text(row, 4);

		slot.owner = owner_session(client);
		unreleased_store(queues, fingerprint_message(client, topic, sqlite3_column_blob(row, 5), slot.bytes), slot);
		unreleased_reserve(queues, topic, slot);
		return;
	}
	queue = queues_find(queues, client, true);
	if(queue){
		queues_count(queues, &queue->waiting, slot);
	}
}

static void restore_subscription(void *userdata, sqlite3_stmt *row)
{
	struct queues *queues = userdata;
	struct queue *queue = queues_find(queues, (const char *)sqlite3_column_text(row, 0), true);
	const char *filter = (const char *)sqlite3_column_text(row, 1);

	if(queue && filter){
		queue_subscribe(queues, queue, filter);
	}
}

/* Mosquitto reports what changes, not what it had before its start: that is in the database. An error here ends the broker. */
static int on_restore(int event, void *event_data, void *userdata)
{
	struct state *state = userdata;
	struct queues *queues = &state->queues;

	(void)event;
	(void)event_data;
	if(!volume_open(&state->volume)
			|| !volume_query(&state->volume, "SELECT client_id, topic FROM subscriptions WHERE substr(client_id, 1, length(?1)) = ?1",
				queues->prefix, restore_subscription, queues)
			|| !volume_query(&state->volume, "SELECT m.client_id, m.direction, m.store_id, b.payloadlen, b.topic,"
				" CASE m.direction WHEN 0 THEN b.payload END FROM client_msgs AS m"
				" JOIN base_msgs AS b ON b.store_id = m.store_id"
				" WHERE m.direction = 0 OR substr(m.client_id, 1, length(?1)) = ?1", queues->prefix, restore_message, queues)
			|| queues->incomplete){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": cannot read what is queued (%s). The broker does not start: it could not refuse what does"
			" not fit. Check the volume of %s", sqlite3_errmsg(state->volume.database), mosquitto_persistence_location());
		return MOSQ_ERR_UNKNOWN;
	}
	for(size_t i = 0; i < queues->count; i++){
		queue_update(queues, &queues->list[i]);
	}
	return MOSQ_ERR_SUCCESS;
}

static void publish(const char *topic, const char *text)
{
	mosquitto_broker_publish_copy(NULL, topic, (int)strlen(text), text, 0, true, NULL);
}

/* The resource that is full, the most serious first. */
static void describe_full(const struct state *state, char *text, size_t size)
{
	if(state->volume.full || state->memory_full){
		snprintf(text, size, "%s", state->volume.full ? NAMES[DISK] : NAMES[MEMORY]);
		return;
	}
	for(size_t i = 0; i < state->queues.count; i++){
		if(state->queues.list[i].full){
			snprintf(text, size, "%s %s", NAMES[QUEUE], state->queues.list[i].client);
			return;
		}
	}
	snprintf(text, size, "clients ");
	if(!limit_report_clients(text, size)){
		snprintf(text, size, "none");
	}
}

static void publish_changes(struct state *state)
{
	char text[512], topic[64];
	bool first = !state->published_full;

	describe_full(state, text, sizeof(text));
	if(first || strcmp(state->published_full, text)){
		publish(SYS_PREFIX "full", text);
		free(state->published_full);
		state->published_full = strdup(text);
	}
	for(int resource = 0; resource < RESOURCES; resource++){
		if(first || state->published_refused[resource] != state->refused[resource]){
			snprintf(topic, sizeof(topic), SYS_PREFIX "refused/%s", NAMES[resource]);
			snprintf(text, sizeof(text), "%llu", (unsigned long long)state->refused[resource]);
			publish(topic, text);
			state->published_refused[resource] = state->refused[resource];
		}
	}
}

static int on_tick(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_tick *tick = event_data;
	struct state *state = userdata;

	(void)event;
	volume_check(&state->volume);
	check_memory(state);
	if(tick->now_s != state->published_at){
		state->published_at = tick->now_s;
		publish_changes(state);
		limit_report_publish(&state->limits);
	}
	tick->next_s = 0;
	tick->next_ms = TICK_MILLISECONDS;
	return MOSQ_ERR_SUCCESS;
}

static bool set_option(struct state *state, const char *key, const char *value)
{
	uint64_t port;

	if(!strcmp(key, "when_full")){
		state->disconnects = !strcmp(value, "disconnect");
		return state->disconnects || !strcmp(value, "refuse");
	}
	if(!strcmp(key, "trusted_port")){
		if(!options_parse_number(value, &port) || port > 65535){
			return false;
		}
		state->trusted_port = (int)port;
		return true;
	}
	if(!strcmp(key, "memory_bytes")){
		return options_parse_number(value, &state->memory_bytes);
	}
	if(!strcmp(key, "session_bytes")){
		return options_parse_number(value, &state->queues.max_bytes);
	}
	if(!strcmp(key, "session_prefix") && !state->queues.prefix){
		/* The broker frees its own copy. */
		state->queues.prefix = strdup(value);
		return state->queues.prefix && *state->queues.prefix;
	}
	return false;
}

static bool configure(struct state *state, const struct mosquitto_opt *options, int option_count)
{
	for(int i = 0; i < option_count; i++){
		if(!set_option(state, options[i].key, options[i].value)){
			mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": plugin_opt_%s has no valid value: %s", options[i].key, options[i].value);
			return false;
		}
	}
	if(!mosquitto_persistence_location() || (state->queues.max_bytes > 0 && !state->queues.prefix)){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": expected persistence_location, and plugin_opt_session_prefix with"
			" plugin_opt_session_bytes");
		return false;
	}
	return true;
}

int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options, int option_count)
{
	struct state *state = calloc(1, sizeof(*state));
	struct queues *queues = state ? &state->queues : NULL;
	const struct { int event; MOSQ_FUNC_generic_callback callback; void *userdata; } callbacks[] = {
		{MOSQ_EVT_MESSAGE_IN, on_message, state},
		{MOSQ_EVT_TICK, on_tick, state},
		/* From here on: only with SQLite, for the classic persistence refuses them. */
		{MOSQ_EVT_PERSIST_RESTORE, on_restore, state},
		{MOSQ_EVT_PERSIST_BASE_MSG_ADD, on_message_stored, queues},
		{MOSQ_EVT_PERSIST_CLIENT_MSG_ADD, on_message_queued, queues},
		{MOSQ_EVT_PERSIST_CLIENT_MSG_DELETE, on_message_dequeued, queues},
		{MOSQ_EVT_DISCONNECT, on_disconnect, queues},
		{MOSQ_EVT_CLIENT_OFFLINE, on_disconnect, queues},
		{MOSQ_EVT_PERSIST_CLIENT_DELETE, on_session_end, queues},
		{MOSQ_EVT_PERSIST_SUBSCRIPTION_ADD, on_subscribed, queues},
		{MOSQ_EVT_PERSIST_SUBSCRIPTION_DELETE, on_unsubscribed, queues},
	};
	size_t count = sizeof(callbacks) / sizeof(*callbacks);
	int rc = MOSQ_ERR_SUCCESS;

	if(!state){
		return MOSQ_ERR_NOMEM;
	}
	*userdata = state;
	mosquitto_plugin_set_info(identifier, NAME, NULL);
	if(!configure(state, options, option_count)){
		return MOSQ_ERR_INVAL;
	}
	count = queues->max_bytes == 0 ? 2 : count;
	/* For the database that the persistence plugin opens, which is loaded after this one. */
	sqlite3_auto_extension((void (*)(void))volume_keep_deleted);
	for(size_t i = 0; rc == MOSQ_ERR_SUCCESS && i < count; i++){
		rc = mosquitto_callback_register(identifier, callbacks[i].event, callbacks[i].callback, NULL, callbacks[i].userdata);
	}
	return rc;
}

/* Mosquitto itself removes the callbacks of a plugin that it unloads. */
int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	struct state *state = userdata;

	(void)options;
	(void)option_count;
	sqlite3_cancel_auto_extension((void (*)(void))volume_keep_deleted);
	if(state){
		queues_clear(&state->queues);
		sqlite3_close(state->volume.database);
		free(state->published_full);
		free(state);
	}
	return MOSQ_ERR_SUCCESS;
}
