/* A plugin of Mosquitto: ends what is left of users that no longer exist.
 *
 * After a reload Mosquitto disconnects a client whose user is gone. Its session stays, with its subscriptions and its queue, and so do
 * the messages that it retained: the next user of the same name would find them. This plugin compares at the start and after each
 * reload, and ends the session and deletes the retained messages of each client that is no user any more.
 *
 *   global_plugin /usr/lib/mosquitto/users.so
 *   plugin_opt_password_file /run/fleetwright/passwords
 *   plugin_opt_certificate_file /run/fleetwright/certificate-keys
 *   plugin_opt_keep_prefix _
 *
 * Client identifiers are user names (`use_username_as_clientid`). A user exists if either file has a line for it. Clients whose
 * identifier begins with `keep_prefix` are always kept: those of workers, of the agent and of the operator have their own life cycle.
 * Where a file cannot be read, a line of it is not valid, or no user has a password, nothing is removed: nothing could bring it back.
 */
#include <stdlib.h>
#include <string.h>

#include "plugin.h"
#include "user_file.h"
#include "version.h"

#define NAME "users"
#define TICK_MILLISECONDS 100

enum { PASSWORDS, CERTIFICATES, FILES };

struct state {
	char *paths[FILES];
	struct user_file files[FILES];
	char *keep_prefix;
	bool pending; /* the files may have changed */
};

/* Which users there are matters here, not their credentials. */
static const struct user_format FORMAT = {NAME, "user:credential", user_file_keep_text, free};

static bool is_user(const char *client, void *userdata)
{
	const struct state *state = userdata;

	if(!strncmp(client, state->keep_prefix, strlen(state->keep_prefix))){
		return true;
	}
	for(int i = 0; i < FILES; i++){
		if(user_file_find(&state->files[i], client)){
			return true;
		}
	}
	return false;
}

/* False where a user may be missing. */
static bool load(struct state *state)
{
	bool complete = true;

	for(int i = 0; i < FILES; i++){
		complete = user_file_load(&state->files[i], state->paths[i], &FORMAT) && state->files[i].left_out == 0 && complete;
	}
	return complete && state->files[PASSWORDS].count > 0;
}

static int on_reload(int event, void *event_data, void *userdata)
{
	(void)event;
	(void)event_data;
	((struct state *)userdata)->pending = true;
	return MOSQ_ERR_SUCCESS;
}

/* After the reload, when Mosquitto has read the files too and disconnected clients; after the start, when sessions are restored. */
static int on_tick(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_tick *tick = event_data;
	struct state *state = userdata;

	(void)event;
	tick->next_s = 0;
	tick->next_ms = TICK_MILLISECONDS;
	if(!state->pending){
		return MOSQ_ERR_SUCCESS;
	}
	state->pending = false;
	if(load(state)){
		mosquitto_clients_remove_unless(is_user, state);
	}else{
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": what is left of removed users stays until %s and %s are complete", state->paths[PASSWORDS],
			state->paths[CERTIFICATES]);
	}
	for(int i = 0; i < FILES; i++){
		user_file_clear(&state->files[i], &FORMAT);
	}
	return MOSQ_ERR_SUCCESS;
}

static bool set_option(void *userdata, const char *key, const char *value)
{
	struct state *state = userdata;

	if(!strcmp(key, "password_file")){
		return plugin_keep_option(&state->paths[PASSWORDS], value);
	}
	if(!strcmp(key, "certificate_file")){
		return plugin_keep_option(&state->paths[CERTIFICATES], value);
	}
	/* An empty prefix matches every user, so no user would be removed. */
	return !strcmp(key, "keep_prefix") && *value && plugin_keep_option(&state->keep_prefix, value);
}

static bool is_complete(const void *userdata)
{
	const struct state *state = userdata;

	return state->paths[PASSWORDS] && state->paths[CERTIFICATES] && state->keep_prefix;
}

static bool start(void *state)
{
	((struct state *)state)->pending = true;
	return true;
}

static void clear(void *userdata)
{
	struct state *state = userdata;

	for(int i = 0; i < FILES; i++){
		user_file_clear(&state->files[i], &FORMAT);
		free(state->paths[i]);
	}
	free(state->keep_prefix);
}

const struct plugin PLUGIN = {
	.name = NAME,
	.expected = "plugin_opt_password_file, plugin_opt_certificate_file and plugin_opt_keep_prefix",
	.state_bytes = sizeof(struct state),
	.set_option = set_option,
	.is_complete = is_complete,
	.start = start,
	.clear = clear,
	.callbacks = {{MOSQ_EVT_TICK, on_tick}, {MOSQ_EVT_RELOAD, on_reload}},
};
