/* The files of users, with the values of each plugin. Whatever is in a file: it is read to its end, every user that is found is sorted and
 * can be found by name, and reading it again gives the same. */
#include <string.h>

#include "../identity.h"
#include "../password.h"
#include "../user_file.h"
#include "../version.h"
#include "input.h"

static const struct user_format FORMATS[] = {
	{"fuzz", "user:digest", identity_new_digest, free},
	{"fuzz", "user:hash", password_parse, password_free},
	{"fuzz", "user:credential", user_file_keep_text, free},
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
