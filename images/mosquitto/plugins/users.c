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
 * Where a file cannot be read, nothing is removed.
 */
#include <stdlib.h>
#include <string.h>

#include <mosquitto.h>

#include "user_file.h"
#include "version.h"

#define NAME "users"
#define FILES 2
#define TICK_MILLISECONDS 100

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

struct state {
	char *paths[FILES];
	struct user_file files[FILES];
	char *keep_prefix;
	bool pending; /* the files may have changed */
};

/* Which users there are matters here, not their credentials. */
static void *parse_nothing(const char *text)
{
	return strdup(text);
}

static const struct user_format FORMAT = {NAME, "user:credential", parse_nothing, free};

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

static bool load(struct state *state)
{
	bool complete = true;

	for(int i = 0; i < FILES; i++){
		complete = user_file_load(&state->files[i], state->paths[i], &FORMAT) && complete;
	}
	return complete;
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
	}
	for(int i = 0; i < FILES; i++){
		user_file_clear(&state->files[i], &FORMAT);
	}
	return MOSQ_ERR_SUCCESS;
}

static bool configure(struct state *state, const struct mosquitto_opt *options, int option_count)
{
	for(int i = 0; i < option_count; i++){
		char **target = !strcmp(options[i].key, "password_file") ? &state->paths[0]
			: !strcmp(options[i].key, "certificate_file") ? &state->paths[1]
			: !strcmp(options[i].key, "keep_prefix") ? &state->keep_prefix : NULL;

		if(!target || *target){
			return false;
		}
		/* The broker frees its own copy. */
		*target = strdup(options[i].value);
	}
	return state->paths[0] && state->paths[1] && state->keep_prefix && *state->keep_prefix;
}

int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options, int option_count)
{
	struct state *state = calloc(1, sizeof(*state));
	int rc;

	if(!state){
		return MOSQ_ERR_NOMEM;
	}
	*userdata = state;
	state->pending = true;
	mosquitto_plugin_set_info(identifier, NAME, NULL);
	if(!configure(state, options, option_count)){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": expected plugin_opt_password_file, plugin_opt_certificate_file and"
			" plugin_opt_keep_prefix");
		return MOSQ_ERR_INVAL;
	}
	rc = mosquitto_callback_register(identifier, MOSQ_EVT_TICK, on_tick, NULL, state);
	if(rc == MOSQ_ERR_SUCCESS){
		rc = mosquitto_callback_register(identifier, MOSQ_EVT_RELOAD, on_reload, NULL, state);
	}
	return rc;
}

/* Mosquitto itself removes the callbacks of a plugin that it unloads. */
int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	struct state *state = userdata;

	(void)options;
	(void)option_count;
	if(state){
		for(int i = 0; i < FILES; i++){
			free(state->paths[i]);
		}
		free(state->keep_prefix);
		free(state);
	}
	return MOSQ_ERR_SUCCESS;
}
