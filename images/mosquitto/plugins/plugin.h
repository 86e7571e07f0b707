/* What the plugins that read files of users have in common: their options, their callbacks and their end. */
#ifndef FLEETWRIGHT_PLUGIN_H
#define FLEETWRIGHT_PLUGIN_H

#include <stdbool.h>
#include <stddef.h>

#include <mosquitto.h>

#define MAX_CALLBACKS 2

/* A plugin defines PLUGIN; plugin.c exports the functions that Mosquitto calls. */
struct plugin {
	const char *name;
	const char *expected; /* its options, for the log */
	size_t state_bytes;   /* of its state, which is zero at first and the userdata of each callback */
	/* Takes an option. False where the option or its value is not known; the broker does not start then. */
	bool (*set_option)(void *state, const char *key, const char *value);
	/* After all options. False where one is missing. */
	bool (*is_complete)(const void *state);
	/* Prepares what is needed for the first callback. False where it cannot; the broker does not start then. */
	bool (*start)(void *state);
	/* Frees what the state refers to. */
	void (*clear)(void *state);
	struct {
		int event;
		MOSQ_FUNC_generic_callback function;
	} callbacks[MAX_CALLBACKS];
};

__attribute__((visibility("hidden"))) extern const struct plugin PLUGIN;

/* Keeps a copy of an option's value: the broker frees its own. False where the option was given before. */
bool plugin_keep_option(char **target, const char *value);

#endif
