/* A plugin of Mosquitto 2.1: passwords that are accepted besides those of the password file.
 *
 * Mosquitto knows one password a user, and its own password file plugin denies what it does not accept, so that a second one
 * after it is never asked. While a password is rotated a device must get in with the old one and the new one. So this plugin
 * is asked first: a user whose password stands in its file is let in; about everybody else it says nothing, and Mosquitto goes
 * on as if it were not there. It can let in but never turn away. What it lets in it stops letting in with the next reload,
 * when Mosquitto asks again for every client that is connected.
 *
 *   plugin /usr/lib/mosquitto/previous_password.so
 *   plugin_opt_file /run/fleetwright/previous-passwords
 *
 * The file has lines as mosquitto_passwd writes them, `user:hash`, each user once. It is read at start and on every reload; a
 * file that is not there is an empty one.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mosquitto.h>

#define NAME "previous-password"

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

struct entry {
	char *username;
	struct mosquitto_pw *password;
};

struct state {
	mosquitto_plugin_id_t *identifier;
	char *path;
	struct entry *entries; /* sorted by user */
	size_t count;
};

static int compare(const void *left, const void *right)
{
	return strcmp(((const struct entry *)left)->username, ((const struct entry *)right)->username);
}

static void forget(struct state *state)
{
	for(size_t i = 0; i < state->count; i++){
		free(state->entries[i].username);
		mosquitto_pw_cleanup(state->entries[i].password);
	}
	free(state->entries);
	state->entries = NULL;
	state->count = 0;
}

/* Takes over one line. False where it is none of a user, or memory is short. */
static bool take(struct state *state, char *line)
{
	struct entry entry = {NULL, NULL};
	struct entry *entries;
	char *hash = strchr(line, ':');

	if(!hash){
		return false;
	}
	*hash++ = '\0';
	hash[strcspn(hash, "\r\n")] = '\0';
	entry.username = strdup(line);
	entries = realloc(state->entries, (state->count + 1) * sizeof(*entries));
	if(entries){
		state->entries = entries;
	}
	if(!entry.username || !entries || mosquitto_pw_new(&entry.password, MOSQ_PW_DEFAULT) != MOSQ_ERR_SUCCESS
			|| mosquitto_pw_decode(entry.password, hash) != MOSQ_ERR_SUCCESS){
		free(entry.username);
		mosquitto_pw_cleanup(entry.password);
		return false;
	}
	state->entries[state->count++] = entry;
	return true;
}

static void load(struct state *state)
{
	char *line = NULL;
	size_t capacity = 0, number = 0;
	FILE *file;

	forget(state);
	file = fopen(state->path, "r");
	if(!file){
		if(errno != ENOENT){
			mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": cannot read %s (%s): no previous password is accepted", state->path, strerror(errno));
		}
		return;
	}
	while(getline(&line, &capacity, file) != -1){
		number++;
		if(!take(state, line)){
			mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": line %zu of %s is left out: expected user:hash", number, state->path);
		}
	}
	free(line);
	fclose(file);
	if(state->count > 0){
		qsort(state->entries, state->count, sizeof(*state->entries), compare);
	}
}

/* An error here would end the broker: what cannot be read is logged. */
static int on_reload(int event, void *event_data, void *userdata)
{
	(void)event;
	(void)event_data;
	load(userdata);
	return MOSQ_ERR_SUCCESS;
}

static int on_basic_auth(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_basic_auth *login = event_data;
	const struct state *state = userdata;
	const struct entry wanted = {login->username, NULL};
	const struct entry *found;

	(void)event;
	if(!login->username || !login->password || state->count == 0){
		return MOSQ_ERR_PLUGIN_IGNORE;
	}
	found = bsearch(&wanted, state->entries, state->count, sizeof(*state->entries), compare);
	if(found && mosquitto_pw_verify(found->password, login->password) == MOSQ_ERR_SUCCESS){
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
	state->identifier = identifier;
	mosquitto_plugin_set_info(identifier, NAME, NULL);
	for(int i = 0; i < option_count; i++){
		if(!strcmp(options[i].key, "file") && !state->path){
			/* The broker's own copy does not live as long. */
			state->path = strdup(options[i].value);
		}
	}
	if(!state->path){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": plugin_opt_file is missing: name the file");
		return MOSQ_ERR_INVAL;
	}
	load(state);
	rc = mosquitto_callback_register(identifier, MOSQ_EVT_BASIC_AUTH, on_basic_auth, NULL, state);
	if(rc == MOSQ_ERR_SUCCESS){
		rc = mosquitto_callback_register(identifier, MOSQ_EVT_RELOAD, on_reload, NULL, state);
	}
	return rc;
}

int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	struct state *state = userdata;

	(void)options;
	(void)option_count;
	if(state){
		mosquitto_callback_unregister(state->identifier, MOSQ_EVT_BASIC_AUTH, on_basic_auth, NULL);
		mosquitto_callback_unregister(state->identifier, MOSQ_EVT_RELOAD, on_reload, NULL);
		forget(state);
		free(state->path);
		free(state);
	}
	return MOSQ_ERR_SUCCESS;
}
