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

#include "password.h"
#include "plugin.h"
#include "user_file.h"
#include "version.h"

#define NAME "previous-password"

struct state {
	char *path;
	struct user_file passwords;
};

static const struct user_format FORMAT = {NAME, "user:hash", password_parse, password_free};

/* An error here would end the broker and all sessions. Instead, an unreadable file is logged, and none of its users is accepted. */
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

static bool set_option(void *state, const char *key, const char *value)
{
	return !strcmp(key, "file") && plugin_keep_option(&((struct state *)state)->path, value);
}

static bool is_complete(const void *state)
{
	return ((const struct state *)state)->path != NULL;
}

static bool start(void *userdata)
{
	struct state *state = userdata;

	return user_file_load(&state->passwords, state->path, &FORMAT);
}

static void clear(void *userdata)
{
	struct state *state = userdata;

	user_file_clear(&state->passwords, &FORMAT);
	free(state->path);
}

const struct plugin PLUGIN = {
	.name = NAME,
	.expected = "plugin_opt_file",
	.state_bytes = sizeof(struct state),
	.set_option = set_option,
	.is_complete = is_complete,
	.start = start,
	.clear = clear,
	.callbacks = {{MOSQ_EVT_BASIC_AUTH, on_basic_auth}, {MOSQ_EVT_RELOAD, on_reload}},
};
