/* A plugin of Mosquitto: decides which client certificates are accepted, and as which user.
 *
 * Mosquitto can require a certificate and use its common name as the user name (`use_identity_as_username`). It then asks no plugin
 * whether that user may connect, and does not end the session of a user who may no longer: only a revocation list rejects a
 * certificate, and even that does not end a session. This plugin is asked at each login and, for every connected client, at each
 * reload. It knows the public key of each device that may connect by certificate. Any other key is rejected, whatever authority
 * signed its certificate.
 *
 *   global_plugin /usr/lib/mosquitto/certificate.so
 *   plugin_opt_file /run/fleetwright/certificate-keys
 *   plugin_opt_certificate_ports 8884
 *   plugin_opt_certificate_and_password_ports 8885,8886
 *
 * The file has lines `user:digest`, each user once: SHA-256 of the SubjectPublicKeyInfo (DER), in hexadecimal digits. It is read at the
 * start and on every reload. The broker does not start without it. Where it cannot be read on a reload, no certificate is
 * accepted. The ports are those of listeners with `require_certificate true`. On the first, the common name becomes the user name and
 * the client identifier, whatever the client sends. On the second, the client has to send the common name as its user name, and its
 * password is checked as anywhere else: load this plugin before any other that could accept a client. Other ports are ignored.
 */
#include <stdlib.h>
#include <string.h>

#include <openssl/x509.h>

#include "identity.h"
#include "options.h"
#include "plugin.h"
#include "user_file.h"
#include "version.h"

#define NAME "certificate"

struct state {
	char *path;
	struct ports certificate;
	struct ports certificate_and_password;
	struct user_file keys; /* digests */
};

static const struct user_format FORMAT = {NAME, "user:digest", identity_new_digest, free};

/* Whether the user named by the common name may use this key, and the certificate has not expired. Writes the name to `name`. */
static bool is_accepted(const struct state *state, X509 *certificate, char name[MAX_NAME_BYTES])
{
	unsigned char digest[DIGEST_BYTES];
	const unsigned char *wanted;

	if(!identity_common_name(certificate, name) || !identity_key_digest(certificate, digest)){
		return false;
	}
	wanted = user_file_find(&state->keys, name);
	return wanted && memcmp(wanted, digest, DIGEST_BYTES) == 0 && X509_cmp_current_time(X509_get0_notAfter(certificate)) > 0;
}

/* At a reload Mosquitto also checks sessions whose clients are not connected, and would end those with their queues. A client that logs
 * in is not among the sessions before it is accepted. */
static bool is_disconnected_session(const struct mosquitto *client)
{
	const char *identifier = mosquitto_client_id(client);

	return identifier && mosquitto_client(identifier) == client;
}

/* An error here would end the broker and all sessions. Instead, an unreadable file is logged, and none of its users is accepted. */
static int on_reload(int event, void *event_data, void *userdata)
{
	struct state *state = userdata;

	(void)event;
	(void)event_data;
	user_file_load(&state->keys, state->path, &FORMAT);
	return MOSQ_ERR_SUCCESS;
}

/* The client is who its certificate says. */
static int identify(struct mosquitto *client, const char *name)
{
	const char *known = mosquitto_client_id(client);

	if((!known || strcmp(known, name)) && mosquitto_set_clientid(client, name) != MOSQ_ERR_SUCCESS){
		return MOSQ_ERR_AUTH;
	}
	known = mosquitto_client_username(client);
	if((!known || strcmp(known, name)) && mosquitto_set_username(client, name) != MOSQ_ERR_SUCCESS){
		return MOSQ_ERR_AUTH;
	}
	return MOSQ_ERR_SUCCESS;
}

static int on_basic_auth(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_basic_auth *login = event_data;
	const struct state *state = userdata;
	int port = mosquitto_client_port(login->client);
	bool by_certificate_alone = ports_contain(&state->certificate, port);
	char name[MAX_NAME_BYTES];
	X509 *certificate;
	bool accepted;

	(void)event;
	if(!by_certificate_alone && !ports_contain(&state->certificate_and_password, port)){
		return MOSQ_ERR_PLUGIN_IGNORE;
	}
	certificate = mosquitto_client_certificate(login->client);
	if(!certificate && is_disconnected_session(login->client) && login->username && user_file_find(&state->keys, login->username)){
		return by_certificate_alone ? MOSQ_ERR_SUCCESS : MOSQ_ERR_PLUGIN_IGNORE;
	}
	if(!certificate){
		return MOSQ_ERR_AUTH;
	}
	accepted = is_accepted(state, certificate, name);
	X509_free(certificate);
	if(!accepted){
		return MOSQ_ERR_AUTH;
	}
	if(by_certificate_alone){
		return identify(login->client, name);
	}
	/* The password check follows. */
	return login->username && !strcmp(login->username, name) ? MOSQ_ERR_PLUGIN_IGNORE : MOSQ_ERR_AUTH;
}

static bool set_option(void *userdata, const char *key, const char *value)
{
	struct state *state = userdata;

	if(!strcmp(key, "file")){
		return plugin_keep_option(&state->path, value);
	}
	if(!strcmp(key, "certificate_ports")){
		return options_parse_ports(value, &state->certificate);
	}
	return !strcmp(key, "certificate_and_password_ports") && options_parse_ports(value, &state->certificate_and_password);
}

static bool is_complete(const void *state)
{
	return ((const struct state *)state)->path != NULL;
}

static bool start(void *userdata)
{
	struct state *state = userdata;

	return user_file_load(&state->keys, state->path, &FORMAT);
}

static void clear(void *userdata)
{
	struct state *state = userdata;

	user_file_clear(&state->keys, &FORMAT);
	free(state->path);
}

const struct plugin PLUGIN = {
	.name = NAME,
	.expected = "plugin_opt_file, and ports with commas between them",
	.state_bytes = sizeof(struct state),
	.set_option = set_option,
	.is_complete = is_complete,
	.start = start,
	.clear = clear,
	.callbacks = {{MOSQ_EVT_BASIC_AUTH, on_basic_auth}, {MOSQ_EVT_RELOAD, on_reload}},
};
