/* A plugin of Mosquitto: accepts passwords in addition to those of the password file.
 *
 * Mosquitto knows one password for each user, and its own password check denies what it does not accept, so a plugin after it is never
 * asked. While a password is rotated, a device must be able to log in with the old one and the new one. This plugin is asked first. It
 * accepts a user whose password is in its file and ignores every other login, which Mosquitto then checks as usual. It can accept but
 * never deny. After a reload that removes a password, Mosquitto checks all connected clients again and disconnects who used it.
 *
 *   global_plugin /usr/lib/mosquitto/previous_password.so
 *   plugin_opt_file /run/fleetwright/previous-passwords
 *
 * The file has lines as mosquitto_passwd writes them, `user:hash`, each user once. It is read at the start and on every reload. The
 * broker does not start without it. Where it cannot be read on a reload, no previous password is accepted.
 */
#include <stdlib.h>
#include <string.h>

#include "user_file.h"
#include "version.h"

#define NAME "previous-password"

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

struct state {
	char *path;
	struct user_file passwords;
};

static void *parse_hash(const char *text)
{
	struct mosquitto_pw *password = NULL;

	if(mosquitto_pw_new(&password, MOSQ_PW_DEFAULT) != MOSQ_ERR_SUCCESS || mosquitto_pw_decode(password, text) != MOSQ_ERR_SUCCESS){
		mosquitto_pw_cleanup(password);
		return NULL;
	}
	return password;
}

static void free_hash(void *password)
{
	mosquitto_pw_cleanup(password);
}

static const struct user_format FORMAT = {NAME, "user:hash", parse_hash, free_hash};

/* An error here would end the broker and with it every session. What cannot be read is logged, and accepts nobody. */
static int on_reload(int event, void *event_data, void *userdata)
{
	struct state *state = userdata;

	(void)event;
	(void)event_data;
	user_file_load(&state->passwords, state->path, &FORMAT);
	return MOSQ_ERR_SUCCESS;
}

static int on_basic_auth(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_basic_auth *login = event_data;
	const struct state *state = userdata;
	struct mosquitto_pw *password;

	(void)event;
	if(!login->username || !login->password){
		return MOSQ_ERR_PLUGIN_IGNORE;
	}
	password = user_file_find(&state->passwords, login->username);
	if(password && mosquitto_pw_verify(password, login->password) == MOSQ_ERR_SUCCESS){
		return MOSQ_ERR_SUCCESS;
	}
	return MOSQ_ERR_PLUGIN_IGNORE;
}

int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options, int option_count)
{
	struct state *state = calloc(1, sizeof(*state));
	int rc;

	if(!state){
		return MOSQ_ERR_NOMEM;
	}
	*userdata = state;
	mosquitto_plugin_set_info(identifier, NAME, NULL);
	for(int i = 0; i < option_count; i++){
		if(!strcmp(options[i].key, "file") && !state->path){
			/* The broker frees its own copy. */
			state->path = strdup(options[i].value);
		}
	}
	if(!state->path){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": plugin_opt_file is missing: name the file");
		return MOSQ_ERR_INVAL;
	}
	if(!user_file_load(&state->passwords, state->path, &FORMAT)){
		return MOSQ_ERR_INVAL;
	}
	rc = mosquitto_callback_register(identifier, MOSQ_EVT_BASIC_AUTH, on_basic_auth, NULL, state);
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
		user_file_clear(&state->passwords, &FORMAT);
		free(state->path);
		free(state);
	}
	return MOSQ_ERR_SUCCESS;
}
