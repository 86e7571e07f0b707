#include "user_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "version.h"

#define INITIAL_USERS 64

enum outcome { ADDED, INVALID, OUT_OF_MEMORY };

static int compare(const void *left, const void *right)
{
	return strcmp(((const struct user *)left)->name, ((const struct user *)right)->name);
}

static bool reserve(struct user_file *file, size_t *capacity)
{
	size_t larger = *capacity ? 2 * *capacity : INITIAL_USERS;
	struct user *users;

	if(file->count < *capacity){
		return true;
	}
	users = realloc(file->users, larger * sizeof(*users));
	if(!users){
		return false;
	}
	file->users = users;
	*capacity = larger;
	return true;
}

static enum outcome add(struct user_file *file, size_t *capacity, char *line, size_t length, const struct user_format *format)
{
	char *colon = memchr(line, ':', length);
	struct user user;

	while(length > 0 && (line[length - 1] == '\n' || line[length - 1] == '\r')){
		line[--length] = '\0';
	}
	/* A NUL in a line would hide the rest of it. */
	if(!colon || colon == line || strlen(line) != length){
		return INVALID;
	}
	*colon = '\0';
	if(!reserve(file, capacity)){
		return OUT_OF_MEMORY;
	}
	user.value = format->parse(colon + 1);
	if(!user.value){
		return INVALID;
	}
	user.name = strdup(line);
	if(!user.name){
		format->free(user.value);
		return OUT_OF_MEMORY;
	}
	file->users[file->count++] = user;
	return ADDED;
}

bool user_file_read(struct user_file *file, FILE *stream, const char *path, const struct user_format *format)
{
	char *line = NULL;
	size_t line_capacity = 0, capacity = 0, number = 0;
	enum outcome outcome = ADDED;
	ssize_t length;
	bool complete;

	user_file_clear(file, format);
	errno = 0;
	while(outcome != OUT_OF_MEMORY && (length = getline(&line, &line_capacity, stream)) != -1){
		number++;
		outcome = add(file, &capacity, line, (size_t)length, format);
		if(outcome == INVALID){
			file->left_out++;
			mosquitto_log_printf(MOSQ_LOG_ERR, "%s: line %zu of %s is left out: expected %s", format->plugin, number, path, format->expected);
		}
	}
	free(line);
	complete = outcome != OUT_OF_MEMORY && feof(stream) && !ferror(stream);
	if(!complete){
		mosquitto_log_printf(MOSQ_LOG_ERR, "%s: cannot read %s (%s): none of its users is accepted", format->plugin, path,
			outcome == OUT_OF_MEMORY ? "out of memory" : strerror(errno));
		user_file_clear(file, format);
		return false;
	}
	if(file->count > 0){
		qsort(file->users, file->count, sizeof(*file->users), compare);
	}
	return true;
}

bool user_file_load(struct user_file *file, const char *path, const struct user_format *format)
{
	FILE *stream = fopen(path, "r");
	bool complete;

	if(!stream){
		mosquitto_log_printf(MOSQ_LOG_ERR, "%s: cannot open %s (%s): none of its users is accepted", format->plugin, path, strerror(errno));
		user_file_clear(file, format);
		return false;
	}
	complete = user_file_read(file, stream, path, format);
	fclose(stream);
	return complete;
}

void *user_file_find(const struct user_file *file, const char *name)
{
	const struct user wanted = {(char *)name, NULL};
	const struct user *found = file->count > 0 ? bsearch(&wanted, file->users, file->count, sizeof(*file->users), compare) : NULL;

	return found ? found->value : NULL;
}

void *user_file_keep_text(const char *text)
{
	return strdup(text);
}

void user_file_clear(struct user_file *file, const struct user_format *format)
{
	for(size_t i = 0; i < file->count; i++){
		free(file->users[i].name);
		format->free(file->users[i].value);
	}
	free(file->users);
	*file = (struct user_file){0};
}
