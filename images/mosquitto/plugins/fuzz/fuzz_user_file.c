/* The files of users, with values of both plugins. Whatever is in a file: it is read to its end, every user that is found is sorted and
 * can be found by name, and reading it again gives the same. */
#include <string.h>

#include "../identity.h"
#include "../user_file.h"
#include "../version.h"
#include "input.h"

static void *parse_digest(const char *text)
{
	unsigned char *digest = malloc(DIGEST_BYTES);

	if(digest && !identity_parse_digest(text, digest)){
		free(digest);
		return NULL;
	}
	return digest;
}

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

static const struct user_format FORMATS[] = {
	{"fuzz", "user:digest", parse_digest, free},
	{"fuzz", "user:hash", parse_hash, free_hash},
};

static size_t read_bytes(struct user_file *file, const uint8_t *data, size_t size, const struct user_format *format)
{
	FILE *stream = fmemopen((void *)data, size, "r");

	EXPECT(stream);
	EXPECT(user_file_read(file, stream, "fuzz", format));
	fclose(stream);
	return file->count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	for(size_t i = 0; size > 0 && i < sizeof(FORMATS) / sizeof(*FORMATS); i++){
		struct user_file file = {0};
		size_t count = read_bytes(&file, data, size, &FORMATS[i]);

		for(size_t user = 0; user < count; user++){
			EXPECT(user == 0 || strcmp(file.users[user - 1].name, file.users[user].name) <= 0);
			EXPECT(file.users[user].name[0] && !strchr(file.users[user].name, ':'));
			EXPECT(user_file_find(&file, file.users[user].name));
		}
		EXPECT(read_bytes(&file, data, size, &FORMATS[i]) == count);
		user_file_clear(&file, &FORMATS[i]);
		EXPECT(!user_file_find(&file, "press-1"));
	}
	return 0;
}
