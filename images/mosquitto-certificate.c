/* A plugin of Mosquitto 2.1: whose certificate counts, and for whom.
 *
 * Mosquitto can ask for a certificate and take its common name for the user (`use_identity_as_username`). Then it asks nobody
 * whether that user may connect, and lets whoever is connected stay, come what may: only a revocation list keeps a certificate
 * out, and even that does not end a session. So this plugin is asked instead, at each login and, for every client that is
 * connected, at each reload. It knows the public key of each device that may connect by certificate; any other is turned
 * away, whoever signed its certificate.
 *
 *   global_plugin /usr/lib/mosquitto/certificate.so
 *   plugin_opt_file /run/fleetwright/certificate-keys
 *   plugin_opt_certificate_ports 8884
 *   plugin_opt_certificate_and_password_ports 8885,8886
 *
 * The file has lines `user:digest`, each user once: SHA-256 of the SubjectPublicKeyInfo (DER), in hexadecimal digits. It is read
 * at start and on every reload; a file that is not there is an empty one. The ports are those of listeners with
 * `require_certificate true`. On the former, the common name becomes the user name and the client identifier, whatever the client
 * says. On the latter, the client has to give the common name as its user name, and then its password is checked as anywhere
 * else: load this plugin before any other that could let a client in. On other ports it says nothing.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mosquitto.h>
#include <openssl/evp.h>
#include <openssl/x509.h>

#define NAME "certificate"
#define DIGEST_BYTES 32
#define MOST_PORTS 16
/* The longest user name (a Kubernetes name has up to 253 characters), and its final NUL. */
#define NAME_BYTES 254

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

struct entry {
	char *username;
	unsigned char digest[DIGEST_BYTES];
};

struct ports {
	int ports[MOST_PORTS];
	size_t count;
};

struct state {
	mosquitto_plugin_id_t *identifier;
	char *path;
	struct ports certificate;
	struct ports certificate_and_password;
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
	}
	free(state->entries);
	state->entries = NULL;
	state->count = 0;
}

/* Takes over one line. False where it is none, or memory is short. */
static bool take(struct state *state, char *line)
{
	struct entry entry = {NULL, {0}};
	struct entry *entries;
	char *digits = strchr(line, ':');

	if(!digits){
		return false;
	}
	*digits++ = '\0';
	digits[strcspn(digits, "\r\n")] = '\0';
	if(strlen(digits) != 2 * DIGEST_BYTES || strspn(digits, "0123456789abcdef") != 2 * DIGEST_BYTES){
		return false;
	}
	for(size_t i = 0; i < DIGEST_BYTES; i++){
		sscanf(digits + 2 * i, "%2hhx", &entry.digest[i]);
	}
	entry.username = strdup(line);
	entries = realloc(state->entries, (state->count + 1) * sizeof(*entries));
	if(entries){
		state->entries = entries;
	}
	if(!entry.username || !entries){
		free(entry.username);
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
			mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": cannot read %s (%s): no certificate is accepted", state->path, strerror(errno));
		}
		return;
	}
	while(getline(&line, &capacity, file) != -1){
		number++;
		if(!take(state, line)){
			mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": line %zu of %s is left out: expected user:digest", number, state->path);
		}
	}
	free(line);
	fclose(file);
	if(state->count > 0){
		qsort(state->entries, state->count, sizeof(*state->entries), compare);
	}
}

static bool has(const struct ports *ports, int port)
{
	for(size_t i = 0; i < ports->count; i++){
		if(ports->ports[i] == port){
			return true;
		}
	}
	return false;
}

/* The one common name of a subject. */
static bool common_name(X509 *certificate, char name[NAME_BYTES])
{
	X509_NAME *subject = X509_get_subject_name(certificate);
	int index = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
	unsigned char *text = NULL;
	bool found = false;
	int length;

	if(index < 0 || X509_NAME_get_index_by_NID(subject, NID_commonName, index) != -1){
		return false;
	}
	length = ASN1_STRING_to_UTF8(&text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, index)));
	if(length > 0 && length < NAME_BYTES && !memchr(text, '\0', (size_t)length)){
		memcpy(name, text, (size_t)length);
		name[length] = '\0';
		found = true;
	}
	OPENSSL_free(text);
	return found;
}

static bool key_digest(X509 *certificate, unsigned char digest[DIGEST_BYTES])
{
	unsigned char *der = NULL;
	unsigned int size = 0;
	int length = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate), &der);
	bool done = length > 0 && EVP_Digest(der, (size_t)length, digest, &size, EVP_sha256(), NULL) == 1 && size == DIGEST_BYTES;

	OPENSSL_free(der);
	return done;
}

static const struct entry *find(const struct state *state, char *name)
{
	const struct entry wanted = {name, {0}};

	return state->count > 0 ? bsearch(&wanted, state->entries, state->count, sizeof(*state->entries), compare) : NULL;
}

/* Whether the certificate is of the key that its common name may use, and its time is not over; gives that name. */
static bool accepts(const struct state *state, X509 *certificate, char name[NAME_BYTES])
{
	unsigned char digest[DIGEST_BYTES];
	const struct entry *found;

	if(!common_name(certificate, name) || !key_digest(certificate, digest)){
		return false;
	}
	found = find(state, name);
	return found && memcmp(found->digest, digest, DIGEST_BYTES) == 0 && X509_cmp_current_time(X509_get0_notAfter(certificate)) > 0;
}

/* At a reload Mosquitto asks for the sessions too whose clients are away, and would drop those with their queues. A login is not
 * among the sessions before it is accepted. */
static bool is_away(const struct mosquitto *client)
{
	const char *identifier = mosquitto_client_id(client);

	return identifier && mosquitto_client(identifier) == client;
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
	int port = mosquitto_client_port(login->client);
	bool alone = has(&state->certificate, port);
	char name[NAME_BYTES];
	X509 *certificate;
	const char *known;
	bool accepted;

	(void)event;
	if(!alone && !has(&state->certificate_and_password, port)){
		return MOSQ_ERR_PLUGIN_IGNORE;
	}
	certificate = mosquitto_client_certificate(login->client);
	if(!certificate && is_away(login->client)){
		return login->username && find(state, login->username) ? (alone ? MOSQ_ERR_SUCCESS : MOSQ_ERR_PLUGIN_IGNORE) : MOSQ_ERR_AUTH;
	}
	if(!certificate){
		return MOSQ_ERR_AUTH;
	}
	accepted = accepts(state, certificate, name);
	X509_free(certificate);
	if(!accepted){
		return MOSQ_ERR_AUTH;
	}
	if(!alone){
		/* The rest is a matter of the password. */
		return login->username && !strcmp(login->username, name) ? MOSQ_ERR_PLUGIN_IGNORE : MOSQ_ERR_AUTH;
	}
	known = mosquitto_client_id(login->client);
	if((!known || strcmp(known, name)) && mosquitto_set_clientid(login->client, name) != MOSQ_ERR_SUCCESS){
		return MOSQ_ERR_AUTH;
	}
	known = mosquitto_client_username(login->client);
	if((!known || strcmp(known, name)) && mosquitto_set_username(login->client, name) != MOSQ_ERR_SUCCESS){
		return MOSQ_ERR_AUTH;
	}
	return MOSQ_ERR_SUCCESS;
}

/* Numbers with a comma between each two. */
static bool parse_ports(struct ports *ports, const char *text)
{
	for(;;){
		char *end;
		long port = strtol(text, &end, 10);

		if(end == text || port < 1 || port > 65535 || ports->count == MOST_PORTS){
			return false;
		}
		ports->ports[ports->count++] = (int)port;
		if(*end == '\0'){
			return true;
		}
		if(*end != ','){
			return false;
		}
		text = end + 1;
	}
}

static bool configure(struct state *state, const struct mosquitto_opt *options, int option_count)
{
	for(int i = 0; i < option_count; i++){
		const char *key = options[i].key, *value = options[i].value;

		if(!strcmp(key, "file") && !state->path){
			/* The broker's own copy does not live as long. */
			state->path = strdup(value);
		}else if(!strcmp(key, "certificate_ports")){
			if(!parse_ports(&state->certificate, value)){
				return false;
			}
		}else if(!strcmp(key, "certificate_and_password_ports")){
			if(!parse_ports(&state->certificate_and_password, value)){
				return false;
			}
		}
	}
	return state->path != NULL;
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
	if(!configure(state, options, option_count)){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": expected plugin_opt_file, and ports with commas between them");
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
