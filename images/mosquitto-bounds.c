/* A plugin of Mosquitto 2.1: what happens to publishers when the broker is full.
 *
 * Mosquitto drops what it cannot queue, and acknowledges it to the publisher all the same. So this plugin looks at each message
 * before Mosquitto does, and where it could not be kept, refuses it. Three things can be full:
 *
 *   queue    of a session whose client identifier begins with `session_prefix`: as many bytes of payloads wait for it as
 *            `session_bytes` says. Those that are under way to it count, and those of QoS 2 that their publishers may still
 *            release. Only messages that this session would get are refused. The queues of
 *            other sessions are left to Mosquitto: were they to refuse, a device that is away could silence a whole plant.
 *   memory   the broker's own count of the memory that it uses has reached `memory_bytes`; beyond its `memory_limit` it would lose
 *            what it has just accepted.
 *   disk     no more is free on the volume than a reserve for the database's journal: an eighth of the volume, at least 64 MiB and
 *            at most 1 GiB. What SQLite has set free inside its file counts as free, and the journal as a part of the reserve: it
 *            gives neither back. One transaction deletes all that a worker acknowledges in a turn of the loop, or a whole
 *            queue whose session ends (see `leave_deleted`).
 *
 *   global_plugin /usr/lib/mosquitto/bounds.so
 *   plugin_opt_when_full refuse            or disconnect
 *   plugin_opt_trusted_port 1884           who publishes here is never refused
 *   plugin_opt_memory_bytes 301989888      left out: not bounded
 *   plugin_opt_session_prefix _ingest_
 *   plugin_opt_session_bytes 268435456     left out: not bounded, and no SQLite persistence is expected
 *
 * `refuse`: a client of MQTT 5 is told with each message (reason 0x97, Quota exceeded); one of MQTT 3.1.1, which cannot be told, is
 * disconnected without an acknowledgement. `disconnect`: both are. QoS 0 knows no answer: such messages are never queued, and
 * are left out only where memory is full. Last wills do not come by here; Mosquitto's own bounds have to stand so much higher.
 *
 * It tells in retained messages, once a second where they changed: `$SYS/broker/fleetwright/full` (`none`, `queue SESSION`,
 * `memory` or `disk`), and how many messages were refused since the start in `$SYS/broker/fleetwright/refused/queue`, `/memory`, `/disk`.
 *
 * With the classic persistence (`persistence true`) Mosquitto tells no plugin of its queues, and writes its file anew beside the old
 * one: then queues are bounded by memory alone, and the disk has to have room for one more such file.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mosquitto.h>
#include <mosquitto/libcommon_memory.h>
#include <sqlite3.h>

#include "mosquitto-bounds-events.h"
#include "mosquitto-bounds-volume.h"

#define NAME "bounds"
#define SYS_PREFIX "$SYS/broker/fleetwright/"
#define TICK_MILLISECONDS 100

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

enum bound { QUEUE, MEMORY, DISK, BOUNDS };
static const char *const names[BOUNDS] = {"queue", "memory", "disk"};

struct state {
	struct volume volume;
	/* Options. */
	bool disconnects;
	int trusted_port;
	uint64_t memory_bytes;
	struct queues queues;
	bool memory_full;
	uint64_t refused[BOUNDS];
	/* As published last. */
	uint64_t told_refused[BOUNDS];
	char *told_full;
	time_t told_at;
};

static void look_at_memory(struct state *state)
{
	state->memory_full = state->memory_bytes > 0 && is_full(state->memory_full, mosquitto_memory_used(), state->memory_bytes);
}

/* What stands in the way of a message; BOUNDS where nothing does. */
static enum bound obstacle(struct state *state, const struct mosquitto_evt_message *message)
{
	look_at_memory(state);
	if(state->memory_full){
		return MEMORY;
	}
	/* Neither queued nor stored. */
	if(message->qos == 0 && !message->retain){
		return BOUNDS;
	}
	if(has_no_room(&state->volume, message->payloadlen)){
		return DISK;
	}
	if(message->qos > 0 && stand_in_the_way(&state->queues, message->topic)){
		return QUEUE;
	}
	return BOUNDS;
}

static int on_message(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_message *message = event_data;
	struct state *state = userdata;
	uint64_t print = 0;
	enum bound bound;

	(void)event;
	if(mosquitto_client_port(message->client) == state->trusted_port){
		return MOSQ_ERR_SUCCESS;
	}
	if(message->qos == 2 && state->queues.count > 0){
		print = fingerprint(mosquitto_client_id(message->client), message->topic, message->payload, message->payloadlen);
		if(has(&state->queues.known, print)){
			return MOSQ_ERR_SUCCESS;
		}
	}
	bound = obstacle(state, message);
	if(bound == BOUNDS){
		if(print != 0){
			struct slot slot = {.id = print, .bytes = message->payloadlen, .owner = owning_connection(message->client)};

			reserve(&state->queues, message->topic, slot);
		}
		return MOSQ_ERR_SUCCESS;
	}
	state->refused[bound]++;
	/* To a client of MQTT 3.1.1 this would be an acknowledgement like any other. */
	if(message->qos == 0 || (!state->disconnects && mosquitto_client_protocol_version(message->client) == 5)){
		return MOSQ_ERR_QUOTA_EXCEEDED;
	}
	return MOSQ_ERR_SERVER_BUSY;
}

static void take_message(void *userdata, sqlite3_stmt *row)
{
	struct state *state = userdata;
	const char *client = (const char *)sqlite3_column_text(row, 0);
	struct slot slot = {.id = (uint64_t)sqlite3_column_int64(row, 2), .bytes = (uint32_t)sqlite3_column_int64(row, 3)};
	struct queue *queue;

	if(sqlite3_column_int(row, 1) == INCOMING){
		const char *topic = (const char *)sqlite3_column_text(row, 4);

		slot.owner = owning_session(client);
		take_in(&state->queues, fingerprint(client, topic, sqlite3_column_blob(row, 5), slot.bytes), slot);
		reserve(&state->queues, topic, slot);
		return;
	}
	queue = queue_of(&state->queues, client, true);
	if(queue){
		put(&queue->waiting, slot);
	}
}

static void take_subscription(void *userdata, sqlite3_stmt *row)
{
	struct queue *queue = queue_of(&((struct state *)userdata)->queues, (const char *)sqlite3_column_text(row, 0), true);
	const char *filter = (const char *)sqlite3_column_text(row, 1);

	if(queue && filter){
		subscribe(queue, filter);
	}
}

/* Mosquitto tells of what comes and goes, not of what was there before it started: that stands in the database. */
static int on_restore(int event, void *event_data, void *userdata)
{
	struct state *state = userdata;

	(void)event;
	(void)event_data;
	if(!open_database(&state->volume)
			|| !query(&state->volume, "SELECT client_id, topic FROM subscriptions WHERE substr(client_id, 1, length(?1)) = ?1",
				state->queues.prefix, take_subscription, state)
			|| !query(&state->volume, "SELECT m.client_id, m.direction, m.store_id, b.payloadlen, b.topic,"
				" CASE m.direction WHEN 0 THEN b.payload END FROM client_msgs AS m"
				" JOIN base_msgs AS b ON b.store_id = m.store_id"
				" WHERE m.direction = 0 OR substr(m.client_id, 1, length(?1)) = ?1", state->queues.prefix, take_message, state)){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": cannot read what is queued (%s): the queues count as empty",
			sqlite3_errmsg(state->volume.database));
	}
	for(size_t i = 0; i < state->queues.count; i++){
		judge(&state->queues, &state->queues.list[i]);
	}
	return MOSQ_ERR_SUCCESS;
}

static void tell(const char *topic, const char *text)
{
	mosquitto_broker_publish_copy(NULL, topic, (int)strlen(text), text, 0, true, NULL);
}

/* Where something is full, what it is; the worst first. */
static void describe(const struct state *state, char *text, size_t size)
{
	snprintf(text, size, "%s", state->volume.full ? names[DISK] : state->memory_full ? names[MEMORY] : "none");
	for(size_t i = 0; !state->volume.full && !state->memory_full && i < state->queues.count; i++){
		if(state->queues.list[i].full){
			snprintf(text, size, "%s %s", names[QUEUE], state->queues.list[i].client);
			return;
		}
	}
}

static void tell_changes(struct state *state)
{
	char text[512], topic[64];
	bool first = !state->told_full;

	describe(state, text, sizeof(text));
	if(first || strcmp(state->told_full, text)){
		tell(SYS_PREFIX "full", text);
		free(state->told_full);
		state->told_full = strdup(text);
	}
	for(int bound = 0; bound < BOUNDS; bound++){
		if(first || state->told_refused[bound] != state->refused[bound]){
			snprintf(topic, sizeof(topic), SYS_PREFIX "refused/%s", names[bound]);
			snprintf(text, sizeof(text), "%llu", (unsigned long long)state->refused[bound]);
			tell(topic, text);
			state->told_refused[bound] = state->refused[bound];
		}
	}
}

static int on_tick(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_tick *tick = event_data;
	struct state *state = userdata;

	(void)event;
	look_at(&state->volume);
	look_at_memory(state);
	if(tick->now_s != state->told_at){
		state->told_at = tick->now_s;
		tell_changes(state);
	}
	tick->next_s = 0;
	tick->next_ms = TICK_MILLISECONDS;
	return MOSQ_ERR_SUCCESS;
}

static bool parse_number(const char *text, uint64_t *number)
{
	char *end;

	*number = strtoull(text, &end, 10);
	return *text >= '1' && *text <= '9' && *end == '\0';
}

static bool configure(struct state *state, const struct mosquitto_opt *options, int option_count)
{
	bool valid = mosquitto_persistence_location() != NULL;
	uint64_t port = 0;

	for(int i = 0; i < option_count; i++){
		const char *key = options[i].key, *value = options[i].value;

		if(!strcmp(key, "when_full")){
			state->disconnects = !strcmp(value, "disconnect");
			valid = valid && (state->disconnects || !strcmp(value, "refuse"));
		}else if(!strcmp(key, "trusted_port")){
			valid = valid && parse_number(value, &port) && port <= 65535;
		}else if(!strcmp(key, "memory_bytes")){
			valid = valid && parse_number(value, &state->memory_bytes);
		}else if(!strcmp(key, "session_bytes")){
			valid = valid && parse_number(value, &state->queues.most_bytes);
		}else if(!strcmp(key, "session_prefix") && !state->queues.prefix){
			/* The broker's own copy does not live as long. */
			state->queues.prefix = strdup(value);
		}
	}
	state->trusted_port = (int)port;
	return valid && (state->queues.most_bytes == 0 || (state->queues.prefix && *state->queues.prefix));
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
		{MOSQ_EVT_PERSIST_BASE_MSG_ADD, on_stored, queues},
		{MOSQ_EVT_PERSIST_CLIENT_MSG_ADD, on_queued, queues},
		{MOSQ_EVT_PERSIST_CLIENT_MSG_DELETE, on_taken, queues},
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
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": expected persistence_location, plugin_opt_when_full refuse or disconnect, and"
			" numbers above 0; plugin_opt_session_prefix with plugin_opt_session_bytes");
		return MOSQ_ERR_INVAL;
	}
	count = queues->most_bytes == 0 ? 2 : count;
	/* For the database that the persistence plugin opens, which is loaded after this one. */
	sqlite3_auto_extension((void (*)(void))leave_deleted);
	for(size_t i = 0; rc == MOSQ_ERR_SUCCESS && i < count; i++){
		rc = mosquitto_callback_register(identifier, callbacks[i].event, callbacks[i].callback, NULL, callbacks[i].userdata);
	}
	return rc;
}

/* Mosquitto itself forgets the callbacks of a plugin that goes. */
int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	struct state *state = userdata;

	(void)options;
	(void)option_count;
	sqlite3_cancel_auto_extension((void (*)(void))leave_deleted);
	if(state){
		while(state->queues.count > 0){
			forget(&state->queues, state->queues.list);
		}
		free(state->queues.list);
		free(state->queues.prefix);
		clear_table(&state->queues.incoming);
		clear_table(&state->queues.fingerprints);
		clear_table(&state->queues.known);
		sqlite3_close(state->volume.database);
		free(state->told_full);
		free(state);
	}
	return MOSQ_ERR_SUCCESS;
}
