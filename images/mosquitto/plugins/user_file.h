/* Files with one line for each user: `user:value`. */
#ifndef FLEETWRIGHT_USER_FILE_H
#define FLEETWRIGHT_USER_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

/* How values are read. */
struct user_format {
	const char *plugin;   /* name of the plugin, for its log */
	const char *expected; /* what a line has to be, for the log */
	void *(*parse)(const char *text); /* NULL where the text is no value */
	void (*free)(void *value);
};

struct user {
	char *name;
	void *value;
};

struct user_file {
	struct user *users; /* sorted by name */
	size_t count;
	size_t left_out; /* lines that are not valid */
};

/* Replaces the contents by those of the file. A line that is not valid is logged and left out. Where the file cannot be read as a
 * whole, the contents are empty, and the result is false. */
bool user_file_load(struct user_file *file, const char *path, const struct user_format *format);

/* The same, from an open stream. */
bool user_file_read(struct user_file *file, FILE *stream, const char *path, const struct user_format *format);

/* The value of this user; NULL where there is none. */
void *user_file_find(const struct user_file *file, const char *name);

/* A value that is the text itself, for files of which only the names matter. */
void *user_file_keep_text(const char *text);

void user_file_clear(struct user_file *file, const struct user_format *format);

#endif
